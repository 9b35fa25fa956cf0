"""train.py as a whole: what a step is, what the log says, how it stops, goes on, and refuses to lie."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastdistill.training import engine
from fastdistill.training.loading import load
from fastdistill.training.objective import DistillationModule
from fastdistill.training.student import build_student, kept_layers
from fastdistill.training.walk import ShuffledWalk

ROOT = Path(__file__).resolve().parents[2]
STAGE = Path("seed-0/distilled")


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / STAGE / "last" / "model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))


def test_accumulation_is_the_same_step_cut_in_pieces(run, records, smooth_teacher):
    # AdamW magnifies rounding where a gradient is near 0: few steps keep that far below the movement.
    flags = {"teacher": smooth_teacher, "max_steps": 3}
    whole = run("whole", batch_size=24, grad_accum=1, **flags)
    teacher = load(str(smooth_teacher))[0]
    untrained = build_student(teacher, kept_layers("every-other", 4)).state_dict()
    moved = distance(weights(whole), untrained)
    assert moved > 0.1
    for batch_size, grad_accum in ((12, 2), (8, 3), (6, 4), (3, 8)):
        cut = run(f"cut-{grad_accum}", batch_size=batch_size, grad_accum=grad_accum, **flags)
        assert json.loads((cut / STAGE / "result.json").read_text())["steps"] == 3
        assert distance(weights(cut), weights(whole)) < 1e-3 * moved
        for a, b in zip(records(whole / STAGE / "log.jsonl"), records(cut / STAGE / "log.jsonl"), strict=True):
            assert (a["event"], a["step"]) == (b["event"], b["step"])
            if a["event"] == "train":
                assert b["total"] == pytest.approx(a["total"], rel=1e-4)


def test_each_window_is_the_next_samples_of_the_text_and_all_of_them_are_read(run, train_py, monkeypatch):
    take, collate, windows = ShuffledWalk.take, train_py.collate, []

    def taken(walk, start, count):
        blocks = take(walk, start, count)
        windows.append((start, [block[0].ids.tolist() for block in blocks], []))
        return blocks

    def collated(blocks, *args, **keywords):
        windows[-1][2].extend(block[0].ids.tolist() for block in blocks)
        return collate(blocks, *args, **keywords)

    monkeypatch.setattr(ShuffledWalk, "take", taken)
    monkeypatch.setattr(train_py, "collate", collated)
    run(batch_size=2, grad_accum=3, stop_at=4, eval_steps=50, packing="padded")
    run(resume=True)
    windows = [window for window in windows if len(window[1]) == 6]  # others are the sample that layers are chosen on
    assert [start for start, _, _ in windows] == [0, 6, 12, 18, 24, 30]
    for _, drawn, read in windows:
        assert sorted(read) == sorted(drawn)
        assert [len(ids) for ids in read] == sorted(len(ids) for ids in drawn)  # rows of like length go together


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_a_resumed_run_is_the_run_that_never_stopped(run, assert_same_run, stop_at):
    # Checkpoints and log lines fall on steps 2, 4 and 6: 1, 3 and 5 lie between them.
    whole = run("whole", log_steps=2)
    stopped = run("stopped", log_steps=2, stop_at=stop_at)
    assert max((stopped / STAGE / "checkpoints").iterdir()).name == f"step-{stop_at:08d}"
    assert not (stopped / "student").exists()
    assert_same_run(run("stopped", resume=True), whole)


def test_a_resumed_run_has_the_student_that_it_began_with(run, monkeypatch):
    flags = {"student_layers": "importance:2", "max_steps": 4}
    whole = run("whole", **flags)
    layers = json.loads((whole / "student_layers.json").read_text())
    assert len(layers) == 2
    run("stopped", stop_at=2, **flags)

    def measure(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("fastdistill.training.student.layer_importance", measure)
    stopped = run("stopped", resume=True)
    assert json.loads((stopped / "student_layers.json").read_text()) == layers
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(stopped).items())


@pytest.fixture(scope="module")
def narrow_student(tmp_path_factory, teacher_folder) -> Path:
    """A student that is not made of the teacher: three blocks, half as wide, with the teacher's tokenizer."""
    path = tmp_path_factory.mktemp("models") / "narrow"
    config = AutoConfig.from_pretrained(teacher_folder)
    config.update({"n_embd": 16, "n_layer": 3})
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(path)
    return path


@pytest.mark.parametrize("projection", ["learned", "fixed"])
def test_a_student_of_another_width_trains_goes_on_and_is_exported_bare(
    run, assert_same_run, narrow_student, projection, capsys
):
    flags = {"student": narrow_student, "projection": projection, "max_steps": 4}
    whole = run("whole", **flags)
    assert (
        f"layers compared (uniform), states of width 16, projected to 32 ({projection}):\n"
        "  teacher  0  1  2  3\n"
        "  student  .  0  1  2\n"
    ) in capsys.readouterr().out
    run("stopped", stop_at=3, **flags)
    stopped = run("stopped", resume=True)
    assert_same_run(stopped, whole)
    first, last = ("step-00000003", "step-00000004")
    saved = [
        {name: tensor for name, tensor in load_file(path).items() if "projection" in name}
        for path in (
            stopped / STAGE / "checkpoints" / first / "model.safetensors",
            stopped / STAGE / "checkpoints" / last / "model.safetensors",
            whole / STAGE / "checkpoints" / last / "model.safetensors",
        )
    ]
    assert [tuple(tensor.shape) for tensor in saved[0].values()] == [(32, 16)] * 3
    for name, tensor in saved[0].items():
        assert torch.equal(saved[1][name], saved[2][name])
        assert torch.equal(tensor, saved[1][name]) == torch.equal(tensor, torch.eye(32, 16)) == (projection == "fixed")
    assert "+ 0.5 layerwise (layer_norm)" in (stopped / "report.md").read_text()
    untrained = load_file(narrow_student / "model.safetensors")
    for folder in (stopped / "student", stopped / STAGE / "best-00000004", stopped / STAGE / "last"):
        assert load_file(folder / "model.safetensors").keys() == untrained.keys()


@pytest.mark.parametrize("packing", ["stream", "padded"])
def test_other_packings_train_and_go_on(run, packing):
    flags = {"packing": packing, "max_steps": 4, "grad_accum": 2}
    whole = run("whole", **flags)
    run("stopped", stop_at=2, **flags)
    stopped = run("stopped", resume=True)
    assert (whole / STAGE / "result.json").read_text() == (stopped / STAGE / "result.json").read_text()


def test_a_stream_trains_and_goes_on(run, tmp_path, monkeypatch):
    rows = [{"text": f"the student {'reads the next token of ' * (i % 7 + 1)} {i}"} for i in range(400)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("fastdistill.training.data.PORTION_CHARACTERS", 2000)
    flags = {"data": tmp_path / "rows.jsonl", "streaming": True, "max_steps": 30, "eval_steps": 30, "save_steps": 30}
    whole = run("whole", **flags)
    run("stopped", stop_at=17, **flags)
    state = json.loads((max((tmp_path / "stopped" / STAGE / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["walk"]["number"] > 0  # past the first portion
    stopped = run("stopped", resume=True)
    assert (whole / STAGE / "result.json").read_text() == (stopped / STAGE / "result.json").read_text()


def test_a_finished_run_resumes_to_the_same_report(run):
    folder = run()
    report = (folder / "report.md").read_text().split("Recipe")[0]
    (folder / "report.md").unlink()
    run(resume=True)
    assert (folder / "report.md").read_text().split("Recipe")[0] == report


def test_the_log_is_in_the_founding_format(run, capfd, records):
    folder = run(detail_steps=2, log_steps=1)
    out = "".join(capfd.readouterr())
    log = records(folder / STAGE / "log.jsonl")
    detailed = [r for r in log if r["event"] == "train" and r["step"] % 2 == 0]
    assert len(detailed) == 3
    for record in detailed:
        parts = sorted(record["components"].items(), key=lambda item: -item[1]["weighted"])
        block = [f"[Step {record['step']}]", f"Total Loss: {record['total']:.2f}"]
        block += [f"  {name}_loss: {part['weighted']:.2f} ({part['share']:.0%})" for name, part in parts]
        raw = record["diagnostics"]["layerwise_raw"]
        block.append(f"[Raw] layerwise by sum/(B*S*D): {raw:.4g}, not in the loss")
        assert "\n".join(block) in out
    evaluations = re.findall(r"\[Eval\] loss: (\d+\.\d{3}), ppl: (\d+\.\d)", out)
    assert len(evaluations) == len([r for r in log if r["event"] == "eval"]) == 3
    for loss, ppl in evaluations:
        assert ppl == f"{math.exp(float(loss)):.1f}"


def test_components_sum_to_the_total_and_shares_to_one(run, records):
    for record in records(run() / STAGE / "log.jsonl"):
        if record["event"] == "train":
            parts = record["components"].values()
            assert sum(part["weight"] * part["raw"] for part in parts) == pytest.approx(record["total"], rel=1e-5)
            assert sum(part["share"] for part in parts) == pytest.approx(1)
            assert record["learning_rate"] > 0


def test_the_learning_rate_of_a_run_that_stops_early_is_that_of_the_whole(run, records):
    rates = [
        [r["learning_rate"] for r in records(run(name, **flags) / STAGE / "log.jsonl") if r["event"] == "train"]
        for name, flags in (("whole", {}), ("stopped", {"stop_at": 3}))
    ]
    assert rates[1] == rates[0][:3]


def test_every_student_begins_as_the_same_with_a_seed_of_its_own(run, train_py, records, monkeypatch):
    set_seed, seeds = train_py.set_seed, []

    def seeded(seed, **how):
        seeds.append((seed, how))
        set_seed(seed, **how)

    monkeypatch.setattr(train_py, "set_seed", seeded)
    folder = run(baseline=True, seeds=2, seed=3, max_steps=2)
    begun = [records(log)[0] for log in sorted(folder.glob("seed-*/*/log.jsonl"))]
    assert len(begun) == 4
    assert len({(record["event"], record["step"], record["loss"]) for record in begun}) == 1
    assert seeds == [(seed, {"device_specific": True}) for seed in (3, 3, 4, 4)]


def test_the_last_step_is_evaluated_whatever_its_number(run, records):
    log = records(run(max_steps=5, eval_steps=3) / STAGE / "log.jsonl")
    assert [r["step"] for r in log if r["event"] == "eval"] == [0, 3, 5]


def test_a_baseline_can_be_given_steps_of_its_own(run, records):
    folder = run(baseline=True, baseline_steps=5, max_steps=3)
    ends = {name: records(folder / "seed-0" / name / "log.jsonl")[-1] for name in ("ce-only", "distilled")}
    assert {name: (end["event"], end["step"]) for name, end in ends.items()} == {
        "ce-only": ("eval", 5),
        "distilled": ("eval", 3),
    }
    assert "at their ends, after 3 and 5 steps" in (folder / "report.md").read_text()


def test_the_norm_that_is_logged_is_the_gradients(run, records, monkeypatch):
    clip_gradients, norms = engine.clip_gradients, []

    def clipped(*arguments):
        norms.append(clip_gradients(*arguments))
        return norms[-1]

    monkeypatch.setattr(engine, "clip_gradients", clipped)
    log = records(run() / STAGE / "log.jsonl")
    logged = [r["gradient_norm"] for r in log if r["event"] == "train"]
    assert logged == pytest.approx([norm.item() for norm in norms])
    assert min(logged) > 0


def test_a_run_with_a_baseline_reports_all_models_side_by_side(run):
    folder = run(baseline=True, seeds=2)
    results = json.loads((folder / "results.json").read_text())
    recipes = ("ce-only, best checkpoint", "ce-only, last", "distilled, best checkpoint", "distilled, last")
    expected = [("teacher", None), ("untrained student", None), *((name, seed) for seed in (0, 1) for name in recipes)]
    assert [(row["name"], row["seed"]) for row in results["rows"]] == expected
    report = (folder / "report.md").read_text()
    for row in results["rows"]:
        assert f"| {row['evaluation']['loss']:.3f} | {math.exp(row['evaluation']['loss']):.2f} |" in report
    for row, better in zip(results["rows"][3::2], results["rows"][2::2], strict=True):
        assert better["evaluation"]["loss"] <= row["evaluation"]["loss"]
    assert results["rows"][0]["evaluation"]["kl"] == pytest.approx(0, abs=1e-6)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_student_loads_with_plain_transformers_and_writes(run):
    folder = run() / "student"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("the student", return_tensors="pt")
    written = student.generate(**prompt, max_new_tokens=4, min_new_tokens=4)
    assert written.shape[1] == prompt["input_ids"].shape[1] + 4
    assert student.config.num_hidden_layers == 2
    assert (folder / "generation_config.json").exists()
    assert "| teacher |" in (folder / "README.md").read_text()


def test_the_demo_teacher_is_trained_once(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path / "cache"))
    demo: dict[str, object] = {"teacher": "demo", "teacher_steps": 2, "teacher_depth": 2, "teacher_width": 32}
    demo |= {"vocab_size": 270, "max_steps": 1}
    run("first", **demo)
    assert "teacher: 2 steps on all of the text, once" in capsys.readouterr().out
    run("second", **demo, temperature=4.0)
    assert "teacher: the one trained before" in capsys.readouterr().out
    run("other", **demo | {"teacher_steps": 3})
    assert "teacher: 3 steps on all of the text, once" in capsys.readouterr().out
    cached = sorted((tmp_path / "cache").glob("teacher-*"))
    assert len(cached) == 2
    for folder in cached:
        (folder / "model.safetensors").write_bytes(b"damaged")
    run("again", **demo)
    assert "teacher: 2 steps on all of the text, once" in capsys.readouterr().out


def test_an_optimizer_that_does_not_step_is_found_out_at_the_first(run, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: calls.append(self))
    run(expect=1, log_steps=50, max_steps=50)
    assert re.search(r"stopped: the optimizer stepped .* none of \d+ parameters moved", capsys.readouterr().err)
    assert len(calls) <= 2  # a step's numbers are taken in while the next one is made


def test_a_learning_rate_of_0_is_found_out(run, train_py, monkeypatch, capsys):
    monkeypatch.setattr(train_py, "learning_rate", lambda *_, **__: 0.0)
    run(expect=1)
    assert "the learning rate of an optimizer step is 0.0, not above 0" in capsys.readouterr().err


def test_what_is_in_no_loss_is_logged_as_a_mean_over_micro_batches_and_steps(run, records, monkeypatch):
    forward, seen = DistillationModule.forward, []

    def watched(self, batch, teacher, counts):
        losses = forward(self, batch, teacher, counts)
        seen.append(losses.diagnostics["layerwise_raw"].item())
        return losses

    monkeypatch.setattr(DistillationModule, "forward", watched)
    folder = run(batch_size=2, grad_accum=3, log_steps=2)
    logged = [r["diagnostics"]["layerwise_raw"] for r in records(folder / STAGE / "log.jsonl") if r["event"] == "train"]
    assert logged == pytest.approx([sum(seen[i : i + 6]) / 6 for i in range(0, 18, 6)])


def test_what_is_in_no_loss_may_be_anything(run, records, monkeypatch):
    forward = DistillationModule.forward

    def faulty(self, batch, teacher, counts):
        return forward(self, batch, teacher, counts)._replace(diagnostics={"layerwise_raw": torch.tensor(torch.nan)})

    monkeypatch.setattr(DistillationModule, "forward", faulty)
    train = [r for r in records(run(detail_steps=1) / STAGE / "log.jsonl") if r["event"] == "train"]
    assert [(r["step"], r["skipped_steps"]) for r in train] == [(step, 0) for step in range(1, 7)]
    assert all(math.isnan(r["diagnostics"]["layerwise_raw"]) for r in train)


def planted_nan(monkeypatch, at: set[int]) -> None:
    """Make the kd loss NaN in these forward passes, counted from 1."""
    forward, calls = DistillationModule.forward, iter(range(1, 1000))

    def faulty(self, batch, teacher, counts):
        losses = forward(self, batch, teacher, counts)
        if next(calls) not in at:
            return losses
        return losses._replace(total=losses.total * torch.nan, raw=losses.raw | {"kd": losses.raw["kd"] * torch.nan})

    monkeypatch.setattr(DistillationModule, "forward", faulty)


def test_a_nan_is_skipped_counted_and_said(run, records, monkeypatch):
    planted_nan(monkeypatch, {2, 4})
    folder = run(max_bad_steps=2)  # two, but never in a row
    log = records(folder / STAGE / "log.jsonl")
    train = [r for r in log if r["event"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    assert train[-1]["skipped_steps"] == 2
    assert sum("not finite" in r.get("message", "") for r in log) == 2
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_a_resumed_run_knows_how_many_steps_were_skipped_before(run, records, monkeypatch):
    planted_nan(monkeypatch, {2, 4, 5})
    run(max_bad_steps=3, stop_at=3)
    monkeypatch.undo()
    train = [r for r in records(run(resume=True) / STAGE / "log.jsonl") if r["event"] == "train"]
    assert [r["skipped_steps"] for r in train] == [0, 1, 3, 3, 3, 3]


def test_nans_in_a_row_end_the_run_and_name_the_component(run, monkeypatch, capsys):
    planted_nan(monkeypatch, set(range(3, 99)))
    run(expect=1, max_bad_steps=3)
    assert "the loss was not finite in 3 steps in a row, last: kd nan" in capsys.readouterr().err


def test_a_taken_output_folder_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    run("taken", expect=2)
    assert re.search("train.py: --output-dir .*/taken is not empty", capsys.readouterr().err)
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output_dir": "/dev/null/run"}, "--output-dir /dev/null/run cannot be written: Not a directory"),
        ({"data": "absent.txt"}, "--data absent.txt: No such file or directory"),
        ({"teacher": "absent"}, "cannot load the model absent"),
        ({"student_layers": "7"}, "--student-layers must rise within the teacher's layers 0 to 3, got '7'"),
        ({"layer_map": "0:4"}, "--layer-map 0:4: the teacher's blocks are 0 to 3, or -4 to -1, got 4"),
        ({"seq_len": 64}, "--seq-len 64 is more than the 16 positions of the teacher"),
        ({"shard": True}, "--shard spreads weights over processes, and there is one: launch more, with torchrun"),
    ],
)
def test_a_mistake_is_one_line_and_not_a_success(run, tmp_path, capsys, flags, message):
    run(expect=2, **flags)
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"train.py: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demo_distils_better_than_cross_entropy_alone(tmp_path):
    environment = os.environ | {"FASTDISTILL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "train.py", "--preset", "demo", "--output-dir", str(tmp_path / "demo"), "--seeds", "3"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())["rows"]
    loss = {(row["name"], row["seed"]): row["evaluation"]["loss"] for row in rows}
    for seed in range(3):
        assert loss["distilled, last", seed] < loss["ce-only, last", seed] - 0.03
        assert loss["teacher", None] < loss["distilled, last", seed] < loss["untrained student", None]
