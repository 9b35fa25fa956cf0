"""layer_loss on a GPU beside eager PyTorch and torch.compile, forward and backward, in one process:

python -m bench.gpu_layer_loss results.json

The mean over layers of a distance that masks no token. Each implementation is first compared with the definition in
float64. Times are medians with a cold L2 cache. GB/s are on the 5 elements a pair that two launches move (both models'
states read twice, the gradient written once: 10 bytes of 2-byte elements), and beside them stands the rate of a copy
of one layer; the floor would be 3 elements. Peak memory is what a step needs beyond its inputs and gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdistill
from bench.gpu import copy_rate, main, median_ms, peak_bytes
from fastdistill import reference
from fastdistill.testing import random_normal, relative_error

SHAPES = [
    (32, 8192, 4096, torch.bfloat16),
    (6, 1024, 768, torch.float16),
    (15, 4096, 576, torch.float16),
    (12, 4096, 8192, torch.bfloat16),
]
"""Layers, tokens, width."""

FORMS = {
    "mse": {},
    "mse teacher_rms": {"normalize": "teacher_rms"},
    "mse layer_norm": {"normalize": "layer_norm"},
    "cosine": {"metric": "cosine"},
}

Step = Callable[[], tuple[Tensor, tuple[Tensor, ...]]]
"""Loss and gradients."""


def steps(students: list[Tensor], teachers: list[Tensor], form: str) -> dict[str, Step]:
    """What is compared, on one set of inputs; `students` require a gradient."""

    def autograd_step(loss: Callable[..., Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(students, teachers, **FORMS[form]).loss
        return value.detach(), torch.autograd.grad(value, students)

    def by_layer(loss: Callable[..., Any], students: list[Tensor], teachers: list[Tensor], **how: str) -> Any:
        """Layer by layer, so that the compiler is given one layer, not a graph of 32."""
        losses = [loss([s], [t], **how).loss for s, t in zip(students, teachers, strict=True)]
        return fastdistill.LayerLossOutput(torch.stack(losses).mean(), torch.stack(losses))

    return {
        "eager": partial(autograd_step, reference.layer_loss),
        "torch.compile": partial(autograd_step, partial(by_layer, torch.compile(reference.layer_loss))),
        "fastdistill": partial(autograd_step, partial(fastdistill.layer_loss, impl="triton")),
        "fastdistill, PyTorch path": partial(autograd_step, partial(fastdistill.layer_loss, impl="torch")),
    }


def errors(step: Step, students: list[Tensor], teachers: list[Tensor], form: str) -> tuple[float, float]:
    """Relative errors of the loss and, the largest of all layers, of a gradient; the truth is float64."""
    loss, gradients = step()
    truth, worst = 0.0, 0.0
    for student, teacher, gradient in zip(students, teachers, gradients, strict=True):
        leaf = student.detach().double().requires_grad_()
        value = reference.layer_loss([leaf], [teacher.double()], **FORMS[form]).loss / len(students)
        truth += value.item()
        worst = max(worst, relative_error(gradient, torch.autograd.grad(value, leaf)[0]))
    return abs(loss.item() - truth) / truth, worst


def results() -> Iterator[dict[str, Any]]:
    for layers, tokens, width, dtype in SHAPES:
        students = [random_normal(tokens, width, seed=i, dtype=dtype).requires_grad_() for i in range(layers)]
        teachers = [random_normal(tokens, width, seed=100 + i, dtype=dtype) for i in range(layers)]
        rate, bytes_of_states = copy_rate(tokens * width, dtype), layers * tokens * width * dtype.itemsize
        for form in FORMS:
            for name, step in steps(students, teachers, form).items():
                loss_error, gradient_error = errors(step, students, teachers, form)
                peak, ms = peak_bytes(step), median_ms(step)
                rate_moved = 5 * bytes_of_states / ms / 1e6
                yield {
                    "implementation": name,
                    "form": form,
                    "layers": layers,
                    "tokens": tokens,
                    "width": width,
                    "dtype": str(dtype),
                    "copy_gb_per_s": rate,
                    "loss_error": loss_error,
                    "gradient_error": gradient_error,
                    "ms": ms,
                    "gb_per_s": rate_moved,
                    "of_copy": rate_moved / rate,
                    "peak_mb_beyond_gradients": (peak - bytes_of_states) / 1e6,
                }


if __name__ == "__main__":
    sys.exit(main("gpu_layer_loss", results))
