"""attention_kl, forward and backward to the student's queries and keys, beside the maps, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import fastdistill
from bench.peak_memory import peak_memory_mb
from fastdistill import reference
from fastdistill.testing import random_attention

SHAPES = {"long": (1, 9, 3, 2048, 64), "rows": (8, 12, 12, 128, 64), "tiny": (2, 4, 2, 5, 8)}
"""Rows, heads, heads of keys, positions, width: of both models."""


def compiled() -> Callable[..., Any]:
    torch.compiler.reset()  # of other shapes too
    return torch.compile(reference.attention_kl, dynamic=False, fullgraph=True)


IMPLEMENTATIONS: dict[str, Callable[[], Callable[..., Any]]] = {
    "eager": lambda: reference.attention_kl,
    "torch.compile": compiled,
    "torch": lambda: partial(fastdistill.attention_kl, impl="torch"),
}


def make_step(implementation: str, shape: tuple[int, int, int, int, int]) -> Callable[[], None]:
    batch, heads, key_heads, positions, width = shape
    inputs = random_attention(
        batch, heads, positions, width, key_heads=key_heads, teacher_key_heads=key_heads, device="cpu"
    )
    leaves = [inputs[name].requires_grad_() for name in ("student_q", "student_k")]
    attention_kl = IMPLEMENTATIONS[implementation]()

    def step() -> None:
        for each in leaves:
            each.grad = None
        attention_kl(**inputs).loss.backward()

    if implementation == "torch.compile":
        step()  # whose peak would be the compiler's
        for each in leaves:
            each.grad = None
    return step


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", ["long", "rows"])
def test_attention_kl(measure, size, which, implementation):
    shape = SHAPES[which if size == "real" else size]
    measure("attention_kl", make_step, implementation=implementation, shape=shape, rounds=5)


def test_the_peak_of_what_was_compiled_is_that_of_its_step():
    """Some maps: neither nothing nor what the compiler needs."""
    peak_mb = peak_memory_mb("attention_kl", implementation="torch.compile", shape=(1, 9, 3, 256, 64))
    assert 1 < peak_mb * 1e6 / (4 * 9 * 256**2) < 6
