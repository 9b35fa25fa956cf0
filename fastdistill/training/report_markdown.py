"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from fastdistill.training.plots import Plot
from fastdistill.training.report_parts import Items, Section, Table


def page(sections: Sequence[Section]) -> str:
    """The whole file; its images lie beside it."""
    blocks = []
    for level, section in zip(("#", *["##"] * len(sections)), sections, strict=False):
        blocks += [f"{level} {section.title}", *(_part(part) for part in section.parts)]
    return "\n\n".join(blocks) + "\n"


def table(content: Table) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [_row(content.columns), f"| --- |{' ---: |' * (len(content.columns) - 1)}"]
    return "\n".join([*lines, *(_row(cells) for cells in content.rows)])


def _part(part: str | Table | Items | Plot) -> str:
    match part:
        case str():
            return _text(part)
        case Table():
            return table(part)
        case Items():
            return "\n".join(f"- {_text(line)}" for line in part.lines)
        case Plot():
            return f"![{part.title}]({part.name}.png)"


def _row(cells: Sequence[str]) -> str:
    shown = [_text(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(shown)} |"


def _text(text: str) -> str:
    """On one line, and with no tag in it: names and messages come from outside."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;") if text else ""
