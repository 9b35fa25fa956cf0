"""The demo with all components and the founding curriculum, beside kd + lm alone, seed by seed (docs/objectives.md):

python -m bench.objectives_run measure docs/objectives-run.json
python -m bench.objectives_run table docs/objectives-run.json

`measure` trains the demo's student of three seeds in each way, which takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench import kept
from bench.machine import machine
from bench.table import markdown
from fastdistill.training.config import COMPONENTS

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 3
ALONE, ALL, LOUD, ROUTED = "kd + lm", "all seven", "kd + lm + 0.5 attention", "routing"
WAYS: dict[str, dict[str, object]] = {
    ALONE: {"seeds": SEEDS, "layerwise-weight": 0},
    ALL: {
        "seeds": SEEDS, "layerwise-weight": 0.5, "attention-weight": 0.05, "attention-alignment-weight": 0.1,
        "routing-feature-weight": 0.1, "contrastive-weight": 0.02, "curriculum": "founding",
    },
    LOUD: {"seeds": SEEDS, "layerwise-weight": 0, "attention-weight": 0.5},
    # Of all four of the teacher's blocks one is chosen in the end, which collapses most.
    ROUTED: {
        "layerwise-weight": 0, "routing-feature-weight": 0.5, "routing-top-k": 1, "layer-map": "0:0,0:1,1:2,1:3",
        "max-steps": 500,
    },
}  # fmt: skip
"""Flags beside those of the demo."""


def run(flags: dict[str, object], folder: Path) -> list[list[dict[str, Any]]]:
    """The logs of a run's students, seed by seed."""
    given = [part for name, value in {"output-dir": folder, **flags}.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "train.py", "--no-baseline", "--no-tensorboard", *given]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    logs = sorted(folder.glob("seed-*/distilled/log.jsonl"))
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        folders = [Path(folder) / str(number) for number in range(len(WAYS))]
        logs = dict(zip(WAYS, pool.map(run, WAYS.values(), folders), strict=True))
    return {"machine": machine(), "flags": WAYS, "logs": logs}


def table(results: dict[str, Any]) -> str:
    """Markdown: held-out losses by seed; the first seed's shares and warnings; what the router did."""
    logs = results["logs"]
    of_seeds = {name: logs[name] for name in (ALONE, ALL, LOUD)}
    parts = [losses_table(of_seeds), shares_table(logs[ALL][0]), warnings(of_seeds), loads_table(logs[ROUTED][0])]
    return "\n\n".join(parts)


def losses_table(logs: dict[str, Any]) -> str:
    lines = [["held-out loss", *[f"seed {seed}" for seed in range(SEEDS)], "mean", "deviation"]]
    found: dict[str, list[list[float]]] = {"last": [], "best": []}
    for name, of_seeds in logs.items():
        losses = [[record["loss"] for record in log if record["event"] == "eval"] for log in of_seeds]
        for kind, chosen in (("last", [each[-1] for each in losses]), ("best", [min(each) for each in losses])):
            found[kind].append(chosen)
            lines.append([f"{name}, {kind}", *numbers(chosen)])
    for kind, (alone, *others) in found.items():
        for name, losses in zip([*logs][1:], others, strict=True):
            apart = [other - own for own, other in zip(alone, losses, strict=True)]
            lines.append([f"{name}, {kind}, less {ALONE}", *numbers(apart, sign="+")])
    return markdown(lines, texts=1)


def numbers(values: list[float], sign: str = "") -> list[str]:
    return [f"{value:{sign}.3f}" for value in (*values, mean(values))] + [f"{stdev(values):.3f}"]


def shares_table(log: list[dict[str, Any]]) -> str:
    records = [record for record in log if record["event"] == "train"]
    names = [name for name in (*COMPONENTS, "load_balance") if any(name in r["components"] for r in records)]
    lines = [["step", "total", *names]]
    for record in records:
        parts = record["components"]
        shares = [f"{parts[name]['share']:.1%}" if name in parts else "" for name in names]
        lines.append([str(record["step"]), f"{record['total']:.3f}", *shares])
    return markdown(lines, texts=0)


def loads_table(log: list[dict[str, Any]]) -> str:
    """Every fifth line of the log."""
    records = [record["diagnostics"] | {"step": record["step"]} for record in log if record["event"] == "train"]
    names = [name for name in records[0] if name.startswith("router")]
    lines = [["step", *[name.removeprefix("router ") for name in names]]]
    lines += [[str(record["step"]), *[f"{record[name]:.3g}" for name in names]] for record in records[4::5]]
    return markdown(lines, texts=0)


def warnings(logs: dict[str, Any]) -> str:
    said = [
        f"- {name}, seed {seed}, step {record['step']}: {record['message']}"
        for name, of_seeds in logs.items()
        for seed, log in enumerate(of_seeds)
        for record in log
        if record["event"] == "warning"
    ]
    return "\n".join(said) or "No warnings."


if __name__ == "__main__":
    sys.exit(kept.main(__doc__, measure=measure, table=table))
