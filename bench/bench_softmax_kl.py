"""softmax_kl on logits, forward and backward: divergence and cross-entropy at T = 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

import fastdistill
from bench.peak_memory import peak_memory_mb
from fastdistill import reference

SHAPES = {"real": (1024, 50257), "tiny": (5, 101)}
IMPLEMENTATIONS = {"eager": reference.softmax_kl, "torch": partial(fastdistill.softmax_kl, impl="torch")}


def make_step(implementation: str, shape: tuple[int, int], divergence: str) -> Callable[[], None]:
    torch.manual_seed(0)
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    targets = torch.randint(shape[1], shape[:1])
    softmax_kl = IMPLEMENTATIONS[implementation]

    def step() -> None:
        student.grad = None
        softmax_kl(student, teacher, targets, temperature=2.0, divergence=divergence, ce_weight=1.0).loss.backward()

    return step


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_softmax_kl(measure, size, divergence, implementation):
    measure("softmax_kl", make_step, implementation=implementation, shape=SHAPES[size], divergence=divergence)


def test_peak_memory_is_that_of_the_step_whatever_this_process_used_before():
    rows, vocab = 256, 16384
    torch.ones(40, rows, vocab)
    peak_mb = peak_memory_mb("softmax_kl", implementation="eager", shape=(rows, vocab), divergence="forward_kl")
    assert 4 < peak_mb * 1e6 / (4 * rows * vocab) < 20
