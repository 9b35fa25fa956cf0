"""What is expected of a run, when it is announced, and when it is missed."""

from __future__ import annotations

import json
import math

import pytest

from fastdistill.training.evaluate import Evaluation
from fastdistill.training.monitor import Monitor
from fastdistill.training.trajectory import AT_MOST_LEFT, Trajectory

TEACHER = Evaluation(loss=3.0, tokens=100)


def of_loss(loss: float) -> Evaluation:
    return Evaluation(loss=loss, tokens=100)


@pytest.fixture
def monitor(tmp_path, capfd):
    """That of a student of 100 steps."""

    def make(state=None, step=0, teacher=TEACHER):
        return Monitor(tmp_path, "distilled 0", {"kd": 1.0}, 100, step, state, teacher=teacher)

    return make


def test_the_band_goes_from_the_untrained_student_to_half_of_the_way():
    expected = Trajectory.of(of_loss(7.0), TEACHER)
    assert expected
    assert [expected.upper(share) for share in AT_MOST_LEFT] == pytest.approx([7.0, 6.6, 6.0, 5.4, 5.0])
    assert expected.upper(0.75) == pytest.approx(5.2)  # half-way between the last two
    assert expected.upper(0.05) == pytest.approx(6.8)


@pytest.mark.parametrize(
    ("untrained", "teacher"), [(3.0, 3.0), (2.0, 3.0), (math.inf, 3.0), (math.nan, 3.0), (3.0, math.nan)]
)
def test_nothing_is_expected_where_there_is_no_way_to_go(untrained, teacher):
    assert Trajectory.of(of_loss(untrained), of_loss(teacher)) is None


def test_with_two_tokenizers_it_is_in_bits_per_byte():
    untrained, teacher = (Evaluation(loss, 100, bits_per_byte=bits) for loss, bits in ((2.0, 1.5), (5.0, 0.5)))
    expected = Trajectory.of(untrained, teacher)
    assert expected
    assert expected.upper(1.0) == pytest.approx(1.0)
    assert "bits per byte, from 1.500" in expected.describe()


def test_it_is_announced_with_the_first_evaluation_alone(monitor, capfd):
    with monitor() as of_run:
        of_run.evaluation(0, of_loss(7.0))
        said = capfd.readouterr().out
        assert "[Expected] held-out nats a token, from 7.000, the untrained student's, towards 3.000" in said
        assert "at most 6.600 at 10% of the steps, 6.000 at 25% of the steps, 5.400 at 50%" in said
        of_run.evaluation(25, of_loss(6.0))
        assert "Expected" not in capfd.readouterr().out


def test_what_is_above_the_band_is_warned_of_once_in_a_run_that_was_resumed_too(monitor, tmp_path):
    with monitor() as of_run:
        of_run.evaluation(0, of_loss(7.0))
        of_run.evaluation(25, of_loss(6.0))
        state = json.loads(json.dumps(of_run.state()))
    with monitor(state, step=25) as of_run:
        of_run.evaluation(50, of_loss(5.41))
        of_run.evaluation(75, of_loss(5.3))
    warnings = [
        r for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if r["event"] == "warning"
    ]
    assert [(warning["step"], warning["message"]) for warning in warnings] == [
        (50, "held-out 5.410 nats a token is above 5.400, the most expected here")
    ]


def test_a_loss_that_is_no_number_is_above_the_band(monitor, tmp_path):
    with monitor() as of_run:
        of_run.evaluation(0, of_loss(7.0))
        of_run.evaluation(25, of_loss(math.nan))
    assert "held-out nan nats a token is above 6.000" in (tmp_path / "log.jsonl").read_text()


def test_a_model_without_a_teacher_has_no_band(monitor, capfd):
    with monitor(teacher=None) as of_run:
        of_run.evaluation(0, of_loss(7.0))
        of_run.evaluation(25, of_loss(6.99))
    said = capfd.readouterr().out
    assert "Expected" not in said
    assert "Warning" not in said
