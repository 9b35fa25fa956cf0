"""Figures of a result, of its JSON alone:

python -m bench.plot bench/results/<machine>-<date>.json --into FOLDER [--only "softmax_kl forward_kl; both, float32"]

An SVG and a PNG of each operation: a case a row; a point an implementation, with a line from the lower to the upper
quartile of its rounds, or over all where they are few; time, as a multiple of eager's beside it where the file has
eager, peak memory and, where the file has it, the share of the machine's roof side by side. Beside a row stands
fastdistill's number over the least of the others', in red where it is above 1. `--only` picks rows as
`bench.rows.chosen` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.rows import OTHERS, OURS, Case, Row, chosen, machine_line, read, rows

STYLES = {
    name: {"color": colour, "marker": marker}
    for name, colour, marker in zip(
        (OURS, *OTHERS),
        ("tab:blue", "dimgray", "tab:orange", "tab:green", "tab:purple", "tab:brown"),
        "osD^vP",
        strict=True,
    )
}
FURTHER = {"color": "tab:olive", "marker": "X"}
LOG_FROM = 8
"""A ratio of the largest value to the smallest."""

# Inches.
POINT, GAP, PANEL, MARGIN = 0.13, 0.14, 4.2, 0.85


class Measure(NamedTuple):
    """What a panel shows: value with lower and upper end, or none of them."""

    label: str
    of: Callable[[Row], tuple[float, float, float] | None]
    is_cost: bool = True


def single(value: float | None) -> tuple[float, float, float] | None:
    return None if value is None else (value, value, value)


def times_eager(row: Row) -> tuple[float, float, float] | None:
    return row.of_eager and (row.of_eager.median, *row.of_eager.ends)


def milliseconds(row: Row) -> tuple[float, float, float]:
    low, high = row.seconds.ends
    return 1e3 * row.seconds.median, 1e3 * low, 1e3 * high


TIMES_EAGER = Measure("times eager's time, median and spread", times_eager)
MILLISECONDS = Measure("ms, median and spread", milliseconds)
MEASURES = (
    TIMES_EAGER,
    MILLISECONDS,
    Measure("peak MB above inputs", lambda row: single(row.peak_mb)),
    Measure("% of the roof", lambda row: single(row.of_roof and 100 * row.of_roof), is_cost=False),
)


def draw(found: Sequence[Row], title: str, path: Path, source: str) -> None:
    """Operations from top to bottom, measures from left to right; `source` is kept in the file."""
    operations = list(dict.fromkeys(row.case.operation for row in found))
    names = sorted({row.implementation for row in found}, key=rank)
    measures = [measure for measure in MEASURES if any(measure.of(row) for row in found)]
    if TIMES_EAGER in measures:
        measures.remove(MILLISECONDS)
    heights = [
        len({row.case for row in found if row.case.operation == operation}) * (len(names) * POINT + GAP)
        for operation in operations
    ]
    size = len(measures) * PANEL + 1.5, sum(heights) + MARGIN * len(operations) + 0.6
    with matplotlib.rc_context({"svg.hashsalt": "fastdistill"}):  # otherwise its ids are random
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(operations), len(measures), squeeze=False, height_ratios=heights)
        for line, operation in zip(panels, operations, strict=True):
            of_operation = [row for row in found if row.case.operation == operation]
            heading, labels = label_cases(list(dict.fromkeys(row.case for row in of_operation)))
            line[0].set_title(heading, loc="left", fontsize=10, fontweight="bold")
            for panel, measure in zip(line, measures, strict=True):
                fill(panel, of_operation, measure, labels, names)
            for panel in line[1:]:
                panel.set_yticklabels([])
        handles = [Line2D([], [], linestyle="", label=name, **style(name)) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
        figure.suptitle(title, fontsize=11)
        extra: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=130, metadata={"Source": source, **extra})


def rank(implementation: str) -> tuple[int, str]:
    names, by = list(STYLES), implementation.split(",")[0]
    return names.index(by) if by in names else len(names), implementation


def style(implementation: str) -> dict[str, Any]:
    """Hollow for another form of a named one."""
    by, *form = implementation.split(",")
    look = STYLES.get(by, FURTHER)
    return {"markersize": 6, "markerfacecolor": "white" if form else look["color"], **look}


def label_cases(cases: Sequence[Case]) -> tuple[str, dict[Case, str]]:
    """What the cases of an operation have in common, and what is each one's own."""
    fields = list(zip(*cases, strict=True))
    common = [values[0] for values in fields if len(set(values)) == 1 and values[0]]
    own = [values for values in fields if len(set(values)) > 1]
    labels = [", ".join(part for part in parts if part) for parts in zip(*own, strict=True)] if own else [""]
    return ", ".join(common), dict(zip(cases, labels, strict=True))


def fill(panel: Axes, found: Sequence[Row], measure: Measure, labels: dict[Case, str], names: Sequence[str]) -> None:
    step = POINT / (len(names) * POINT + GAP)
    places = {case: place for place, case in enumerate(labels)}
    values = {(row.case, row.implementation): measured for row in found if (measured := measure.of(row))}
    for case, place in places.items():
        if place % 2:
            panel.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.04, linewidth=0)
        if measure.is_cost:
            compare(panel, place, {name: values[case, name][0] for name in names if (case, name) in values})
    for (case, name), (middle, low, high) in values.items():
        y = places[case] + (names.index(name) - (len(names) - 1) / 2) * step
        on_top = {"zorder": 4 if name == OURS else 3, "clip_on": False}
        panel.plot([low, high], [y, y], color=style(name)["color"], linewidth=2, **on_top)
        panel.plot(middle, y, **style(name), **on_top)
    panel.set_yticks(list(places.values()), list(labels.values()), fontsize=9)
    panel.set_ylim(len(places) - 0.5, -0.5)
    panel.set_xlabel(measure.label, fontsize=9)
    scale(panel, [value for measured in values.values() for value in measured], is_cost=measure.is_cost)
    panel.tick_params(axis="x", labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", alpha=0.3)


def compare(panel: Axes, place: int, values: dict[str, float]) -> None:
    """fastdistill's number over the least of the others'."""
    others = [value for name, value in values.items() if name.split(",")[0] != OURS]
    if OURS not in values or not others or min(others) <= 0:
        return
    ratio = f"{values[OURS] / min(others):.2f}"
    loses = float(ratio) > 1
    look: dict[str, Any] = {"color": "tab:red", "fontweight": "bold"} if loses else {"color": STYLES[OURS]["color"]}
    panel.text(1.015, place, ratio, transform=panel.get_yaxis_transform(), va="center", fontsize=9, **look)


def scale(panel: Axes, values: Sequence[float], *, is_cost: bool) -> None:
    """Logarithmic for costs that lie far apart, and else from 0."""
    if not values:
        return
    if not is_cost or min(values) <= 0 or max(values) / min(values) < LOG_FROM:
        panel.set_xlim(0, 1.08 * max(values) or 1)
    else:
        panel.set_xscale("log")
        panel.set_xlim(min(values) / 1.3, 1.3 * max(values))
        far = max(values) / min(values) > 300
        panel.xaxis.set_major_locator(LogLocator(subs=(1,) if far else (1, 2, 5)))
        panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def title(result: dict[str, Any]) -> str:
    return f"{machine_line(result)}\nbeside a row: {OURS} / the best other, red where it loses"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=(__doc__ or "").split("\n\n")[2])
    parser.add_argument("result", type=Path)
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="WORDS")
    given = parser.parse_args()
    try:
        result = read(given.result)
        found = chosen(rows(result), given.only)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    given.into.mkdir(parents=True, exist_ok=True)
    for operation in dict.fromkeys(row.case.operation for row in found):
        for suffix in ("svg", "png"):
            path = given.into / f"{given.result.stem}-{operation}.{suffix}"
            draw([row for row in found if row.case.operation == operation], title(result), path, given.result.name)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
