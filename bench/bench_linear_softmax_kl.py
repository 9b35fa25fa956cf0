"""linear_softmax_kl, forward and backward to hidden states and head: forward KL and cross-entropy at T = 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

import fastdistill
from fastdistill import reference

SHAPES = {"real": (4096, 50257, 768), "tiny": (5, 101, 8)}
IMPLEMENTATIONS = {"eager": reference.linear_softmax_kl, "torch": partial(fastdistill.linear_softmax_kl, impl="torch")}


def make_step(implementation: str, shape: tuple[int, int, int]) -> Callable[[], None]:
    torch.manual_seed(0)
    n, vocab, width = shape
    student_hidden, teacher_hidden = torch.randn(n, width, requires_grad=True), torch.randn(n, width)
    student_weight, teacher_weight = torch.randn(vocab, width), torch.randn(vocab, width)
    for weight in (student_weight, teacher_weight):
        weight.mul_(width**-0.5)
    student_weight.requires_grad_()
    targets = torch.randint(vocab, (n,))
    linear_softmax_kl = IMPLEMENTATIONS[implementation]

    def step() -> None:
        student_hidden.grad = student_weight.grad = None
        linear_softmax_kl(
            student_hidden, student_weight, teacher_hidden, teacher_weight, targets, temperature=2.0, ce_weight=1.0
        ).loss.backward()

    return step


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_linear_softmax_kl(measure, size, implementation):
    measure("linear_softmax_kl", make_step, implementation=implementation, shape=SHAPES[size])
