"""What options of the loop do, each in runs of train.py: precision, averaged weights, early stopping, checkpointing of
activations, TensorBoard; and what its watch over a run says.
"""

from __future__ import annotations

import json
import os
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from fastdistill.training import engine
from fastdistill.training.config import COMPONENTS
from fastdistill.training.evaluate import Evaluation
from fastdistill.training.loading import DTYPES, load
from fastdistill.training.student import build_student, kept_layers

STAGE = Path("seed-0/distilled")


def checkpoint_of(run_folder: Path, step: int) -> Path:
    return run_folder / STAGE / "checkpoints" / f"step-{step:08d}"


def test_an_overflow_of_fp16_is_skipped_and_lowers_the_scale(run, records, monkeypatch, assert_same_run):
    """The third window's gradients are beyond float16 and float32: no step, half the scale, no fault, and on."""
    backward, calls = engine.backward, iter(range(1, 100))

    def overflowing(total, scale, scaler):
        backward(total * (1e38 if next(calls) == 3 else 1.0), scale, scaler)

    flags = {"precision": "fp16", "save_steps": 1, "keep_checkpoints": 9, "max_bad_steps": 1}
    whole = run("whole", **flags)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "backward", overflowing)
        skipped = run("skipped", **flags)
    log = records(skipped / STAGE / "log.jsonl")
    assert [r["step"] for r in log if r["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    warnings = [(r["step"], r["message"]) for r in log if r["event"] == "warning"]
    assert [step for step, message in warnings if "step skipped, not finite" in message] == [2]
    scales = [
        json.loads((checkpoint_of(each, step) / "state.json").read_text())["scaler"]["scale"]
        for each, step in ((whole, 6), (skipped, 2), (skipped, 3))
    ]
    assert scales[1:] == [scales[0], scales[0] / 2]
    weights = [load_file(checkpoint_of(skipped, step) / "model.safetensors") for step in (2, 3)]
    assert all(tensor.isfinite().all() for tensor in weights[1].values())
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    # A scaler in the middle of its count, and the skipped window's samples, come back too.
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr(engine, "backward", overflowing)
        run("stopped", stop_at=3, **flags)
    assert_same_run(run("stopped", resume=True), skipped)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_student_is_trained_in_that_format(run, monkeypatch, precision):
    forward, seen = GPT2MLP.forward, set()

    def watched(self, hidden):
        out = forward(self, hidden)
        if self.training:  # which a teacher never is
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(GPT2MLP, "forward", watched)
    run(precision=precision, max_steps=2)
    assert seen == {DTYPES[precision]}


def test_fp16_gradients_that_overflow_at_any_scale_end_the_run(run, monkeypatch, capsys):
    monkeypatch.setattr("torch.amp.GradScaler.get_scale", lambda self: 0.5)
    backward = engine.backward
    monkeypatch.setattr(engine, "backward", lambda total, scale, scaler: backward(total * 1e38, scale, scaler))
    run(expect=1, precision="fp16")
    assert "float16 gradients overflow even at a loss scale below 1" in capsys.readouterr().err


def test_averaged_weights_are_what_is_evaluated_and_kept(run, teacher_folder, assert_same_run):
    """The mean by its definition, of the weights in the checkpoints after each step."""
    flags = {"ema_decay": 0.5, "save_steps": 1, "keep_checkpoints": 9, "eval_steps": 1}
    whole, plain = run("whole", **flags), run("plain", **flags | {"ema_decay": 0.0})
    mean = build_student(load(str(teacher_folder))[0], kept_layers("every-other", 4)).state_dict()
    for step in range(1, 7):
        checkpoint = load_file(checkpoint_of(whole, step) / "model.safetensors")
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in checkpoint.items():
            key = name.removeprefix("student.")
            if key in mean:
                mean[key] = decay * mean[key] + (1 - decay) * tensor
    last = load_file(whole / STAGE / "last" / "model.safetensors")
    for name, tensor in last.items():
        torch.testing.assert_close(tensor, mean[name])
    own = load_file(plain / STAGE / "last" / "model.safetensors")
    assert any((tensor - own[name]).abs().max() > 1e-3 for name, tensor in last.items())
    losses = [
        [json.loads(line)["loss"] for line in (each / STAGE / "log.jsonl").read_text().splitlines() if '"eval"' in line]
        for each in (whole, plain)
    ]
    assert losses[0][0] == losses[1][0]
    assert all(a != b for a, b in zip(losses[0][1:], losses[1][1:], strict=True))
    run("stopped", stop_at=3, **flags)
    assert_same_run(run("stopped", resume=True), whole)


def test_patience_ends_a_run_that_gets_no_better_and_its_count_is_resumed(run, capsys, records, assert_same_run):
    flags = {"max_steps": 20, "eval_steps": 2, "patience": 2, "min_delta": 100.0, "save_steps": 3}
    whole = run("whole", **flags)
    assert "distilled 0: stopped early at step 4: 2 evaluations without a better one" in capsys.readouterr().out
    log = records(whole / STAGE / "log.jsonl")
    assert [r["step"] for r in log if r["event"] == "eval"] == [0, 2, 4]
    assert json.loads((whole / STAGE / "result.json").read_text())["steps"] == 4
    assert (whole / "student" / "model.safetensors").exists()
    assert checkpoint_of(whole, 4).is_dir()
    run("stopped", stop_at=3, **flags)  # one of the two evaluations lies before it
    assert_same_run(run("stopped", resume=True), whole)
    assert run("later", **flags | {"patience_from": 5})
    assert "stopped early at step 8" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_checkpointed_activations_change_no_number(run, records, monkeypatch, assert_same_run, precision):
    """Dropout and all: blocks computed again draw the same."""
    forward, calls = GPT2MLP.forward, Counter()

    def counted(self, *args, **kwargs):
        calls[self.training] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2MLP, "forward", counted)
    whole, seen = run("whole", precision=precision), calls[True]
    saving = run("saving", precision=precision, gradient_checkpointing=True)
    assert calls[True] - seen == 2 * seen > 0
    assert_same_run(saving, whole)


def test_checkpointed_activations_change_no_component(run, assert_same_run):
    """Queries, keys and outputs are kept of the first pass, and gradients measured through blocks computed again."""
    how = {f"{name}_weight": 0.1 for name in COMPONENTS[2:]} | {"balance": "gradient", "balance_steps": 2}
    assert_same_run(run("saving", gradient_checkpointing=True, **how), run("whole", **how))


def test_tensorboard_has_the_numbers_of_the_log(run, records):
    run("run", tensorboard=True, stop_at=4)
    folder = run("run", resume=True, tensorboard=True)
    board = EventAccumulator(str(folder / STAGE / "tensorboard"))
    board.Reload()
    log = records(folder / STAGE / "log.jsonl")
    train, evaluations = ([r for r in log if r["event"] == event] for event in ("train", "eval"))
    expected = {
        "loss/total": {r["step"]: r["total"] for r in train},
        "learning_rate": {r["step"]: r["learning_rate"] for r in train},
        "gradient_norm": {r["step"]: r["gradient_norm"] for r in train},
        "eval/loss": {r["step"]: r["loss"] for r in evaluations},
        "eval/perplexity": {r["step"]: r["perplexity"] for r in evaluations},
    }
    for name in ("kd", "lm", "layerwise"):
        expected[f"loss/{name}"] = {r["step"]: r["components"][name]["weighted"] for r in train}
        expected[f"share/{name}"] = {r["step"]: r["components"][name]["share"] for r in train}
    assert set(board.Tags()["scalars"]) == expected.keys() | {"tokens_per_second"}
    for name, values in expected.items():
        assert {event.step: event.value for event in board.Scalars(name)} == pytest.approx(values, rel=1e-6)
    assert not (run("quiet", tensorboard=False) / STAGE / "tensorboard").exists()


class Reads(TorchDispatchMode):
    """Counts, by file, the calls for which a GPU's host has to wait: a value read, tensors compared."""

    def __init__(self):
        super().__init__()
        self.by_file = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "is_nonzero"):
            frames = traceback.extract_stack()[:-1]
            self.by_file[next(f.filename for f in reversed(frames) if f"{os.sep}torch{os.sep}" not in f.filename)] += 1
        return func(*args, **(kwargs or {}))


NOT_OF_THE_DEVICE = {
    "checks.py": "what targets hold is checked on a CPU alone",
    "blocks.py": "a batch is made on the host",
    "layer_loss_torch.py": "which layers are left out is read on a CPU alone",
    "masking_utils.py": "transformers looks whether a row holds several documents, once a forward pass",
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_is_read_from_the_device_between_log_lines(run, precision):
    """A run of three times as many steps, with as many log lines, evaluations and checkpoints, reads no more."""
    counts = []
    for steps in (10, 30):
        seldom = dict.fromkeys(("log_steps", "eval_steps", "save_steps"), steps)
        with Reads() as reads:
            run(f"run-{steps}", max_steps=steps, precision=precision, **seldom)
        counts.append(reads.by_file)
    assert {Path(name).name for name in counts[1] - counts[0]} <= NOT_OF_THE_DEVICE.keys()
    assert sum(counts[0].values()) > 0


def test_weights_that_stop_moving_are_found_at_the_next_log_line(run, monkeypatch, capsys):
    """The optimizer is sound for two steps: the check of the first step sees nothing yet."""
    genuine, calls = torch.optim.AdamW.step, iter(range(1, 100))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: genuine(self) if next(calls) <= 2 else None)
    run(expect=1, log_steps=5, eval_steps=50, save_steps=50, max_steps=20)
    err = capsys.readouterr().err
    assert "none of" in err
    assert "parameters moved" in err


def test_a_plateau_is_said_once_and_a_student_worse_than_untrained_each_time(run, train_py, records, monkeypatch):
    evaluate = train_py.evaluate
    losses = iter([9.0, 5.0, 4.0, *[6.0] * 5, 10.0, 6.0, 6.0, 3.0])

    def told(model, blocks, *args, **kwargs):
        result = evaluate(model, blocks, *args, **kwargs)
        return Evaluation(**vars(result) | {"loss": next(losses)})

    monkeypatch.setattr(train_py, "evaluate", told)
    folder = run(max_steps=10, eval_steps=1)
    warnings = [(r["step"], r["message"]) for r in records(folder / STAGE / "log.jsonl") if r["event"] == "warning"]
    assert [step for step, message in warnings if "a plateau: 5 evaluations" in message] == [6]
    assert [step for step, message in warnings if "is above the untrained student's 5.000" in message] == list(
        range(2, 10)
    )
