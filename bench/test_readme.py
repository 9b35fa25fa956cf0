"""Every figure in the README, in kernels/README.md and in docs/memory.md stands in a file of the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import compile_table, memory_law
from bench.table import table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_and_comparisons_are_those_of_the_kept_results():
    """A benchmark's table leaves out columns that all of its rows share: its cells are in the table of all."""
    results = sorted((ROOT / "bench" / "results").glob("*.json"))
    reports = sorted((ROOT / "docs" / "runs").glob("*/report.md"))
    texts = [*(table(json.loads(path.read_text())) for path in results), *(path.read_text() for path in reports)]
    kept = [set(line.split(" | ")) for text in texts for line in text.splitlines()]
    figures = [line for line in README.splitlines() if re.match(r"\|.*\d\.\d|- seed", line)]
    assert len(figures) >= 17
    assert [line for line in figures if not any(set(line.split(" | ")) <= cells for cells in kept)] == []


def test_instruction_counts_are_those_of_the_kept_compile_check():
    check = json.loads((ROOT / "docs" / "compile-check.json").read_text(encoding="utf-8"))
    assert {each["arch"] for each in check["results"]} == {60, 61, 70, 75, 80, 86, 89, 90, 100, 120}
    assert [each for each in check["results"] if each["failures"]] == []
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert [each for each in compile_table.OPERATIONS if compile_table.table(check, each) not in page] == []
    assert compile_table.tiles(check) in page


def test_the_memory_law_is_that_of_the_kept_points():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for part in memory_law.table(json.loads((ROOT / "docs" / "memory-law.json").read_text())["results"]).split("\n\n"):
        assert part in page


def test_the_post_mortem_shows_what_was_measured_of_layers():
    page, measured = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("postmortem.md", "layerwise.md"))
    rest = re.sub(r"(?s)```.*?```", "", page)
    figures = re.findall(r"\d+\.\d{3}\b", rest)
    assert len(figures) == 2
    assert all(f"| {figure} |" in measured for figure in figures)


def test_the_quick_start_shows_what_doctor_printed():
    assert (ROOT / "docs" / "doctor.txt").read_text(encoding="utf-8") in (ROOT / "docs" / "quickstart.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "kernels/README.md",
        *(
            f"docs/{name}"
            for name in (
                *(
                    "attention.md",
                    "clean-run.md",
                    "evaluation.md",
                    "how-it-works.md",
                    "kaggle.ipynb",
                    "layerwise.md",
                    "memory.md",
                ),
                *("objectives.md", "performance.md", "postmortem.md", "presets.md", "quickstart.md", "train-step.md"),
            )
        ),
    ],
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
