"""What the presets need, estimated; and how far such estimates are from what PyTorch allocates (docs/presets.md):

python -m bench.presets measure docs/presets.json
python -m bench.presets table docs/presets.json

Measured is one whole step on a CPU in float32, teacher, student, loss, backward and AdamW with its state in place: the
bytes of all tensors alive at once, as PyTorch's profiler sees them allocated. `measure` takes minutes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from bench import kept
from bench.machine import machine
from bench.table import markdown
from fastdistill.training.config import Config
from fastdistill.training.estimate import CPU, H200, P100, T4, Device, estimate
from fastdistill.training.measured_step import measure_step
from fastdistill.training.preset_shapes import PAIRS, estimate_preset

GPUS = (P100, T4, H200)
HEAD_WIDTH = 64


class Case(NamedTuple):
    """A student, whose teacher is twice as deep, and the settings that memory depends on."""

    family: str
    width: int
    depth: int
    vocab_size: int
    batch_size: int
    seq_len: int
    gradient_checkpointing: bool = False
    grad_accum: int = 1
    layerwise_weight: float = 0.0
    packing: str = "stream"

    def model(self, depth: int) -> PreTrainedConfig:
        common: dict[str, Any] = {"vocab_size": self.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
        heads = self.width // HEAD_WIDTH
        if self.family == "gpt2":  # on a CPU, dropout of attention would keep all scores
            no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
            return GPT2Config(
                n_embd=self.width, n_layer=depth, n_head=heads, n_positions=self.seq_len, **common, **no_dropout
            )
        return LlamaConfig(
            hidden_size=self.width, intermediate_size=self.width * 8 // 3, num_hidden_layers=depth,
            num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), max_position_embeddings=self.seq_len,
            tie_word_embeddings=True, **common,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        names = ("batch_size", "seq_len", "gradient_checkpointing", "grad_accum", "layerwise_weight", "packing")
        return Config(**{name: getattr(self, name) for name in names})


SIZES = ((256, 4, 1024, 4, 256), (256, 4, 32000, 2, 128), (384, 12, 8192, 1, 512), (768, 4, 50257, 1, 128))
"""Width, depth, vocabulary, rows and positions."""

CASES = [
    Case(family, *size, *settings)
    for family, size, settings in product(
        ("gpt2", "llama"),
        SIZES,
        (
            (False, 1, 0.5, "stream"),
            (False, 2, 0.0, "documents"),
            (True, 1, 0.5, "documents"),
            (True, 2, 0.0, "stream"),
        ),
    )
]


def measured_bytes(case: Case) -> int:
    """The most bytes that tensors take during a step, on a CPU."""
    student, teacher = case.model(case.depth), case.model(2 * case.depth)
    return measure_step(case.config, student, teacher, torch.device("cpu")).bytes


def compare(case: Case) -> dict[str, Any]:
    estimated = estimate(case.config, case.model(case.depth), case.model(2 * case.depth), CPU)
    return {
        **case._asdict(),
        "measured_bytes": measured_bytes(case),
        "estimated_bytes": estimated.peak,
        "moment": estimated.moment,
    }


def measure() -> dict[str, Any]:
    results = []
    for case in CASES:
        results.append(compare(case))
        print(results[-1], flush=True)
    return {"machine": machine(), "presets": estimates(), "measured": results}


def estimates(devices: Sequence[Device] = (CPU, *GPUS)) -> list[dict[str, Any]]:
    """Of each preset on each device."""
    return [
        {"preset": name, "device": device.name, **dataclasses.asdict(estimate_preset(name, device))}
        for name, device in product(PAIRS, devices)
    ]


def table(results: dict[str, Any]) -> str:
    """Markdown: memory by part, of the demo on a CPU and of the others on a P100; operations and hours; estimates
    beside what was measured.
    """
    return "\n\n".join([parts_table(results["presets"]), flops_table(results["presets"]), checks(results["measured"])])


def parts_table(rows: list[dict[str, Any]]) -> str:
    shown = [row for row in rows if row["device"] == ("CPU" if row["preset"] == "demo" else P100.name)]
    parts = dict.fromkeys(part for row in shown for part in row["memory"])
    lines = [[row["preset"] for row in shown], [f"{row['device']}, {row['moment']}" for row in shown]]
    lines += [[f"{row['memory'][part] / 1e6:,.0f}" if part in row["memory"] else "" for row in shown] for part in parts]
    lines += [[f"{sum(row['memory'].values()) / 1e6:,.0f}" for row in shown]]
    names = ["MB", "where, and when in a step", *parts, "together"]
    return markdown([[name, *line] for name, line in zip(names, lines, strict=True)], texts=1)


def flops_table(rows: list[dict[str, Any]]) -> str:
    rates = [f"hours at {gpu.seconds(1) ** -1 / 1e12:.1f} TFLOP/s: {gpu.name}" for gpu in GPUS]
    lines = [["preset", "FLOP a step", "FLOP a run", *rates]]
    for row in rows:
        if row["preset"] != "demo" and row["device"] == P100.name:
            flops = [f"{row[key]:.1e}".replace("e+", "e") for key in ("step_flops", "run_flops")]
            lines.append([row["preset"], *flops, *[f"{gpu.seconds(row['run_flops']) / 3600:.2g}" for gpu in GPUS]])
    return markdown(lines, texts=1)


def checks(rows: list[dict[str, Any]]) -> str:
    heads = ["student", "settings", "width", "layers", "vocabulary", "rows", "positions"]
    lines = [[*heads, "measured, MB", "estimated, MB", "off by"]]
    for row in rows:
        settings = ["two micro-batches"] * (row["grad_accum"] == 2) + ["checkpointing"] * row["gradient_checkpointing"]
        settings += ["layerwise"] * bool(row["layerwise_weight"]) + ["documents"] * (row["packing"] == "documents")
        sizes = [f"{row[name]:,}" for name in ("width", "depth", "vocab_size", "batch_size", "seq_len")]
        both = [f"{row[name] / 1e6:,.0f}" for name in ("measured_bytes", "estimated_bytes")]
        lines.append([row["family"], ", ".join(settings), *sizes, *both, f"{error(row):+.1%}"])
    errors = [error(row) for row in rows]
    return f"{markdown(lines, texts=2)}\n\nThe estimates are off by {min(errors):+.1%} to {max(errors):+.1%}"


def error(row: dict[str, Any]) -> float:
    return row["estimated_bytes"] / row["measured_bytes"] - 1


if __name__ == "__main__":
    sys.exit(kept.main(__doc__, measure=measure, table=table))
