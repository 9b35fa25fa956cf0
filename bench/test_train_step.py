"""What is measured is one step; the page on the training step shows what is kept, and says where fastdistill loses."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import pytest
import torch

from bench import presets, train_step
from bench.presets import Case
from bench.train_step import EAGER, LEARNING_RATE, LOOPS, OUR_TRAINER, OURS, TRAINER, Law

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "train-step.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs" / "train-step.json").read_text(encoding="utf-8"))
TINY = Case("gpt2", 64, 2, 97, 3, seq_len=9)


def test_the_tables_are_those_of_the_kept_numbers_in_their_order():
    places = [PAGE.find(part) for part in train_step.table(RESULTS).split("\n\n")]
    assert -1 not in places
    assert places == sorted(places)


def test_figures_in_the_prose_are_kept():
    rest = PAGE
    for part in train_step.table(RESULTS).split("\n\n"):
        rest = rest.replace(part, "")
    rest = re.sub(r"(?s)```.*?```|`[^`]*`|\]\([^)]*\)", "", rest)
    settings = {"1e-4", "0.9", "0.95"}
    figures = re.findall(r"\d[\d,]*(?:[.,]\d+|e-\d+)", rest)
    cells = re.findall(r"\d[\d,]*[.,]\d+", train_step.table(RESULTS))
    assert [figure for figure in figures if figure not in {*settings, *cells}] == []


def test_every_case_was_measured_with_all():
    ms, peaks = (train_step.by_case(RESULTS[name], field) for name, field in (("times", "ms"), ("peaks", "bytes")))
    assert list(ms) == train_step.TIMED
    assert set(peaks) == {*chain(train_step.TIMED, *train_step.LAWS)}
    for each in (*ms.values(), *peaks.values()):
        assert list(each) == list(LOOPS)
    assert {len(rounds) for each in ms.values() for rounds in each.values()} == {train_step.ROUNDS}


def test_kept_memory_is_affine_in_the_rows_and_logits_are_what_fastdistill_leaves_out():
    (_, large), (_, small) = train_step.laws(train_step.by_case(RESULTS["peaks"], "bytes"))
    for law in (*large.values(), *small.values()):
        assert abs(law.error) < 0.01
    assert large[OURS].largest > 2 * large[EAGER].largest
    assert large[OUR_TRAINER].largest > 2 * large[TRAINER].largest


def test_the_kept_estimate_is_todays():
    """Of the first models, for the time that it takes."""
    assert RESULTS["estimated_rows"][0] == train_step.estimated_rows(train_step.LAWS[0][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_take_the_same_steps(dtype):
    """Two from equal weights, since clipping does not change AdamW's first; in float64 to its rounding, in float32
    within a hundredth of a step.
    """
    weights, losses = {}, {}
    for name, loop in LOOPS.items():
        student, teacher = train_step.make_models(TINY, dtype)
        before = {key: value.clone() for key, value in student.state_dict().items()}
        losses[name] = loop(student, teacher, train_step.batch_of(TINY), 2).loss
        weights[name] = {key: value - before[key] for key, value in student.state_dict().items()}
    for name in LOOPS:
        assert losses[name] == pytest.approx(losses[EAGER], abs=1e-6)
        tolerance = LEARNING_RATE * (1e-6 if dtype == torch.float64 else 1e-2)
        torch.testing.assert_close(weights[name], weights[EAGER], rtol=0, atol=tolerance)
    assert max(change.abs().max() for change in weights[EAGER].values()) > LEARNING_RATE


def test_a_measure_has_a_time_a_round_by_phase_and_a_peak():
    ms = train_step.times(TINY, 2)
    assert list(ms) == list(LOOPS)
    for name, rounds in ms.items():
        phases = ["step"] if name in (TRAINER, OUR_TRAINER) else list(train_step.PHASES)
        assert [list(each) for each in rounds] == [phases] * 2
        assert min(train_step.totals(rounds)) > 0
    assert all(train_step.peak(name, TINY) > 0 for name in LOOPS)


def test_fastdistill_s_peak_is_that_of_train_py_s_step():
    case = Case("gpt2", 128, 2, 2000, 4, seq_len=64)
    assert train_step.peak(OURS, case) == pytest.approx(presets.measured_bytes(case), rel=0.01)


def test_a_law_is_through_two_points_and_tried_at_the_third():
    law = Law.of([(4, 2_400_000_000), (8, 2_800_000_000), (16, 4_000_000_000)])
    assert (law.fixed, law.a_row) == (2e9, 1e8)
    assert law.error == pytest.approx(-0.1)
    assert law.largest == 140


def test_a_verdict_needs_the_quartiles_on_one_side():
    assert train_step.verdict([9, 9, 9, 9, 1], [2.0] * 5) == "slower"
    assert train_step.verdict([1, 1, 1, 1, 9], [2.0] * 5) == "faster"
    assert train_step.verdict([1, 1, 1, 9, 9], [2.0] * 5) == "even"


def test_the_kept_numbers_are_drawn(tmp_path):
    train_step.draw(RESULTS, tmp_path / "train-step.png")
    assert (tmp_path / "train-step.png").stat().st_size > 10_000
