"""When components begin, how the temperature goes, and that a run does both as it announces."""

from __future__ import annotations

import json
import math

import pytest

from fastdistill.training import objective
from fastdistill.training.config import Config, UsageError
from fastdistill.training.curriculum import Curriculum
from fastdistill.training.schedule import course
from fastdistill.training.teacher import Teacher
from tests.training.conftest import STAGE

ALL = ["kd", "lm", "layerwise", "attention", "attention_alignment", "routing_feature", "load_balance", "contrastive"]
SETTINGS = {
    "layerwise_weight": 0.2, "attention_weight": 0.3, "attention_alignment_weight": 0.3, "curriculum": "founding",
    "temperature": 3.0, "temperature_end": 1.0, "temperature_schedule": "cosine",
}  # fmt: skip


def test_the_founding_curriculum_begins_at_its_shares_of_the_run():
    curriculum = Curriculum("founding", ALL)
    first = {name: next(step for step in range(100) if name in curriculum.active(step, 100)) for name in ALL}
    begins = {"attention": 10, "attention_alignment": 10, "routing_feature": 10, "load_balance": 10}
    assert first == {"kd": 0, "lm": 0, **begins, "layerwise": 40, "contrastive": 70}
    assert all(curriculum.active(step, 100) <= curriculum.active(step + 1, 100) for step in range(99))


@pytest.mark.parametrize(("total", "first"), [(10, 7), (7, 5), (1000, 700), (3, 3)])
def test_a_component_begins_with_the_first_step_at_or_after_its_share(total, first):
    """Of 3 steps 0.7 is never."""
    active = [step for step in range(total) if "contrastive" in Curriculum("founding", ALL).active(step, total)]
    assert active == list(range(first, total))


def test_a_share_of_the_steps_is_as_in_arithmetic():
    """In floating point 0.07 * 100 is above 7."""
    curriculum = Curriculum("layerwise:0.07", ["kd", "layerwise"])
    assert [step for step in range(10) if "layerwise" in curriculum.active(step, 100)] == [7, 8, 9]


def test_steps_are_announced_counted_from_1():
    announced = Curriculum("founding", ["kd", "lm", "layerwise", "attention"]).describe(20)
    assert announced == "from step 1 kd, lm; from step 3 attention; from step 9 layerwise"
    assert Curriculum("layerwise:0.25", ["kd", "layerwise"]).describe(8).endswith("from step 3 layerwise")
    assert Curriculum("none", ALL).describe(20) == ""
    assert Curriculum("founding", ["kd", "lm"]).describe(20) == ""


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("late", "must be none, founding, or parts of the run .* got 'late'"),
        ("layerwise:1.2.3", "must be none, founding, or parts of the run .* got 'layerwise:1.2.3'"),
        ("layerwise:1", r"a component begins in \[0, 1\) of the run, got layerwise at 1"),
        ("layerwis:0.4", "layerwis has no weight: did you mean layerwise?"),
        ("attention:0.4", "attention has no weight"),
        ("kd:0.1,layerwise:0.4", "no component is there from the start, only kd, layerwise"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(rule, message):
    with pytest.raises(UsageError, match=message):
        Curriculum(rule, ["kd", "layerwise"])


def test_a_run_says_so_before_anything_is_trained(run, capsys):
    run(curriculum="attention:0.4", expect=2)
    assert "--curriculum attention:0.4: attention has no weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "values"),
    [("linear", [4.0, 3.25, 2.5, 1.75, 1.0]), ("cosine", [4.0, 1 + 1.5 * (1 + math.cos(math.pi / 4)), 2.5])],
)
def test_a_course_goes_from_its_first_value_to_its_last(shape, values):
    assert [course(i / 4, 4.0, 1.0, shape) for i in range(len(values))] == pytest.approx(values)
    assert course(1.0, 4.0, 1.0, shape) == pytest.approx(1.0)


@pytest.mark.parametrize("how", [{"temperature_end": 1.0}, {"temperature_schedule": "linear"}])
def test_an_end_and_a_schedule_of_the_temperature_go_together(how):
    with pytest.raises(UsageError, match="--temperature-end goes with a --temperature-schedule of linear or cosine"):
        Config(**how)


def test_a_run_switches_at_the_announced_steps(run, records, capsys, monkeypatch):
    """In the log, in what is computed, and in what is asked of the teacher."""
    asked, computed = [], []
    own_call = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, *given: asked.append(given[1:]) or own_call(self, *given))
    own_forward = objective.LayerwiseLoss.forward
    monkeypatch.setattr(
        objective.LayerwiseLoss, "forward", lambda self, *given: computed.append(1) or own_forward(self, *given)
    )
    folder = run(max_steps=10, eval_steps=10, save_steps=10, **SETTINGS)
    announced = "from step 1 kd, lm; from step 2 attention, attention_alignment; from step 5 layerwise"
    assert announced in "".join(capsys.readouterr())
    train = [r for r in records(folder / STAGE / "log.jsonl") if r["event"] == "train"]
    later = ["attention", "attention_alignment"]
    expected = [["kd", "lm"], *[["kd", "lm", *later]] * 3, *[["kd", "lm", "layerwise", *later]] * 6]
    assert [sorted(r["components"]) for r in train] == [sorted(names) for names in expected]
    assert len(computed) == 6
    wanted = [given[0] for given in asked if given]
    assert [bool(w.attention) for w in wanted] == [False, *[True] * 9]
    assert [w.outputs >= {0, 1} or len(w.outputs) == 2 for w in wanted] == [False, *[True] * 9]
    for record in train:
        assert sum(part["share"] for part in record["components"].values()) == pytest.approx(1, abs=1e-5)
        assert sum(part["weighted"] for part in record["components"].values()) == pytest.approx(
            record["total"], rel=1e-5
        )
    temperatures = [r["diagnostics"]["temperature"] for r in train]
    assert temperatures == pytest.approx([1 + (1 + math.cos(math.pi * i / 9)) for i in range(10)], rel=1e-6)


def test_a_line_over_a_switch_has_means_that_fit_each_other(run, records):
    """Of 5 steps in a line a component that began after 3 has the raw mean of 2, and its weight for 2 of 5."""
    how = {"max_steps": 5, "eval_steps": 5, "save_steps": 5, "layerwise_weight": 0.5, "curriculum": "layerwise:0.6"}
    each = [r for r in records(run("each", **how) / STAGE / "log.jsonl") if r["event"] == "train"]
    (line,) = [r for r in records(run("all", log_steps=5, **how) / STAGE / "log.jsonl") if r["event"] == "train"]
    part, single = line["components"]["layerwise"], [r["components"]["layerwise"]["raw"] for r in each[3:]]
    assert len(single) == 2
    assert part["raw"] == pytest.approx(sum(single) / 2)
    assert part["weight"] == pytest.approx(0.5 * 2 / 5, rel=1e-6)
    assert part["weighted"] == pytest.approx(part["raw"] * part["weight"], rel=1e-6)
    assert sum(p["weighted"] for p in line["components"].values()) == pytest.approx(line["total"], rel=1e-5)


@pytest.mark.parametrize("how", [{}, {"balance": "magnitude"}, {"balance": "gradient", "balance_steps": 3}], ids=str)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_that_was_stopped_goes_on_exactly(run, assert_same_run, stop, how):
    """Before a switch and after it, not at a measurement of gradients."""
    flags = {"max_steps": 10, "eval_steps": 5, "save_steps": 10, **SETTINGS, **how}
    whole = run("whole", **flags)
    run("stopped", stop_at=stop, **flags)
    assert_same_run(run("stopped", resume=True), whole)


def test_evaluation_is_affected_by_none_of_them(run, records):
    def first(name: str, **how: object) -> dict:
        log = records(run(name, max_steps=2, **how) / STAGE / "log.jsonl")
        return next(r for r in log if r["event"] == "eval")

    assert first("plain", layerwise_weight=0.0) == first("all", **{**SETTINGS, "balance": "gradient"})


def test_the_report_of_such_a_run_tells_its_recipe(run):
    folder = run(max_steps=4, log_steps=1, **SETTINGS, balance="magnitude")
    recipe = next(line for line in (folder / "report.md").read_text().splitlines() if line.startswith("Recipe:"))
    for part in (
        "(T 3 to 1, cosine, forward_kl)",
        "0.3 attention (kl)",
        "0.3 attention_alignment",
        "curriculum founding",
    ):
        assert part in recipe
    assert "balanced by magnitude" in recipe
    settings = json.loads((folder / "config.json").read_text())
    assert settings["curriculum"] == "founding"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"contrastive_weight": 1, "contrastive_negatives": "texts", "batch_size": 1}, "--contrastive-negatives texts"),
        ({"routing_feature_weight": 1, "routing_over": "experts"}, "--routing-over experts"),
        ({"attention_weight": 1, "head_map": "0:9"}, "--head-map 0:9"),
    ],
)
def test_a_loss_that_cannot_be_had_is_refused_before_the_baseline_is_trained(run, tmp_path, capsys, how, message):
    run(baseline=True, expect=2, **how)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run/seed-*"))
