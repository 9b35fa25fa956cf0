"""What watches over a run: that weights move, that losses are finite and get better, and that a run can be stopped."""

from __future__ import annotations

import math
import signal
import time

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from fastdistill.training.config import Config
from fastdistill.training.ending import ending, how_to_go_on
from fastdistill.training.guard import BadStepGuard, MovementGuard, Patience, TrainingFault
from fastdistill.training.memory import peak_memory, rescue
from fastdistill.training.stop import StopRequest


def module_with_gradient() -> nn.Linear:
    module = nn.Linear(3, 2)
    module(torch.ones(1, 3)).sum().backward()
    return module


def test_weights_that_move_are_seen_and_those_that_do_not():
    module, guard = module_with_gradient(), MovementGuard()
    guard.watch(module)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    guard.check(0.1)
    guard.watch(module)
    with pytest.raises(TrainingFault, match=r"learning rate 1\.00e-01, and none of 2 parameters moved"):
        guard.check(0.1)


def test_a_movement_is_of_the_element_with_the_largest_gradient_of_any_parameter():
    module, guard = module_with_gradient(), MovementGuard()
    assert module.bias.grad is not None
    module.bias.grad = torch.tensor([0.1, -5.0])
    guard.watch(module)
    with torch.no_grad():
        module.bias[0] += 1
    with pytest.raises(TrainingFault, match="none of 2 parameters moved"):
        guard.check(0.1)
    guard.watch(module)  # only the first look counts until it was checked
    with torch.no_grad():
        module.bias[1] += 1
    guard.watch(module)
    guard.check(0.1)


def test_no_gradient_and_no_learning_rate_are_faults():
    with pytest.raises(TrainingFault, match="no parameter has a gradient"):
        MovementGuard().watch(nn.Linear(2, 2))
    with pytest.raises(TrainingFault, match=r"the learning rate of an optimizer step is 0\.0, not above 0"):
        MovementGuard().check(0.0)


def test_bad_steps_are_counted_in_all_and_in_a_row():
    guard = BadStepGuard(3)
    assert [guard.accept({"kd": value}) for value in (math.nan, math.inf, 1.0, math.nan)] == [False, False, True, False]
    assert guard.state() == {"skipped": 3, "in_a_row": 1}
    again = BadStepGuard(3, **guard.state())
    assert not again.accept({"kd": 1.0, "lm": -math.inf})
    with pytest.raises(TrainingFault, match="not finite in 3 steps in a row, last: lm nan, total inf"):
        again.accept({"kd": 1.0, "lm": math.nan, "total": math.inf})


def test_patience_ends_after_evaluations_that_are_not_better():
    patience = Patience(2, min_delta=0.1, start=30)
    for step, loss, waited in ((0, 5.0, 0), (10, 5.0, 0), (20, 4.0, 0), (30, 3.95, 1), (40, 3.8, 0), (50, 3.9, 1)):
        patience.observe(step, loss)
        assert (patience.waited, patience.exhausted) == (waited, False)
    again = Patience(2, min_delta=0.1, start=30, **patience.state())
    again.observe(60, math.nan)
    assert again.exhausted
    endless = Patience(None)
    for step in range(100):
        endless.observe(step, 1.0)
    assert not endless.exhausted


def test_a_first_signal_asks_and_a_later_one_acts():
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the launcher's, of the same key
        assert stop.requested
        assert stop.signalled
        stop._first -= 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_deadline_asks_too():
    assert not StopRequest(time.monotonic() + 60).requested
    stop = StopRequest(time.monotonic())
    assert stop.requested
    assert not stop.signalled


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_is_an_ending_that_can_be_gone_on_from(error, tmp_path):
    code, message = ending(error, tmp_path)
    assert code == 1
    assert message.startswith("stopped: cannot write: ")
    assert f"train.py --resume --output-dir {tmp_path}" in message


@pytest.mark.parametrize(
    "error", [OSError(2, "No such file"), SafetensorError("invalid header"), ValueError("a fault")]
)
def test_a_fault_of_the_program_is_not_hidden(error, tmp_path):
    with pytest.raises(type(error)):
        ending(error, tmp_path)


def test_the_way_on_is_a_command(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    output = tmp_path / "a run"
    assert how_to_go_on(output, ["--batch-size", "4"]).endswith(
        f"train.py --resume --output-dir '{output}' --batch-size 4"
    )
    assert how_to_go_on(output, None) == how_to_go_on(None, []) == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert how_to_go_on(output, []).endswith(f"(launched as before) train.py --resume --output-dir '{output}'")


CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to allocate 2.50 GiB. GPU 0"), CPU, MemoryError()])
def test_out_of_memory_saves_and_says_what_to_change(error):
    saved = []
    with pytest.raises(TrainingFault) as caught, rescue(lambda: saved.append(True), Config(batch_size=6, grad_accum=2)):
        raise error
    assert saved == [True]
    assert "All that was done is saved. With --batch-size 3 --grad-accum 4 a step is the same" in str(caught.value)
    assert caught.value.go_on == ["--batch-size", "3", "--grad-accum", "4"]
    if isinstance(error, torch.OutOfMemoryError):
        assert "out of memory: 2.50 GiB more could not be had" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (Config(batch_size=9), ["--batch-size", "3", "--grad-accum", "3"]),
        (Config(batch_size=7), ["--batch-size", "1", "--grad-accum", "7"]),
        (Config(batch_size=1), ["--gradient-checkpointing"]),
        (Config(batch_size=1, gradient_checkpointing=True), None),
    ],
)
def test_what_to_change_is_what_is_left(config, flags):
    with pytest.raises(TrainingFault) as caught, rescue(False, config):
        raise MemoryError
    assert caught.value.go_on == flags
    assert "The latest checkpoint is where to go on" in str(caught.value)


def test_other_errors_are_their_own():
    with pytest.raises(RuntimeError, match="shape"), rescue(pytest.fail, Config()):
        raise RuntimeError("shape mismatch")


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 50_000_000 // 4)
    assert peak_memory(torch.device("cpu")) - before >= 40_000_000
    assert held[0] == 1
