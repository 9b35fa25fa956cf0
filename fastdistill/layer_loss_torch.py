"""The PyTorch path of layer_loss: one layer's error a token, in chunks, with the gradient in closed form.

`reference.py` defines the errors. With e = s - t over D channels, their gradients with respect to s are

    mse, none          2 e / D
    mse, teacher_rms   2 e / (D (mean t^2 + eps))
    mse, layer_norm    (g - n mean(g n)) / sigma,  n = layer_norm(s), g = 2 (n - layer_norm(t)) / D, whose mean is 0
    cosine             -(t / (|t| + eps) - cos s / |s|) / (|s| + eps)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.differentiation import first_derivative_only, full_precision
from fastdistill.reference import LAYER_EPS, compute_dtype
from fastdistill.rows import TokenRows

CHUNK_BYTES = 1 << 20
"""Bytes of one [tokens, D] buffer, so that the few in use stay in a CPU core's second-level cache."""

GPU_CHUNK_BYTES = 128 << 20
"""The same on a GPU, where a chunk must be large beside the cost of launching its operations. Never measured on one."""


def token_errors(student: Tensor, teacher: Tensor, rows: TokenRows, metric: str, normalize: str) -> Tensor:
    """Weighted errors w_i error_i `[n]` of `student` and `teacher` `[B, S, D]` or `[N, D]` at `rows`."""
    return _TokenErrors.apply(student, teacher, rows, _FORMS[metric, normalize])


def _mse(s: Tensor, t: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    e = s.sub_(t)
    error = torch.linalg.vecdot(e, e) / e.shape[-1]
    return error, e.mul_(2 / e.shape[-1]) if gradient else None


def _teacher_rms(s: Tensor, t: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    scale = 1 / (torch.linalg.vecdot(t, t) / t.shape[-1] + LAYER_EPS)
    error, grad = _mse(s, t, gradient)
    return error * scale, None if grad is None else grad.mul_(scale[:, None])


def _layer_norm(s: Tensor, t: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    width = s.shape[-1:]
    n_s, _, inverse_sigma = torch.native_layer_norm(s, width, None, None, LAYER_EPS)
    n_t = F.layer_norm(t, width, eps=LAYER_EPS)
    error, g = _mse(s.copy_(n_s), n_t, gradient)
    if g is None:
        return error, None
    along = torch.linalg.vecdot(g, n_s)[:, None] / width[0]
    return error, g.sub_(n_s.mul_(along)).mul_(inverse_sigma)


def _cosine(s: Tensor, t: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    norm = s.norm(dim=-1, keepdim=True)
    t.div_(t.norm(dim=-1, keepdim=True) + LAYER_EPS)
    cos = torch.linalg.vecdot(s, t)[:, None] / (norm + LAYER_EPS)
    error = 1 - cos.squeeze(-1)
    if not gradient:
        return error, None
    along = torch.where(norm > 0, cos / norm, 0)
    return error, s.mul_(along).sub_(t).div_(norm + LAYER_EPS)


_FORMS = {
    ("mse", "none"): _mse,
    ("mse", "teacher_rms"): _teacher_rms,
    ("mse", "layer_norm"): _layer_norm,
    ("cosine", "none"): _cosine,
}


class _TokenErrors(torch.autograd.Function):
    """Saves its inputs and nothing else; backward makes the rows' gradient anew."""

    @staticmethod
    def forward(ctx, student, teacher, rows, form):
        ctx.save_for_backward(student, teacher)
        ctx.rows, ctx.form = rows, form
        errors = [
            chunk.zero_uncounted_(error * chunk.weights)
            for chunk, error, _ in _walk(student, teacher, rows, form, gradient=False)
        ]
        return torch.cat(errors)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss):
        student, teacher = ctx.saved_tensors
        output = torch.zeros_like(student)
        start = 0
        for chunk, _, grad in _walk(student, teacher, ctx.rows, ctx.form, gradient=True):
            grad.mul_((dloss[start : start + len(chunk)] * chunk.weights)[:, None])
            chunk.put(output, chunk.zero_uncounted_(grad))
            start += len(chunk)
        return output, None, None, None


def _walk(student, teacher, rows, form, *, gradient):
    """(chunk of rows, its errors, its gradient) for every chunk."""
    dtype = compute_dtype(student)
    chunk_bytes = CHUNK_BYTES if student.device.type == "cpu" else GPU_CHUNK_BYTES
    for chunk in rows.chunks(max(1, chunk_bytes // (student.shape[-1] * dtype.itemsize))):
        s, t = chunk.take(student.detach(), dtype), chunk.take(teacher.detach(), dtype)
        with full_precision(s):
            error, grad = form(s, t, gradient)
        yield chunk, error, grad
