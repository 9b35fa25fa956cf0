"""Pieces of the machinery: number formats, averaged weights, the clock, readings, and a step that a device decides."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from fastdistill.training import engine
from fastdistill.training.averaged import AveragedWeights
from fastdistill.training.clock import Clock
from fastdistill.training.config import Config, UsageError
from fastdistill.training.precision import Precision
from fastdistill.training.reading import Reading

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU by name and capability."""

    def make(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return make


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [("P100", (6, 0), "fp16"), ("T4", (7, 5), "fp16"), ("A100", (8, 0), "bf16"), ("H200", (9, 0), "bf16")],
)
def test_a_gpu_is_given_the_format_that_it_computes_in(a_gpu, monkeypatch, name, capability, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    a_gpu(name, capability)
    chosen = Precision.choose("auto", GPU)
    assert chosen.name == expected
    assert name in chosen.describe()
    assert Precision.choose("fp32", GPU).name == "fp32"
    if expected == "fp16":
        with pytest.raises(UsageError, match=f"--precision bf16 would be emulated on {name}: use fp16"):
            Precision.choose("bf16", GPU)


def test_a_cpu_computes_in_fp32_unless_asked(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert Precision.choose("auto", CPU).name == "fp32"
    assert Precision.choose("bf16", CPU).name == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert Precision.choose("auto", CPU).describe().startswith("fp16 with a gradient scaler (as asked of accelerate")
    assert Precision.choose("fp32", CPU).name == "fp32"


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_forward_pass_is_in_that_format_and_fp16_alone_is_scaled(name):
    precision = Precision(name, "cpu", "asked")
    with precision.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert (precision.scaler() is not None) == (name == "fp16")


def test_averaged_weights_are_the_exponential_mean():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    averaged, mean = AveragedWeights(module, 0.9), module.weight.detach().clone()
    for step in range(1, 200):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 2))
        averaged.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * module.weight.detach()
        torch.testing.assert_close(averaged.means["weight"], mean)
    assert list(averaged.means) == ["weight"]
    own = module.weight.detach().clone()
    with averaged.in_place():
        torch.testing.assert_close(module.weight.detach(), mean)
    assert torch.equal(module.weight, own)
    torch.testing.assert_close(averaged.means["weight"], mean)


def test_without_decay_nothing_is_averaged():
    module = nn.Linear(2, 2)
    averaged, own = AveragedWeights(module, 0.0), module.weight.detach().clone()
    averaged.update(1)
    with averaged.in_place():
        assert torch.equal(module.weight, own)
    assert averaged.means == {}


def test_the_clock_gives_each_phase_its_time_and_none_between_stretches():
    clock = Clock(CPU)
    for _ in range(2):
        clock.start()
        time.sleep(0.02)
        clock.mark("data")
        for _ in range(2):
            time.sleep(0.03)
            clock.mark("student")
        time.sleep(0.2)
    seconds = clock.read()
    assert list(seconds) == ["data", "student"]
    assert 0.04 <= seconds["data"] < 0.1
    assert 0.12 <= seconds["student"] < 0.2
    assert clock.read() == {}


def test_a_reading_is_of_the_time_it_was_made():
    value = torch.tensor(3.0, requires_grad=True)
    reading = Reading({"loss": value, "tokens": torch.tensor(12_345_678_901)})
    with torch.no_grad():
        value += 1
    assert reading.values() == {"loss": 3.0, "tokens": 12_345_678_901.0}


def trained(scaler: torch.amp.GradScaler | None, factor: float) -> tuple[nn.Linear, torch.optim.AdamW, torch.Tensor]:
    """One step on a loss times `factor`, with its module, optimizer and gradient norm."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = engine.make_optimizer(module, Config())
    engine.backward(factor * module(torch.ones(1, 3)).sum(), 1, scaler)
    norm = engine.clip_gradients(module, optimizer, 1.0, scaler)
    engine.step_if_finite(optimizer, 0.1, norm, scaler)
    return module, optimizer, norm


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_taken_where_all_is_finite_and_only_there(scaled):
    torch.manual_seed(0)
    untouched = nn.Linear(3, 2)
    for factor, moves in ((1.0, True), (float("nan"), False), (float("inf"), False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        module, optimizer, norm = trained(scaler, factor)
        assert bool(norm.isfinite()) == moves
        assert (not torch.equal(module.weight, untouched.weight)) == moves
        assert all(float(state["step"]) == moves for state in optimizer.state.values())
        assert all(parameter.grad is None for parameter in module.parameters())
        if scaler:
            assert scaler.get_scale() == (8.0 if moves else 4.0)


def test_a_scaler_changes_nothing_but_the_range():
    plain, _, norm = trained(None, 1.0)
    scaled, _, scaled_norm = trained(torch.amp.GradScaler("cpu", init_scale=1024.0), 1.0)
    torch.testing.assert_close(norm, scaled_norm)
    torch.testing.assert_close(plain.weight, scaled.weight)


def test_a_step_has_the_rate_that_is_given_and_gradients_within_the_clip():
    module = nn.Linear(3, 2)
    optimizer = engine.make_optimizer(module, Config(lr=7.0))
    engine.backward(100 * module(torch.ones(1, 3)).sum(), 1, None)
    norm = engine.clip_gradients(module, optimizer, 0.5, None)
    clipped = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(100 * 8**0.5)
    assert clipped.item() == pytest.approx(0.5, rel=1e-4)
    before = module.bias.detach().clone()
    engine.step_if_finite(optimizer, 0.25, norm, None)
    torch.testing.assert_close(before - module.bias.detach(), torch.full((2,), 0.25))  # Adam's first step


def test_vectors_are_not_decayed():
    groups = engine.make_optimizer(nn.Linear(3, 2), Config(weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.3, [2]), (0.0, [1])]


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    """Even where the gradient would be: an infinite constant was added, say."""
    parameter = nn.Parameter(torch.ones(2))
    engine.backward(parameter.sum() + torch.inf, 2, None)
    assert parameter.grad is not None
    assert parameter.grad.isnan().all()
    parameter.grad = None
    engine.backward(parameter.sum(), 2, None)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_for_another_engine_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UsageError, match=r"launch without it, and give train\.py --shard for sharded weights"):
        engine.make_accelerator(Config())
