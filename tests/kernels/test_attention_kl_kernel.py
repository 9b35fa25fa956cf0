"""attention_kl's kernels: registered as operations, the same result whatever their tiles, never waited for."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from fastdistill import attention_kl, ops, reference
from fastdistill.kernels import attention_kl as kernels
from fastdistill.kernels.launch import AttentionPlan
from fastdistill.testing import DEVICE, assert_matches, differentiate, random_attention, random_mask

B, H, S, D = 2, 4, 40, 16
LEARNED = ("student_q", "student_k")
ours = partial(attention_kl, impl="triton")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU has streams to wait for and graphs to capture")


@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1], [4, 5, 5]])], ids=["rows", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_operations_are_registered_as_pytorch_wants_them(dtype, documents):
    compute = torch.promote_types(dtype, torch.float32)
    vectors = list(random_attention(2, 4, 3, 5, key_heads=2, dtype=dtype).values())
    weights = random_mask(2, 3, dtype=torch.float32).to(compute)
    scalars = torch.tensor([0.5, 0.25, 2.0], device=DEVICE, dtype=compute)
    rest = weights, None if documents is None else documents.to(DEVICE), scalars
    learned = [x.clone().requires_grad_() for x in vectors[:2]]
    opcheck(ops.attention_kl, (*learned, *vectors[2:], *rest, True, False))
    total, per_head, statistics = ops.attention_kl(*learned, *vectors[2:], *rest, True, False)
    assert total.requires_grad
    assert not per_head.requires_grad
    assert not statistics.requires_grad
    opcheck(ops.attention_kl_backward, (total.detach(), *vectors, *rest, statistics, True, False))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (32, 16), (16, 32), (64, 64)])
def test_tiles_change_nothing_but_the_order_of_sums(queries, keys, causal, monkeypatch):
    monkeypatch.setattr(kernels, "attention_plan", lambda *types: AttentionPlan(4, queries, keys, False))
    arguments = random_attention(1, 2, S, D, key_heads=1) | {"causal": causal}
    assert_matches(ours, reference.attention_kl, arguments | {"mask": random_mask(1, S)}, LEARNED)


def test_vectors_too_wide_for_the_kernels_are_refused_with_their_limit():
    with pytest.raises(RuntimeError, match="at most 128 channels of these types here, got 256"):
        ours(**random_attention(1, 1, 2, 129))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_host_never_waits_for_the_device(dtype):
    arguments = random_attention(B, H, S, D, dtype=dtype) | {"mask": random_mask(B, S)}
    differentiate(ours, arguments, LEARNED)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(ours, arguments, LEARNED)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_forward_and_backward_replay_from_a_cuda_graph():
    arguments: dict[str, Any] = random_attention(B, H, S, D, dtype=torch.float16) | {"mask": random_mask(B, S)}
    learned = [arguments[name].requires_grad_() for name in LEARNED]

    def step() -> tuple[Tensor, ...]:
        loss = ours(**arguments).loss
        return loss.detach(), *torch.autograd.grad(loss, learned)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in learned:
            x.mul_(0.5)
    graph.replay()
    assert all(map(torch.equal, captured, step()))
