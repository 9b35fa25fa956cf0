"""What a file of pytest-benchmark says, as rows: one for each case and implementation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASELINE, OURS = "eager", "fastdistill"
OTHERS = (BASELINE, "torch.compile", "Liger-Kernel", "TRL", "torchtune")
MEASURED = {"peak_mb", "tokens_per_s", "gb_per_s", "tflop_per_s", "roof", "of_roof"}
"""What is not an option of a case."""


class Case(NamedTuple):
    """What implementations have in common; empty is what a file does not tell."""

    operation: str
    options: str
    shape: str
    pass_: str = ""
    dtype: str = ""
    valid: str = ""
    """Share of the tokens that count."""

    @property
    def name(self) -> str:
        return f"{self.operation} {self.options}".rstrip()

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.name, *self[2:])))


class Row(NamedTuple):
    """One implementation at one case."""

    case: Case
    implementation: str
    rounds: int
    least: float
    low: float
    median: float
    high: float
    most: float
    """Seconds a round; low and high are quartiles."""
    peak_mb: float | None
    gb_per_s: float | None
    tflop_per_s: float | None
    of_roof: float | None

    @property
    def by(self) -> str:
        """Whose it is: "torchtune" of "torchtune, chunked"."""
        return self.implementation.split(",")[0]

    @property
    def words(self) -> set[str]:
        return set(re.split(r",? ", f"{self.case}, {self.implementation}"))


def read(path: str | Path) -> dict[str, Any]:
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(result, dict) or not {"machine_info", "benchmarks"} <= result.keys():
        raise ValueError(f"{path} is not a file of pytest-benchmark")
    return result


def rows(result: Mapping[str, Any]) -> list[Row]:
    """In the file's order. Where fastdistill's PyTorch path is called "torch" it is read as "fastdistill"; a median
    alone is read as one round.
    """
    infos = [each["extra_info"] for each in result["benchmarks"]]
    renamed = () if OURS in {info["implementation"] for info in infos} else ("torch",)
    found = []
    for info, stats in zip(infos, (each["stats"] for each in result["benchmarks"]), strict=True):
        name = OURS if info["implementation"] in renamed else info["implementation"]
        spread = {"rounds": 1, **dict.fromkeys(("min", "q1", "q3", "max"), stats["median"]), **stats}
        times = (spread[key] for key in ("rounds", "min", "q1", "median", "q3", "max"))
        measured = (info.get(key) for key in ("peak_mb", "gb_per_s", "tflop_per_s", "of_roof"))
        found.append(Row(case_of(info), name, *times, *measured))
    return found


def case_of(info: Mapping[str, Any]) -> Case:
    named = {"operation", "implementation", "shape", "pass", "dtype", "valid"} | MEASURED
    options = [str(value) for name, value in info.items() if name not in named and value is not None]
    shape, valid = " x ".join(map(str, info["shape"])), info.get("valid")
    return Case(
        info["operation"],
        " ".join(options),
        shape,
        info.get("pass", ""),
        info.get("dtype", "").removeprefix("torch."),
        "" if valid is None else f"{valid} valid",
    )


def chosen(found: Sequence[Row], what: str) -> list[Row]:
    """The rows that have all words of one of the groups in `what`, group by group: "layer_loss mse; both, float32".

    A word is of an operation, an option, a size, a pass, a precision or an implementation; rows that have it are left
    out where a minus is before it, as in "forward_kl -ce". All rows where `what` is empty.

    Raises:
        ValueError: of a group that no row has.
    """
    if not what.strip():
        return list(found)
    picked: dict[int, Row] = {}
    for group in what.split(";"):
        words = set(re.split(r"[,\s]+", group.strip()))
        not_in = {word.removeprefix("-") for word in words if word.startswith("-")}
        wanted = {word for word in words if not word.startswith("-")}
        having = {number: row for number, row in enumerate(found) if wanted <= row.words and not not_in & row.words}
        if not having:
            raise ValueError(f"no result has {group.strip()!r}")
        picked |= having
    return list(picked.values())


def machine_line(result: Mapping[str, Any]) -> str:
    machine = result["machine_info"]
    return f"{machine['gpu'] or machine['cpu']}, CPU threads: {machine['threads']}, torch {machine['torch']}"
