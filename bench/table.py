"""The Markdown table of a result: python -m bench.table bench/results/<machine>-<date>.json"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from bench.rows import BASELINE, Row, Spread, chosen, machine_line, read, rows

TEXTS: dict[str, Callable[[Row], str]] = {
    "operation": lambda row: row.case.name,
    "shape": lambda row: row.case.shape,
    "dtype": lambda row: row.case.dtype,
    "valid": lambda row: row.case.valid.removesuffix(" valid"),
    "pass": lambda row: row.case.pass_,
    "implementation": lambda row: row.implementation,
}
SAID_ONCE = {"dtype", "valid", "pass"}


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def rate(row: Row) -> str:
    """Of reading and writing, or of arithmetic."""
    if row.gb_per_s is not None:
        return f"{row.gb_per_s:.3g} GB/s"
    return "" if row.tflop_per_s is None else f"{row.tflop_per_s:.3g} TFLOP/s"


def spread(of: Spread | None) -> str:
    return "" if of is None else " to ".join(format(end, ".2f") for end in of.ends)


def table(result: Mapping[str, Any], what: str = "") -> str:
    """Of the rows that `bench.rows.chosen` finds. A column that they leave empty is left out; a precision, share of
    tokens or pass that all have is said above.
    """
    numbers = {
        "ms, median": lambda row: f"{row.seconds.median * 1e3:.1f}",
        f"of {BASELINE}": lambda row: number(row.of_eager and row.of_eager.median, ".2f"),
        "spread": lambda row: spread(row.of_eager),
        "rate": rate,
        "of roof": lambda row: number(row.of_roof, ".2f"),
        "peak MB above inputs": lambda row: number(row.peak_mb, ".0f"),
    }
    picked = chosen(rows(result), what)
    columns = {name: [cell(row) for row in picked] for name, cell in (TEXTS | numbers).items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    common = [name for name in columns if name in SAID_ONCE and len(set(columns[name])) == 1]
    said = [f"{name}: {columns.pop(name)[0]}" for name in common]
    lines = [[*columns], *map(list, zip(*columns.values(), strict=True))]
    timer = result["benchmarks"][0]["options"]["timer"]
    caption = ", ".join([machine_line(result), f"timer: {timer}", *said])
    return f"{caption}\n\n{markdown(lines, texts=sum(name in TEXTS for name in columns))}"


def markdown(lines: list[list[str]], *, texts: int) -> str:
    """A table whose first line is its head; the columns after the first `texts` are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(lines[0]) - texts)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


if __name__ == "__main__":
    print(table(read(sys.argv[1])))
