"""layer_loss's kernels as operations of PyTorch: registered, compiled, captured, never waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastdistill import layer_loss, ops
from fastdistill.kernels.layer_loss import SAVED
from fastdistill.testing import DEVICE, differentiate, random_mask, random_states

B, S, D, L = 2, 3, 8, 3
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU has streams to wait for and graphs to capture")


@pytest.mark.parametrize("form", SAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_operations_are_registered_as_pytorch_wants_them(dtype, form):
    compute = torch.promote_types(dtype, torch.float32)
    students, teachers = random_states(B, S, D, layers=L, dtype=dtype).values()
    weights, factors = random_mask(B, S, dtype=torch.float32).to(compute), torch.tensor([0.5, 0.0, 0.5], device=DEVICE)
    arguments = students, teachers, weights, weights.sum(), factors.to(compute), form
    opcheck(ops.layer_loss, ([x.requires_grad_() for x in students], *arguments[1:]))
    loss, per_layer, statistics = ops.layer_loss(*arguments)
    assert loss.requires_grad
    assert not per_layer.requires_grad
    assert not statistics.requires_grad
    students = [x.detach() for x in students]
    opcheck(ops.layer_loss_backward, (loss.detach(), students, *arguments[1:5], statistics, form))


def loss_and_gradients(function, students: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in students]
    fields = function(leaves, *arguments)
    return *fields, *torch.autograd.grad(fields[0], leaves)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("teacher_positions", [S, S - 1])
def test_compiled_without_a_graph_break(teacher_positions, backend):
    def losses(students: list[Tensor], teachers: list[Tensor], mask: Tensor) -> tuple[Tensor, ...]:
        return layer_loss(students, teachers, mask, normalize="layer_norm", layer_weights=[1, 2, 3], impl="triton")

    torch.compiler.reset()
    students, teachers = random_states(B, S, D, layers=L).values()
    arguments = [x[:, :teacher_positions] for x in teachers], random_mask(B, S)
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    eager = loss_and_gradients(losses, students, *arguments)
    for value, expected in zip(loss_and_gradients(compiled, students, *arguments), eager, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_a_schedule_of_tensors_compiles_nothing_anew():
    def loss(students: list[Tensor], teachers: list[Tensor], weights: Tensor, num_tokens: Tensor) -> Tensor:
        return layer_loss(students, teachers, layer_weights=weights, num_tokens=num_tokens, impl="triton").loss

    torch.compiler.reset()
    students, teachers = random_states(B, S, D, layers=L).values()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weights, counts = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]], device=DEVICE), torch.tensor([5, 6.0])
    compiled(students, teachers, weights[0], counts[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        values = {compiled(students, teachers, w, n).item() for w in weights for n in counts}
    assert len(values) == 4


@needs_gpu
@pytest.mark.parametrize("layer_weights", [None, [1.0, 0.0, 2.0], torch.tensor([1.0, 0.0, 2.0])], ids=str)
def test_the_host_never_waits_for_the_device(layer_weights):
    if isinstance(layer_weights, Tensor):
        layer_weights = layer_weights.to(DEVICE)
    arguments = random_states(B, S, D, layers=L) | {"mask": random_mask(B, S), "skip_first": 1, "impl": "triton"}
    arguments["layer_weights"] = layer_weights
    differentiate(layer_loss, arguments, ["student_states"])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(layer_loss, arguments, ["student_states"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_forward_and_backward_replay_from_a_cuda_graph():
    arguments = random_states(B, S, D, layers=L) | {"mask": random_mask(B, S), "layer_weights": [1.0, 2.0, 3.0]}
    students = [x.requires_grad_() for x in arguments["student_states"]]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(layer_loss(**arguments, impl="triton").loss, students)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = layer_loss(**arguments, impl="triton").loss
        gradients = torch.autograd.grad(loss, students)
    with torch.no_grad():
        for student in students:
            student.mul_(0.5)
    graph.replay()
    expected = layer_loss(**arguments, impl="triton").loss
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected, students)))
