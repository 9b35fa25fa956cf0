"""Estimates of memory are near what PyTorch allocates, of small students here; docs/presets.md shows what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import presets
from bench.presets import P100, Case

ROOT = Path(__file__).resolve().parents[1]
KEPT = json.loads((ROOT / "docs" / "presets.json").read_text())


@pytest.mark.parametrize(
    "case",
    [
        Case("gpt2", 128, 4, 512, 4, 64, layerwise_weight=0.5),
        Case("gpt2", 128, 4, 512, 8, 128, gradient_checkpointing=True, packing="documents"),
        Case("llama", 128, 4, 512, 4, 128, grad_accum=2, packing="documents"),
        Case("llama", 128, 6, 4096, 1, 64, gradient_checkpointing=True, layerwise_weight=0.5),
    ],
)
def test_an_estimate_is_within_15_percent(case):
    assert presets.error(presets.compare(case)) == pytest.approx(0, abs=0.15)


def test_the_kept_estimates_are_todays():
    """Those of one device, for the time that they take."""
    assert [row for row in KEPT["presets"] if row["device"] == "P100"] == presets.estimates([P100])


def test_the_kept_measurements_are_of_todays_estimates():
    assert [Case(*[row[name] for name in Case._fields]) for row in KEPT["measured"]] == presets.CASES
    for row in KEPT["measured"]:
        assert presets.error(row) == pytest.approx(0, abs=0.15)


def test_the_page_shows_what_is_kept():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    for part in presets.table(KEPT).split("\n\n"):
        assert part in page
