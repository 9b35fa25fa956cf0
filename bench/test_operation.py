"""What is timed is one pass of the loss that is meant, and what is kept of it is true."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import bench_attention_kl, bench_layer_loss, bench_linear_softmax_kl, bench_softmax_kl
from bench import operation as operation_module
from bench.operation import (
    PASSES,
    Cannot,
    Case,
    Operation,
    Step,
    compare,
    in_turn,
    make_step,
    random_valid,
    result,
    valid_positions,
)
from bench.rivals import imported
from fastdistill.testing import DEVICE

OPERATIONS = [
    module.OPERATION for module in (bench_softmax_kl, bench_linear_softmax_kl, bench_layer_loss, bench_attention_kl)
]
CASE = Case((3,), "square")


def squares(calls: list[Tensor], value: float = 1.0, gradient: float = 1.0) -> Operation:
    """Of an input `x`, whose implementation is that many times the definition; it notes what it is called with."""
    x = torch.arange(1.0, 4.0, device=DEVICE)

    def loss(x: Tensor) -> Tensor:
        calls.append(x)
        exact = x.square().sum()
        return value * exact.detach() + gradient * (exact - exact.detach())

    return Operation(
        name="square",
        make_inputs=lambda case: {"x": x},
        leaves=("x",),
        implementations={"eager": lambda case: loss},
        definition=lambda case, implementation: lambda x: x.square().sum(),
        tokens=lambda case: 3,
        roof="copy",
        work=lambda case, pass_: 12.0,
        tiny_shape=(3,),
        cases={},
    )


@pytest.mark.parametrize(("pass_", "in_prepare", "in_run"), [("forward", 0, 1), ("backward", 1, 0), ("both", 0, 1)])
def test_a_pass_makes_its_graph_when_it_should_and_its_gradient_once(pass_, in_prepare, in_run):
    calls: list[Tensor] = []
    step = make_step(squares(calls), "eager", CASE, pass_)
    for _ in range(3):
        calls.clear()
        step.prepare()
        assert len(calls) == in_prepare
        step.run()
        assert len(calls) == in_prepare + in_run
    gradient = calls[0].grad
    if pass_ == "forward":
        assert gradient is None
    else:
        assert gradient is not None
        assert gradient.tolist() == [2, 4, 6]


def test_eager_is_timed_before_each_run_and_leaves_nothing(monkeypatch):
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return len(events)

    step, eager = (Step(*(partial(events.append, who + what) for what in Step._fields)) for who in ("", "eager's "))
    monkeypatch.setattr(operation_module, "perf_counter", clock)
    paired, seconds = in_turn(step, eager)
    for _ in range(2):
        paired.prepare()
        paired.run()
    of_eager = ["eager's prepare", "clock", "eager's run", "clock", "eager's free"]
    assert events == 2 * ["free", *of_eager, "prepare", "run"]
    assert seconds == [2, 2]


@pytest.mark.parametrize("pass_", PASSES)
def test_what_a_run_left_is_given_up(pass_):
    graphs: list[weakref.ref[Any]] = []

    def loss(x: Tensor) -> Tensor:
        value = x.square().sum()
        graphs.append(weakref.ref(value))
        return value

    calls: list[Tensor] = []
    step = make_step(replace(squares(calls), implementations={"eager": lambda case: loss}), "eager", CASE, pass_)
    step.prepare()
    step.run()
    step.free()
    assert [graph() for graph in graphs] == [None]


@pytest.mark.parametrize("fault", [{"value": 1.001}, {"gradient": 1.001}])
def test_another_loss_is_not_timed(fault):
    compare(squares([]), "eager", CASE)
    with pytest.raises(AssertionError, match="eager is another loss than square's"):
        compare(squares([], **fault), "eager", CASE)


@pytest.mark.parametrize("module", ["no_such_library", "torch.no_such_module"])
def test_a_library_that_is_not_there_is_told(module):
    with pytest.raises(Cannot, match=r"no_such_library is not installed|torch\.no_such_module does not import here"):
        imported(module)


@pytest.mark.parametrize(("valid", "count"), [(1.0, 40), (0.5, 20), (0.1, 4), (0.001, 1)])
def test_the_share_that_counts_is_exact(valid, count):
    assert random_valid(40, valid).sum() == count
    assert valid_positions(2, 40, valid).sum(1).tolist() == [count, count]


@pytest.mark.parametrize(
    ("operation", "input_name"),
    list(zip(OPERATIONS, ["student_logits", "student_hidden", "student_states", "student_k"], strict=True)),
    ids=lambda value: getattr(value, "name", value),
)
def test_gradients_go_to_the_share_that_counts(operation, input_name):
    case = operation.cases["tiny"][-1]
    inputs = operation.make_inputs(case)
    leaf = tree_leaves(inputs[input_name])[0].requires_grad_()
    (gradient,) = torch.autograd.grad(operation.definition(case, "eager")(**inputs), leaf)
    assert case.valid == 0.5
    assert (gradient != 0).any(-1).float().mean() == 0.5


@pytest.mark.parametrize(
    ("operation", "shape", "pass_", "unit", "rate"),
    [
        ("softmax_kl", (10, 7), "forward", "gb_per_s", 2 * 5 * 7 * 2e-9),
        ("softmax_kl", (10, 7), "both", "gb_per_s", (2 * 5 + 10) * 7 * 2e-9),
        ("layer_loss", (3, 2, 10, 7), "backward", "gb_per_s", 3 * 2 * (2 * 5 + 10) * 7 * 2e-9),
        ("linear_softmax_kl", (10, 7, 4, 6), "both", "tflop_per_s", 2 * 5 * 7 * (3 * 4 + 6) * 1e-12),
        ("linear_softmax_kl", (10, 7, 4, 6), "forward", None, None),
        ("attention_kl", (2, 4, 2, 10, 8, 12), "both", "tflop_per_s", 2 * 4 * 5**2 * (5 * 8 + 3 * 12) * 1e-12),
        ("attention_kl", (2, 4, 2, 10, 8, 12), "backward", None, None),
    ],
)
def test_rates_are_of_the_work_that_counts(operation, shape, pass_, unit, rate):
    (operation,) = (each for each in OPERATIONS if each.name == operation)
    form = operation.cases["tiny"][0].form
    kept = result(operation, "eager", Case(shape, form, 0.5, "bfloat16"), pass_, 0.25, [], 2.0, None)
    about = {"shape": list(shape), "dtype": "bfloat16", "valid": 0.5, "pass": pass_, "options": form}
    assert kept == kept | about
    assert kept["tokens_per_s"] == (80 if operation.name in ("layer_loss", "attention_kl") else 40)
    if unit is None:
        assert not {"gb_per_s", "tflop_per_s", "roof", "of_roof"} & kept.keys()
    else:
        assert kept[unit] == pytest.approx(rate / 0.25)
        assert kept["of_roof"] == pytest.approx(rate / 0.25 / 2)


def test_every_case_is_made_of_what_its_operation_has():
    for operation in OPERATIONS:
        for case in chain.from_iterable(operation.cases.values()):
            assert len(case.shape) == len(operation.tiny_shape)
            assert operation.work(case, "both")
            operation.definition(case, "eager")  # knows its form
