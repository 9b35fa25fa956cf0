"""softmax_kl on a GPU beside eager PyTorch, torch.compile and Liger-Kernel, forward and backward, in one process:

python -m bench.gpu_softmax_kl results.json

The loss is forward KL and cross-entropy at T = 1, the mean over tokens. Each implementation is first compared with the
definition in float64. Times are medians with a cold L2 cache. GB/s are on the floor of 3 elements a pair (both models'
logits read, the gradient written), and on the bytes that softmax_kl's two launches move, 5 elements a pair; the rate
of a copy of the same size is measured beside them. Peak memory is what a step needs beyond its inputs and gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill
from bench.gpu import copy_rate, main, median_ms, peak_bytes
from fastdistill import reference
from fastdistill.testing import random_normal, random_targets, relative_error

SHAPES = [(8192, 128256, torch.bfloat16), (8192, 50257, torch.bfloat16), (16384, 32000, torch.float16)]

Step = Callable[[], tuple[Tensor, Tensor]]
"""Loss and gradient."""


def steps(student: Tensor, teacher: Tensor, targets: Tensor) -> dict[str, Step]:
    """What is compared, on one set of inputs; `student` requires a gradient."""

    def autograd_step(loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        value = loss(student, teacher, targets)
        return value.detach(), torch.autograd.grad(value, student)[0]

    def eager(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return reference.softmax_kl(student, teacher, targets, ce_weight=1.0).loss

    def ours(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return fastdistill.softmax_kl(student, teacher, targets, ce_weight=1.0, impl="triton").loss

    found = {
        "eager": partial(autograd_step, eager),
        "torch.compile": partial(autograd_step, torch.compile(eager)),
        "fastdistill, two launches": partial(autograd_step, ours),
        "fastdistill, one launch": partial(one_launch_step, student.detach(), teacher, targets),
    }
    if find_spec("liger_kernel"):
        found["Liger-Kernel"] = partial(autograd_step, liger_loss)
    return found


def one_launch_step(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from fastdistill.kernels.softmax_kl import softmax_kl_one_launch

    rows, vocab = student.shape
    gradient, weights = torch.empty_like(student), student.new_ones(rows, dtype=torch.float32)
    values, _ = softmax_kl_one_launch(
        weights / rows,
        student,
        teacher,
        targets,
        weights,
        weights.new_ones(4),
        gradient,
        divergence="forward_kl",
        shared_vocab=vocab,
        metrics=False,
        power=1,
        kl_in_loss=True,
        ce_in_loss=True,
    )
    return values[0].mean(), gradient


def liger_loss(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """The same loss as its users compose it: its KL takes log-probabilities, which PyTorch makes."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss  # pyright: ignore[reportMissingImports]

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return kl(F.log_softmax(student, -1), F.log_softmax(teacher, -1)) + LigerCrossEntropyLoss()(student, targets)


def errors(step: Step, student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[float, float]:
    """Relative errors of loss and gradient; the truth is float64, a slice of rows at a time."""
    loss, gradient = step()
    truth, true_gradient = 0.0, torch.empty_like(gradient)
    for part in torch.arange(len(student), device=student.device).split(256):
        leaf = student.detach()[part].double().requires_grad_()
        value = reference.softmax_kl(leaf, teacher[part].double(), targets[part], ce_weight=1.0, reduction="sum").loss
        truth += value.item() / len(student)
        true_gradient[part] = (torch.autograd.grad(value, leaf)[0] / len(student)).to(gradient.dtype)
    return abs(loss.item() - truth) / truth, relative_error(gradient[:256], true_gradient[:256])


def results() -> Iterator[dict[str, Any]]:
    for rows, vocab, dtype in SHAPES:
        student = random_normal(rows, vocab, scale=2, dtype=dtype).requires_grad_()
        teacher = random_normal(rows, vocab, seed=1, scale=2, dtype=dtype)
        targets = random_targets(rows, vocab=vocab, ignored=0)
        rate, pair_bytes = copy_rate(rows * vocab, dtype), rows * vocab * dtype.itemsize
        for name, step in steps(student, teacher, targets).items():
            loss_error, gradient_error = errors(step, student, teacher, targets)
            peak, ms = peak_bytes(step), median_ms(step)
            yield {
                "implementation": name,
                "rows": rows,
                "vocab": vocab,
                "dtype": str(dtype),
                "copy_gb_per_s": rate,
                "loss_error": loss_error,
                "gradient_error": gradient_error,
                "ms": ms,
                "gb_per_s_floor": 3 * pair_bytes / ms / 1e6,
                "gb_per_s_two_launches": 5 * pair_bytes / ms / 1e6,
                "peak_mb_beyond_gradient": (peak - pair_bytes) / 1e6,
            }


if __name__ == "__main__":
    sys.exit(main("gpu_softmax_kl", results))
