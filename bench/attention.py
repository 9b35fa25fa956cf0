"""attention_kl beside what makes the maps: memory and time by length (docs/attention.md):

python -m bench.attention measure docs/attention.json
python -m bench.attention draw docs/attention.json docs/attention.png
python -m bench.attention table docs/attention.json

Forward and backward to the student's queries and keys, on the CPU in float32, causal, every token counted. A peak is
that of a process of its own, beyond the inputs, of a call after the first: what the first loads or compiles is not in
it. Times are of rounds in which the implementations take turns, and ratios are of times of one round. `measure` takes
minutes and 5 GB.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bench import kept
from bench.machine import machine
from bench.table import markdown
from fastdistill import attention_kl, reference
from fastdistill.testing import differentiate, peak_memory, random_attention

FLOAT32 = 4
MB = 1e6


class Case(NamedTuple):
    """Sizes of one call; the teacher's are the student's."""

    batch: int
    heads: int
    key_heads: int
    positions: int
    width: int = 64


LONG = [Case(1, 9, 3, positions) for positions in (256, 1024, 2048, 4096, 8192)]
"""One row, of heads as SmolLM2-135M has them."""

SHORT = [Case(8, 12, 12, positions) for positions in (128, 512)]
"""A batch of the rows at which small models are trained."""

MAPS, COMPILED, OURS = IMPLEMENTATIONS = ("maps", "torch.compile", "attention_kl")

UP_TO = {MAPS: 4096, COMPILED: 8192, OURS: 8192}
"""Positions at which each is measured. Eager, 4,096 take 3.1 GB and so 8,192 four times that, 12 GB, which a machine of
24 GB does not have to spare beside other work; compiled, 8,192 take 5 GB."""


def rounds(case: Case) -> int:
    """More of short calls, whose times scatter more."""
    return 21 if case.positions <= 1024 else 7


@cache
def function(implementation: str) -> Callable[..., Any]:
    if implementation == COMPILED:
        return torch.compile(reference.attention_kl, dynamic=False, fullgraph=True)
    return reference.attention_kl if implementation == MAPS else partial(attention_kl, impl="torch")


def step(implementation: str, inputs: dict[str, Any]) -> list[Tensor]:
    return differentiate(function(implementation), inputs, ("student_q", "student_k"))[1]


def inputs_of(case: Case) -> dict[str, Any]:
    batch, heads, key_heads, positions, width = case
    return random_attention(
        batch, heads, positions, width, key_heads=key_heads, teacher_key_heads=key_heads, device="cpu"
    )


def make(implementation: str, case: Case) -> dict[str, Any]:
    """Inputs, after a call on them: what is loaded or compiled once is not the step's."""
    inputs = inputs_of(case)
    step(implementation, inputs)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what that call freed is not there for the next
    return inputs


def peak(implementation: str, case: Case) -> int:
    """Bytes."""
    return peak_memory(partial(make, implementation, case), partial(step, implementation))


def times(implementations: Sequence[str], case: Case, rounds: int) -> dict[str, list[float]]:
    """Milliseconds, a number a round."""
    torch.compiler.reset()  # which forgets other sizes: past a few it would refuse to compile more
    inputs = inputs_of(case)
    found: dict[str, list[float]] = {name: [] for name in implementations}
    for name in implementations:
        step(name, inputs)
    for _ in range(rounds):
        for name in implementations:
            start = time.perf_counter()
            step(name, inputs)
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def measure() -> dict[str, Any]:
    results = []
    for case in LONG + SHORT:
        names = [name for name in IMPLEMENTATIONS if case.positions <= UP_TO[name]]
        peaks = {name: peak(name, case) for name in names}
        ms = times(names, case, rounds(case))
        for name in names:
            results.append({"implementation": name, **case._asdict(), "peak_bytes": peaks[name], "ms": ms[name]})
            print(case, name, f"{peaks[name] / MB:,.1f} MB, {median(ms[name]):,.1f} ms", flush=True)
    return {"machine": machine(), "results": results}


def by_case(results: dict[str, Any]) -> dict[Case, dict[str, Any]]:
    """What was measured of each case, by implementation."""
    found: dict[Case, dict[str, Any]] = {}
    for each in results["results"]:
        case = Case(**{name: each[name] for name in Case._fields})
        found.setdefault(case, {})[each["implementation"]] = each
    return found


def quartiles(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, median and upper quartile of the ratios of times that were taken in turn."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    quarter = len(ratios) // 4
    return ratios[quarter], median(ratios), ratios[-1 - quarter]


def verdict(measured: dict[str, Any]) -> str:
    """Where attention_kl takes longer or less time than each other; even where 1 lies within the quartiles."""
    found = []
    for name in (each for each in (MAPS, COMPILED) if each in measured):
        lower, _, upper = quartiles(measured[OURS]["ms"], measured[name]["ms"])
        found.append(f"{'slower than' if lower > 1 else 'faster than' if upper < 1 else 'even with'} {name}")
    return ", ".join(found)


def table(results: dict[str, Any]) -> str:
    """Markdown: the tables of docs/attention.md, in its order, with empty lines between them."""
    here, cases = results["machine"], by_case(results)
    return "\n\n".join(
        (
            f"{here['cpu']}, CPU threads: {here['threads']}, torch {here['torch']}.",
            memory_table({case: cases[case] for case in LONG + SHORT}),
            growth(cases),
            time_table({case: cases[case] for case in LONG + SHORT}),
            losses({case: cases[case] for case in LONG + SHORT}),
        )
    )


def sizes(case: Case) -> list[str]:
    return [str(case.batch), f"{case.heads}, {case.key_heads}", f"{case.positions:,}"]


SIZES = ["B", "heads, of keys", "S"]


def memory_table(cases: dict[Case, dict[str, Any]]) -> str:
    """Peaks in MB, beside the bytes of a map and of what `attention_kl` saves for the gradient."""
    lines = [[*SIZES, "a map, MB", *(f"{name}, MB" for name in IMPLEMENTATIONS), "4 numbers a query and head, MB"]]
    for case, measured in cases.items():
        rows = FLOAT32 * case.batch * case.heads * case.positions
        peaks = [f"{measured[name]['peak_bytes'] / MB:,.1f}" if name in measured else "" for name in IMPLEMENTATIONS]
        lines.append([*sizes(case), f"{rows * case.positions / MB:,.1f}", *peaks, f"{4 * rows / MB:,.2f}"])
    return markdown(lines, texts=0)


def growth(cases: dict[Case, dict[str, Any]]) -> str:
    """How much more memory the last doubling of the length takes that an implementation was measured at."""
    parts = []
    for name in IMPLEMENTATIONS:
        (half, before), (whole, after) = last_doubling(cases, name)
        parts.append(f"{name} {after / before:.1f} times, from {half:,} to {whole:,}")
    return f"Twice the length takes more memory: {'; '.join(parts)}."


def last_doubling(cases: dict[Case, dict[str, Any]], implementation: str) -> list[tuple[int, int]]:
    """Positions and peak bytes of the two longest rows, the longer of twice the other's length."""
    found = [(case.positions, cases[case][implementation]) for case in LONG if implementation in cases[case]]
    half, whole = ((positions, each["peak_bytes"]) for positions, each in found[-2:])
    assert whole[0] == 2 * half[0]
    return [half, whole]


def time_table(cases: dict[Case, dict[str, Any]]) -> str:
    """Median milliseconds, median ratios with their quartiles, and what follows."""
    heads = [*SIZES, *(f"{name}, ms" for name in IMPLEMENTATIONS)]
    pairs = ((COMPILED, MAPS), (OURS, MAPS), (OURS, COMPILED))
    heads += [f"{ours} / {theirs}" for ours, theirs in pairs]
    lines = [[*heads, "attention_kl is"]]
    for case, measured in cases.items():
        line = [f"{median(measured[name]['ms']):,.1f}" if name in measured else "" for name in IMPLEMENTATIONS]
        for ours, theirs in pairs:
            if theirs in measured:
                lower, middle, upper = quartiles(measured[ours]["ms"], measured[theirs]["ms"])
                line.append(f"{middle:.2f} ({lower:.2f} to {upper:.2f})")
            else:
                line.append("")
        lines.append([*sizes(case), *line, verdict(measured)])
    return markdown(lines, texts=0)


def losses(cases: dict[Case, dict[str, Any]]) -> str:
    """Where attention_kl takes more time, by `verdict`, or memory than another."""
    lines = []
    for name in (MAPS, COMPILED):
        beside = {case: measured for case, measured in cases.items() if name in measured}
        slower = [case for case, measured in beside.items() if f"slower than {name}" in verdict(measured)]
        larger = [case for case, each in beside.items() if each[OURS]["peak_bytes"] > each[name]["peak_bytes"]]
        for found, what in ((slower, "is slower than"), (larger, "holds more than")):
            where = "; ".join(f"B = {case.batch}, S = {case.positions:,}" for case in found)
            lines.append(f"- attention_kl {what} {name}: {where or 'nowhere here'}.")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    cases = by_case(results)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, colour, marker in zip(IMPLEMENTATIONS, ("tab:red", "tab:orange", "tab:blue"), "sdo", strict=True):
        measured = [(case.positions, cases[case][name]) for case in LONG if name in cases[case]]
        x = [positions for positions, _ in measured]
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": name}
        panels[0].plot(x, [each["peak_bytes"] / MB for _, each in measured], **style)
        panels[1].plot(x, [median(each["ms"]) for _, each in measured], **style)
    for panel, label in zip(panels, ("peak beyond the inputs, MB", "forward and backward, ms"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(x := [case.positions for case in LONG], [f"{positions:,}" for positions in x])
        panel.minorticks_off()
        panel.set_xlabel("positions S")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(kept.main(__doc__, measure=measure, table=table, draw=draw))
