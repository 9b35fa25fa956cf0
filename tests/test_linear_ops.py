"""linear_softmax_kl as operations of PyTorch: registered, compiled, captured, never waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastdistill import linear_ops, linear_softmax_kl
from fastdistill.linear_chunks import LossForm
from fastdistill.testing import (
    DEVICE,
    differentiate,
    impls_of,
    random_heads,
    random_mask,
    random_normal,
    random_targets,
)

B, S, V, D = 2, 3, 11, 4
HEAD = ("student_hidden", "student_weight", "student_bias")
each_impl = pytest.mark.parametrize("impl", impls_of("linear_softmax_kl"))
each_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU has streams to wait for and graphs to capture")


def heads(**keywords: Any) -> dict[str, Any]:
    arguments = random_heads(B, S, vocab=V, width=D, bias=True, **keywords)
    return arguments | {"targets": random_targets(B, S, vocab=V), "ce_weight": 0.5}


def op_arguments(dtype: torch.dtype, impl: str) -> list[Any]:
    arguments, compute = heads(dtype=dtype), torch.promote_types(dtype, torch.float32)
    tensors = [
        arguments[f"{model}_{part}"] for model in ("student", "teacher") for part in ("hidden", "weight", "bias")
    ]
    weights = random_mask(B, S, dtype=torch.float32).to(compute)
    scalars = torch.tensor([2.0, 4.0, 0.5, 0.5], device=DEVICE).to(compute)
    targets = random_targets(B, S, vocab=V, ignored=0)
    return [*tensors, targets, weights, scalars, "forward_kl", V, True, 2, True, True, None, False, None, impl]


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_operations_are_registered_as_pytorch_wants_them(transposed, needs, dtype, impl):
    arguments = op_arguments(dtype, impl)
    if transposed:
        arguments[:2] = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[:2]]
    dloss = torch.ones_like(arguments[7])
    opcheck(linear_ops.linear_softmax_kl_terms_backward, (dloss, *arguments, *needs))
    for tensor, needed in zip(arguments[:3], needs, strict=True):
        tensor.requires_grad_(needed)
    opcheck(linear_ops.linear_softmax_kl_sums, (*arguments, *needs))
    sums, *rest = linear_ops.linear_softmax_kl_sums(*arguments, *needs)
    assert sums.requires_grad
    assert not any(x.requires_grad for x in rest)
    opcheck(linear_ops.linear_softmax_kl_terms, tuple(arguments))


def fields_and_gradients(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    leaves = {name: arguments[name].detach().requires_grad_() for name in HEAD}
    fields = function(**arguments | leaves)
    return *fields, *torch.autograd.grad(fields[0].sum(), list(leaves.values()))


@each_impl
@each_reduction
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break_and_to_the_same_bits(backend, reduction, impl):
    def losses(**arguments: Any) -> tuple[Tensor, ...]:
        output = linear_softmax_kl(**arguments, reduction=reduction, impl=impl)
        return output.loss, output.kl, output.ce  # type: ignore[return-value]

    torch.compiler.reset()
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    for temperature in (2.0, torch.tensor(2.0, device=DEVICE), torch.tensor(3.0, device=DEVICE)):
        arguments = heads() | {"temperature": temperature}
        eager = fields_and_gradients(losses, arguments)
        for value, expected in zip(fields_and_gradients(compiled, arguments), eager, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


@each_impl
def test_a_schedule_of_tensors_compiles_nothing_anew(impl):
    def loss(arguments: dict[str, Any], temperature: Tensor, kl_weight: Tensor) -> Tensor:
        return linear_softmax_kl(**arguments, temperature=temperature, kl_weight=kl_weight, impl=impl).loss

    torch.compiler.reset()
    arguments = heads()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    temperatures, kl_weights = torch.tensor([[3.0, 2.0, 0.5], [1.0, 0.5, 0.2]], device=DEVICE)
    compiled(arguments, temperatures[0], kl_weights[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        values = {compiled(arguments, t, k).item() for t, k in zip(temperatures, kl_weights, strict=True)}
    assert len(values) == 3


def test_autocast_holds_inside_a_compiled_function():
    def loss(**arguments: Any) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return linear_softmax_kl(**arguments).loss

    torch.compiler.reset()
    arguments = heads()
    expected = loss(**arguments)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(**arguments), expected)


@each_reduction
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("drop_masked", [True, False])
def test_what_has_no_weight_is_not_computed_and_rows_are_dropped_as_asked(
    drop_masked, ce_weight, kl_weight, reduction, monkeypatch
):
    forms: list[LossForm] = []
    name = "loss_terms" if reduction == "none" else "loss_sums"
    compute = getattr(linear_ops, name)
    monkeypatch.setattr(linear_ops, name, lambda *given: forms.append(given[1]) or compute(*given))
    arguments = heads() | {"kl_weight": kl_weight, "ce_weight": ce_weight, "drop_masked": drop_masked}
    linear_softmax_kl(**arguments, reduction=reduction)
    (form,) = forms
    assert (form.kl_in_loss, form.ce_in_loss, form.drop_uncounted) == (kl_weight != 0, ce_weight != 0, drop_masked)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_sharded_weight_is_refused_with_what_to_do(model):
    class Sharded(torch.Tensor):
        def full_tensor(self) -> None: ...

    arguments = heads()
    arguments[f"{model}_weight"] = arguments[f"{model}_weight"].as_subclass(Sharded)
    with pytest.raises(ValueError, match=rf"{model}_weight must be a whole tensor, got a DTensor.*fully_shard"):
        linear_softmax_kl(**arguments)


@needs_gpu
@each_impl
@each_reduction
def test_the_host_never_waits_for_the_device(reduction, impl):
    arguments = heads(dtype=torch.float16) | {
        "mask": random_mask(B, S),
        "temperature": torch.tensor(2.0, device=DEVICE),
    }
    arguments |= {"reduction": reduction, "drop_masked": False, "impl": impl}
    dloss = random_normal(B, S) if reduction == "none" else 1.0
    differentiate(linear_softmax_kl, arguments, HEAD, dloss)  # compiles, and tries the products
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(linear_softmax_kl, arguments, HEAD, dloss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@each_impl
def test_forward_and_backward_replay_from_a_cuda_graph(impl):
    arguments = heads() | {"mask": random_mask(B, S), "impl": impl}
    hidden = arguments["student_hidden"].requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(linear_softmax_kl(**arguments).loss, hidden)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_softmax_kl(**arguments).loss
        (gradient,) = torch.autograd.grad(loss, hidden)
    with torch.no_grad():
        hidden.mul_(0.5)
    graph.replay()
    expected = linear_softmax_kl(**arguments).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0])
