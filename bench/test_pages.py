"""README and docs show the results that are kept: what differs is named, and written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench import pages

ROOT = pages.ROOT
RESULT = "bench/results/intel-r-xeon-r-processor-2026-11-27.json"

README = (ROOT / "README.md").read_text(encoding="utf-8")
OURS = re.findall(r"\| fastdistill \| ([\d.]+) \|", README)[0]
"""The first of fastdistill's times there, in milliseconds."""


@pytest.fixture
def copy(tmp_path) -> Path:
    """Of what the pages are made of and show."""
    for folder in ("docs", "bench/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "kernels").mkdir()
    for name in ("README.md", "kernels/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_pages_and_figures_are_those_of_the_kept_numbers(capsys):
    code = pages.main(["--check"])
    assert (code, capsys.readouterr().out) == (0, "")


def test_the_readme_shows_results_in_marked_parts_alone():
    assert len(pages.PART.findall(README)) == 3
    assert "| eager |" not in pages.PART.sub("", README)


@pytest.mark.parametrize(
    ("page", "old", "new", "named"),
    [
        ("README.md", f"| {OURS} |", f"| {OURS}1 |", f"README.md: <!-- {RESULT}: linear_softmax_kl"),
        ("README.md", "- seed 1: -0.208", "- seed 1: -0.308", "README.md: <!-- docs/runs/demo/report.md: seed 0 -->"),
        ("docs/memory.md", "| 627 |", "| 62 |", "docs/memory.md: docs/memory-law.json: | tokens |"),
        ("docs/attention.md", "| 15.0 |", "| 5.0 |", "docs/attention.md: docs/attention.json: | B |"),
        ("docs/layerwise.md", "| 12,243 |", "| 2,243 |", "docs/layerwise.md: docs/layerwise.json: | student |"),
        ("docs/objectives.md", "| 1.72 |", "| 0.72 |", "docs/objectives.md: docs/objectives.json: | component |"),
        (
            "docs/objectives.md",
            "| +0.017 |",
            "| -0.017 |",
            "docs/objectives.md: docs/objectives-run.json: | held-out loss",
        ),
        ("docs/presets.md", "| 8.1e16 |", "| 8.1e15 |", "docs/presets.md: docs/presets.json: | preset |"),
        ("kernels/README.md", "| 7.2 / 8.6;", "| 7.1 / 8.6;", "kernels/README.md: docs/compile-check.json: | form |"),
    ],
)
def test_another_number_on_a_page_is_named_and_mended(copy, capsys, page, old, new, named):
    change(copy / page, old, new)
    assert pages.main(["--check"], copy) == 1
    said = capsys.readouterr().out
    assert said.startswith(named)
    assert len(said.splitlines()) == 1
    assert pages.main([], copy) == 0
    assert (copy / page).read_bytes() == (ROOT / page).read_bytes()


def test_another_number_in_a_result_changes_table_and_figure(copy, capsys):
    result = json.loads((copy / RESULT).read_text())
    (one,) = (each for each in result["benchmarks"] if f"{1e3 * each['stats']['median']:.1f}" == OURS)
    one["stats"]["median"] = 4.0
    (copy / RESULT).write_text(json.dumps(result))
    assert pages.main(["--check"], copy) == 1
    table, page, figure = capsys.readouterr().out.splitlines()
    assert table.startswith(f"README.md: <!-- {RESULT}: linear")
    assert page.startswith(f"docs/performance.md: <!-- {RESULT}: linear")
    assert "docs/bench/intel-r-xeon-r-processor-2026-11-27.svg is not of" in figure
    assert pages.main([], copy) == 0
    assert "| fastdistill | 4000.0 |" in (copy / "README.md").read_text(encoding="utf-8")
    assert pages.main(["--check"], copy) == 0


@pytest.mark.parametrize(
    ("page", "image"),
    [("attention", "attention.png"), ("layerwise", "layerwise.png"), ("memory", "memory-law.png")],
)
def test_a_figure_of_other_numbers_is_named_and_drawn(copy, capsys, page, image):
    source = next(tied.kept for tied in pages.TIED if tied.image == f"docs/{image}")
    (copy / "docs" / image).write_bytes(b"another")
    assert pages.main(["--check"], copy) == 1
    assert capsys.readouterr().out.startswith(f"docs/{page}.md: docs/{image} is not of {source}")
    assert pages.main([], copy) == 0
    assert pages.main(["--check"], copy) == 0


def test_sentences_are_left_to_the_author(copy, capsys):
    change(copy / "docs" / "memory.md", "more than 25.0%", "more than 4.0%")
    for arguments in (["--check"], []):
        assert pages.main(arguments, copy) == 1
        said = capsys.readouterr().out
        assert said.startswith("docs/memory.md: of docs/memory-law.json it lacks: No point is more than 25.0%")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("<!-- end -->", "", "a part has no <!-- end -->"),
        (": linear_softmax_kl both", ": linear_kl both", "no result has 'linear_kl both 1.0'"),
        ("report.md: seed 0 -->", "report.md: seed 9 -->", "no row is of 'seed 9'"),
        ("report.md: seed 0 -->", "report.md: Curve -->", "there is no table below a heading 'Curve'"),
        (RESULT + ":", "bench/results/none.json:", "No such file"),
    ],
)
def test_marks_that_lead_nowhere_are_named(copy, capsys, old, new, says):
    change(copy / "README.md", old, new)
    assert pages.main([], copy) == 1
    assert says in capsys.readouterr().out
