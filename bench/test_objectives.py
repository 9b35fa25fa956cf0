"""What components add to a step: nothing while they wait, and about what is estimated; the page shows what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import objectives, objectives_run
from bench.presets import Case
from fastdistill.training.config import COMPONENTS, Config
from fastdistill.training.estimate import CPU, estimate

ROOT = Path(__file__).resolve().parents[1]
SMALL = Case("llama", 64, 2, 128, 2, 32)
ALL = {f"{name}_weight": 0.1 for name in COMPONENTS[2:]}


LONG_ROWS: dict[str, dict[str, Any]] = {
    "attention": {"attention_weight": 0.1},
    "attention, mse": {"attention_weight": 0.1, "attention_loss": "mse"},
    "attention_alignment": {"attention_alignment_weight": 0.1},
    "contrastive": {"contrastive_weight": 0.1},
    "all": ALL,
}


@pytest.mark.parametrize("how", LONG_ROWS.values(), ids=LONG_ROWS)
def test_an_estimate_of_long_rows_is_within_15_percent(how):
    """Of a vocabulary so small that components, not the logits, take the most."""
    case = Case("llama", 128, 2, 128, 1, 512)
    config = Config(batch_size=1, seq_len=512, packing="stream", **how)
    estimated = estimate(config, case.model(2), case.model(4), CPU)
    assert estimated.moment == "components"
    assert estimated.peak == pytest.approx(objectives.step_of(how, case).bytes, rel=0.15)


def test_a_component_that_waits_adds_no_byte():
    """To a student of its teacher's width, which needs no projection; the router's own numbers are held."""
    alone = objectives.step_of({}, SMALL).bytes
    for name in COMPONENTS[2:]:
        how = objectives.settings()[f"{name}, waiting"]
        held = 4 * (2 * 64 + 1 + 2 + 1) if name == "routing_feature" else 0
        assert objectives.step_of(how, SMALL).bytes == alone + held, name
        assert objectives.step_of(objectives.settings()[name], SMALL).bytes > alone, name


def test_the_page_shows_what_is_kept():
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    for module, name in ((objectives, "objectives.json"), (objectives_run, "objectives-run.json")):
        for part in module.table(json.loads((ROOT / "docs" / name).read_text())).split("\n\n"):
            assert part in page
