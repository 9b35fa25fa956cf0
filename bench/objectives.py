"""What each component of the loss adds to a step, in time and memory (docs/objectives.md):

python -m bench.objectives measure docs/objectives.json
python -m bench.objectives table docs/objectives.json

Measured is the same whole step as for docs/presets.md, on a CPU in float32, with kd and lm alone and with each other
component beside them: counting, and waiting for the curriculum to begin it. `measure` takes minutes.
"""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

import torch

from bench import kept
from bench.machine import machine
from bench.presets import Case
from bench.table import markdown
from fastdistill.training.config import COMPONENTS, Config
from fastdistill.training.measured_step import MeasuredStep, measure_step

CASE = Case("llama", 128, 4, 1024, 4, 128)
ROUNDS = 9
"""Times of a round are compared with each other alone; ratios are medians over rounds."""

ALONE = "kd + lm"
VARIANTS: dict[str, dict[str, Any]] = {
    "attention, mse": {"attention_weight": 0.1, "attention_loss": "mse"},
    "contrastive, texts": {"contrastive_weight": 0.1, "contrastive_negatives": "texts"},
}
"""Beside each component as it is by default."""


def settings() -> dict[str, dict[str, Any]]:
    """What is measured, by its name in the table."""
    found: dict[str, dict[str, Any]] = {ALONE: {}}
    for name in COMPONENTS[2:]:
        weight = {f"{name}_weight": 0.1}
        found |= {name: weight, f"{name}, waiting": {**weight, "curriculum": f"{name}:0.5"}}
    all_of_them = {f"{name}_weight": 0.1 for name in COMPONENTS[2:]}
    balanced = {**all_of_them, "balance": "gradient", "balance_steps": 1}
    return found | VARIANTS | {"all": all_of_them, "all, gradients measured": balanced}


def step_of(how: dict[str, Any], case: Case = CASE) -> MeasuredStep:
    config = Config(batch_size=case.batch_size, seq_len=case.seq_len, packing=case.packing, **how)
    student, teacher = case.model(case.depth), case.model(2 * case.depth)
    return measure_step(config, student, teacher, torch.device("cpu"), at_first="curriculum" in how)


def measure() -> dict[str, Any]:
    bytes_of: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in settings()}
    for number in range(ROUNDS):
        for name, how in settings().items():
            step = step_of(how)
            bytes_of[name] = step.bytes
            seconds[name].append(step.seconds)
        print(f"round {number + 1} of {ROUNDS}", flush=True)
    return {"machine": machine(), "case": CASE._asdict(), "bytes": bytes_of, "seconds": seconds}


def table(results: dict[str, Any]) -> str:
    """Markdown: how many times as long a step is as with kd + lm alone, with quartiles, and how much more it holds."""
    seconds, held = results["seconds"], results["bytes"]
    lines = [["component", "time of a step", "quartiles", "memory of a step, MB", "more"]]
    for name in held:
        ratios = sorted(own / base for own, base in zip(seconds[name], seconds[ALONE], strict=True))
        quarter = len(ratios) // 4
        lines.append(
            [
                name,
                f"{median(ratios):.2f}",
                f"{ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f}",
                f"{held[name] / 1e6:,.1f}",
                f"{(held[name] - held[ALONE]) / 1e6:+,.1f}",
            ]
        )
    return markdown(lines, texts=1)


if __name__ == "__main__":
    sys.exit(kept.main(__doc__, measure=measure, table=table))
