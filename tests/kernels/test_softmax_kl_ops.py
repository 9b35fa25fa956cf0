"""softmax_kl's kernels as operations of PyTorch: registered, compiled, captured, never waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastdistill import ops, softmax_kl
from fastdistill.testing import DEVICE, differentiate, random_logits, random_mask, random_targets

ROWS, VOCAB = 6, 11
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU has streams to wait for and graphs to capture")


def op_arguments(dtype: torch.dtype, with_targets: bool) -> dict[str, Any]:
    student, teacher = random_logits(ROWS, VOCAB, dtype=dtype).values()
    return {
        "student": student,
        "teacher": teacher,
        "targets": random_targets(ROWS, vocab=VOCAB, ignored=0) if with_targets else None,
        "weights": random_mask(ROWS, dtype=torch.float32).to(torch.promote_types(dtype, torch.float32)),
        "scalars": torch.tensor([2.0, 4.0, 0.5, 0.5], device=DEVICE).to(torch.promote_types(dtype, torch.float32)),
        "divergence": "forward_kl",
        "shared_vocab": VOCAB,
        "power": 2,
    }


@pytest.mark.parametrize("with_targets", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operations_are_registered_as_pytorch_wants_them(dtype, with_targets):
    arguments = op_arguments(dtype, with_targets)
    forms = {"metrics": True, "kl_in_loss": True, "ce_in_loss": with_targets, "inplace_backward": False}
    arguments["student"].requires_grad_()
    opcheck(ops.softmax_kl, (), arguments | forms)
    _, statistics = ops.softmax_kl(**arguments, **forms)
    arguments["student"] = arguments["student"].detach()
    backward = arguments | {"dloss": torch.ones_like(arguments["weights"]), "statistics": statistics.detach()}
    opcheck(ops.softmax_kl_backward, (), backward)
    opcheck(ops.softmax_kl_backward_, (), backward)


def fields_and_gradient(function, student: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    leaf = student.detach().requires_grad_()
    fields = function(leaf, *arguments)
    return *fields, *torch.autograd.grad(fields[0], leaf)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break_and_to_the_same_bits(backend):
    def losses(student: Tensor, teacher: Tensor, targets: Tensor, temperature: Tensor | float) -> tuple[Tensor, ...]:
        output = softmax_kl(
            student, teacher, targets, temperature=temperature, ce_weight=0.5, reduction="sum", impl="triton"
        )
        return output.loss, output.kl, output.ce  # type: ignore[return-value]

    torch.compiler.reset()
    student, teacher = random_logits(ROWS, VOCAB).values()
    arguments = teacher, random_targets(ROWS, vocab=VOCAB)
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    for temperature in (2.0, torch.tensor(2.0, device=DEVICE), torch.tensor(3.0, device=DEVICE)):
        eager = fields_and_gradient(losses, student, *arguments, temperature)
        for value, expected in zip(fields_and_gradient(compiled, student, *arguments, temperature), eager, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_a_schedule_of_tensors_compiles_nothing_anew():
    def loss(student: Tensor, teacher: Tensor, temperature: Tensor, kl_weight: Tensor) -> Tensor:
        return softmax_kl(student, teacher, temperature=temperature, kl_weight=kl_weight, impl="triton").loss

    torch.compiler.reset()
    student, teacher = random_logits(ROWS, VOCAB).values()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    temperatures, kl_weights = torch.tensor([[3.0, 2.0, 0.5], [1.0, 0.5, 0.2]], device=DEVICE)
    compiled(student, teacher, temperatures[0], kl_weights[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        values = {compiled(student, teacher, t, k).item() for t, k in zip(temperatures, kl_weights, strict=True)}
    assert len(values) == 3


@needs_gpu
def test_the_host_never_waits_for_the_device():
    arguments = random_logits(ROWS, VOCAB) | {"targets": random_targets(ROWS, vocab=VOCAB), "ce_weight": 0.5}
    arguments |= {"mask": random_mask(ROWS), "temperature": torch.tensor(2.0, device=DEVICE), "impl": "triton"}
    differentiate(softmax_kl, arguments, ["student_logits"])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(softmax_kl, arguments, ["student_logits"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_forward_and_backward_replay_from_a_cuda_graph():
    arguments = random_logits(ROWS, VOCAB) | {"targets": random_targets(ROWS, vocab=VOCAB), "ce_weight": 0.5}
    student = arguments["student_logits"].requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(softmax_kl(**arguments, impl="triton").loss, student)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = softmax_kl(**arguments, impl="triton").loss
        (gradient,) = torch.autograd.grad(loss, student)
    with torch.no_grad():
        student.mul_(0.5)
    graph.replay()
    expected = softmax_kl(**arguments, impl="triton").loss
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, student)[0])
