"""layer_loss over mapped layers, forward and backward, beside what one would write without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill

SHAPES = {"large": (12, 8, 512, 768), "small": (6, 2, 512, 768), "tiny": (2, 2, 3, 8)}
"""Layers, sequences, positions, width."""
FORMS = [("mse", "none"), ("mse", "layer_norm"), ("mse", "teacher_rms"), ("cosine", "none")]


def distance(s: Tensor, t: Tensor, metric: str, normalize: str) -> Tensor:
    """Of each token, `[B, S]`."""
    if metric == "cosine":
        return 1 - F.cosine_similarity(s, t, dim=-1)
    if normalize == "layer_norm":
        s, t = F.layer_norm(s, s.shape[-1:]), F.layer_norm(t, t.shape[-1:])
    error = F.mse_loss(s, t, reduction="none").mean(-1)
    return error / (t.square().mean(-1) + 1e-5) if normalize == "teacher_rms" else error


def eager(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, **form: str) -> Tensor:
    """The shortest composition in PyTorch."""
    count = mask.sum()
    losses = [(distance(s, t, **form) * mask).sum() / count for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()


def ours(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, *, metric: str, normalize: str) -> Tensor:
    return fastdistill.layer_loss(student, teacher, mask, metric=metric, normalize=normalize, impl="torch").loss


IMPLEMENTATIONS = {"eager": eager, "torch": ours}


def make_mask(sequences: int, positions: int) -> Tensor:
    """A tenth of the positions, at the end, is padding."""
    return torch.arange(positions).expand(sequences, positions) < positions - positions // 10


def make_step(implementation: str, shape: tuple[int, int, int, int], metric: str, normalize: str) -> Callable[[], None]:
    torch.manual_seed(0)
    layers, *state = shape
    student = [torch.randn(state, requires_grad=True) for _ in range(layers)]
    teacher = [torch.randn(state) for _ in range(layers)]
    mask = make_mask(state[0], state[1])
    loss = partial(IMPLEMENTATIONS[implementation], student, teacher, mask, metric=metric, normalize=normalize)

    def step() -> None:
        for each in student:
            each.grad = None
        loss().backward()

    return step


@pytest.mark.parametrize(("metric", "normalize"), FORMS)
def test_both_compute_the_same_loss(metric, normalize):
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 2, 20, 8).unbind() for _ in range(2))
    form = {"metric": metric, "normalize": normalize}
    values = [loss(student, teacher, make_mask(2, 20), **form) for loss in IMPLEMENTATIONS.values()]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("metric", "normalize"), FORMS)
@pytest.mark.parametrize("which", ["large", "small"])
def test_layer_loss(measure, size, which, metric, normalize, implementation):
    case = {"implementation": implementation, "shape": SHAPES[which if size == "real" else size]}
    measure("layer_loss", make_step, **case, metric=metric, normalize=normalize, rounds=15)
