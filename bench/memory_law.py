"""The memory law of linear_softmax_kl, measured and drawn (docs/memory.md):

python -m bench.memory_law measure docs/memory-law.json
python -m bench.memory_law draw docs/memory-law.json docs/memory-law.png
python -m bench.memory_law table docs/memory-law.json

Each point is the peak, in a process of its own, of a forward and backward pass to hidden states and head on the CPU, in
float32, beyond the inputs: forward KL and cross-entropy, and teacher and student of one width.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bench import kept
from bench.machine import machine
from fastdistill import linear_softmax_kl, reference
from fastdistill.linear_chunks import chunk_and_block
from fastdistill.softmax_kl_torch import RESULTS, block_rows
from fastdistill.testing import differentiate, peak_memory, random_heads, random_targets

FLOAT32 = 4
MB = 1e6


class Point(NamedTuple):
    """Sizes of one call."""

    tokens: int = 2048
    vocab: int = 32000
    width: int = 256
    max_chunk_bytes: int = 64 << 20


SWEEPS: dict[str, tuple[int, ...]] = {
    "tokens": (512, 1024, 2048, 4096, 8192, 16384),
    "vocab": (8192, 16384, 32000, 65536, 128256),
    "width": (64, 256, 512, 1024, 2048),
    "max_chunk_bytes": (16 << 20, 32 << 20, 64 << 20, 128 << 20, 256 << 20),
}
"""One size at a time; the others are those of `Point`."""

EAGER_UP_TO = 4096
"""Tokens of which the eager composition is measured: a few GB."""


def law(point: Point) -> int:
    """Bytes beyond the inputs, at most: gradients, a chunk, and what each token leaves."""
    row, cpu = point.vocab * FLOAT32, torch.device("cpu")
    block = block_rows(point.vocab, torch.float32, cpu)
    tokens, block = chunk_and_block(point.max_chunk_bytes, 2 * row, RESULTS * row, block, cpu)
    states = 3 * point.width * FLOAT32
    chunk = (2 * row + states) * min(point.tokens, tokens) + RESULTS * row * min(point.tokens, block)
    return gradients(point) + chunk + 200 * point.tokens


def step(implementation: str, max_chunk_bytes: int, inputs: dict[str, Any]) -> list[Tensor]:
    fused = partial(linear_softmax_kl, max_chunk_bytes=max_chunk_bytes, impl="torch")
    function = reference.linear_softmax_kl if implementation == "eager" else fused
    return differentiate(function, inputs, ("student_hidden", "student_weight"))[1]


def make(implementation: str, point: Point) -> dict[str, Any]:
    def inputs(tokens: int, vocab: int, width: int) -> dict[str, Any]:
        heads = random_heads(tokens, vocab=vocab, width=width, device="cpu")
        return heads | {"targets": random_targets(tokens, vocab=vocab, device="cpu"), "ce_weight": 1.0}

    step(implementation, 1, inputs(8, 64, 8))  # what is loaded once is not the step's
    return inputs(*point[:3])


def measure() -> list[dict[str, Any]]:
    base = Point()
    results = []
    for size, values in SWEEPS.items():
        for value in values:
            point = base._replace(**{size: value})
            implementations = ["fastdistill", *(["eager"] if size == "tokens" and value <= EAGER_UP_TO else [])]
            for implementation in implementations:
                made, chunk = partial(make, implementation, point), point.max_chunk_bytes
                peak = peak_memory(made, partial(step, implementation, chunk))
                result = {"implementation": implementation, "sweep": size, **point._asdict(), "peak_bytes": peak}
                print(result, f"law {law(point) / MB:.0f} MB", flush=True)
                results.append(result)
    return results


def point_of(result: dict[str, Any]) -> Point:
    return Point(**{name: result[name] for name in Point._fields})


def gradients(point: Point) -> int:
    return FLOAT32 * point.width * (point.tokens + point.vocab)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: the sweep over tokens, and how far above the law a point is at most."""
    lines = [
        "| tokens | eager, MB | fastdistill, MB | the law, MB | gradients alone, MB |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    peaks = {(each["implementation"], point_of(each)): each["peak_bytes"] for each in results}
    ours = {point: peak for (implementation, point), peak in peaks.items() if implementation == "fastdistill"}
    for tokens in SWEEPS["tokens"]:
        point = Point()._replace(tokens=tokens)
        eager = peaks.get(("eager", point))
        cells = ["" if eager is None else f"{eager / MB:,.0f}"]
        cells += [f"{value / MB:,.0f}" for value in (ours[point], law(point), gradients(point))]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    share = max(peak / law(point) - 1 for point, peak in ours.items())
    above = max(peak - law(point) for point, peak in ours.items())
    return "\n".join([*lines, "", f"No point is more than {share:.1%} or {above / MB:.1f} MB above the law"])


def draw(results: list[dict[str, Any]], path: Path) -> None:
    titles = {"tokens": "tokens N", "vocab": "vocabulary V", "width": "width D", "max_chunk_bytes": "chunk, MiB"}
    figure, panels = plt.subplots(1, len(SWEEPS), figsize=(15, 3.8), layout="constrained")
    for panel, size in zip(panels, SWEEPS, strict=True):
        scale = 1 << 20 if size == "max_chunk_bytes" else 1
        for implementation, colour, marker in (("eager", "tab:red", "s"), ("fastdistill", "tab:blue", "o")):
            rows = [each for each in results if (each["sweep"], each["implementation"]) == (size, implementation)]
            if not rows:
                continue
            x = [each[size] / scale for each in rows]
            panel.plot(x, [each["peak_bytes"] / MB for each in rows], marker, color=colour, label=implementation)
            if implementation == "fastdistill":
                points = [point_of(each) for each in rows]
                panel.plot(x, [law(point) / MB for point in points], "-", color=colour, alpha=0.5, label="the law")
                panel.plot(
                    x, [gradients(point) / MB for point in points], ":", color="tab:gray", label="gradients alone"
                )
        panel.set_xscale("log", base=2)
        panel.set_xticks(x := [value / scale for value in SWEEPS[size]], [f"{value:,.0f}" for value in x], rotation=30)
        panel.minorticks_off()
        panel.set_xlabel(titles[size])
        if size == "tokens":  # eager's peaks are beside them
            panel.set_yscale("log")
            panel.set_ylim(10, 10_000)
        else:
            panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("peak beyond the inputs, MB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(
        kept.main(
            __doc__,
            measure=lambda: {"machine": machine(), "results": measure()},
            table=lambda results: table(results["results"]),
            draw=lambda results, path: draw(results["results"], path),
        )
    )
