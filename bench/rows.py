"""What a file of pytest-benchmark says, as rows: one for each case and implementation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

BASELINE, OURS = "eager", "fastdistill"
OTHERS = (BASELINE, "torch.compile", "Liger-Kernel", "TRL", "torchtune")
MEASURED = {"peak_mb", "tokens_per_s", "gb_per_s", "tflop_per_s", "roof", "of_roof", "eager_seconds"}
"""What is not an option of a case."""
FEW_ROUNDS = 8


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


class Spread(NamedTuple):
    """Of the rounds of a measurement; low and high are quartiles."""

    rounds: int
    least: float
    low: float
    median: float
    high: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        low, median, high = quantiles(values, n=4, method="inclusive")
        return Spread(len(values), min(values), low, median, high, max(values))

    @property
    def ends(self) -> tuple[float, float]:
        """Between which a round is expected: quartiles say little of few rounds, of which all count."""
        return (self.least, self.most) if self.rounds < FEW_ROUNDS else (self.low, self.high)

    def over(self, other: Spread) -> Spread:
        """The ratio to what was measured apart, as far to each side as the spreads of both leave it."""
        ratios = [one / another for one, another in zip(self[1:], reversed(other[1:]), strict=True)]
        return Spread(min(self.rounds, other.rounds), *ratios)


class Row(NamedTuple):
    """One implementation at one case."""

    case: Case
    implementation: str
    seconds: Spread
    of_eager: Spread | None
    """Each round's time over that of the round of eager before it; in a file without those, over all of eager's."""
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
    names = [OURS if info["implementation"] in renamed else info["implementation"] for info in infos]
    times = [seconds_of(each["stats"]) for each in result["benchmarks"]]
    eager = {case_of(info): of for info, name, of in zip(infos, names, times, strict=True) if name == BASELINE}
    found = []
    for each, info, name, seconds in zip(result["benchmarks"], infos, names, times, strict=True):
        case, of_eager = case_of(info), None
        if "eager_seconds" in info:
            pairs = zip(each["stats"]["data"], info["eager_seconds"], strict=True)
            of_eager = Spread.of([own / beside for own, beside in pairs])
        elif case in eager:
            of_eager = seconds.over(eager[case])
        measured = (info.get(key) for key in ("peak_mb", "gb_per_s", "tflop_per_s", "of_roof"))
        found.append(Row(case, name, seconds, of_eager, *measured))
    return found


def seconds_of(stats: Mapping[str, Any]) -> Spread:
    spread = {"rounds": 1, **dict.fromkeys(("min", "q1", "q3", "max"), stats["median"]), **stats}
    return Spread(*(spread[key] for key in ("rounds", "min", "q1", "median", "q3", "max")))


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
