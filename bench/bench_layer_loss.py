"""layer_loss over mapped layers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

import fastdistill
from fastdistill import reference

SHAPES = {"real": (12, 8, 512, 768), "tiny": (2, 2, 3, 8)}
IMPLEMENTATIONS = {"eager": reference.layer_loss, "torch": partial(fastdistill.layer_loss, impl="torch")}
FORMS = [("mse", "none"), ("mse", "layer_norm"), ("mse", "teacher_rms"), ("cosine", "none")]


def make_step(implementation: str, shape: tuple[int, int, int, int], metric: str, normalize: str) -> Callable[[], None]:
    torch.manual_seed(0)
    layers, *state = shape
    student = [torch.randn(state, requires_grad=True) for _ in range(layers)]
    teacher = [torch.randn(state) for _ in range(layers)]
    layer_loss = IMPLEMENTATIONS[implementation]

    def step() -> None:
        for each in student:
            each.grad = None
        layer_loss(student, teacher, metric=metric, normalize=normalize).loss.backward()

    return step


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("metric", "normalize"), FORMS)
def test_layer_loss(measure, size, metric, normalize, implementation):
    measure(
        "layer_loss", make_step, implementation=implementation, shape=SHAPES[size], metric=metric, normalize=normalize
    )
