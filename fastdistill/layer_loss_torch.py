"""The PyTorch path of layer_loss: one layer's errors in chunks of tokens, with the gradient in closed form.

`reference.py` defines the errors. With e = s - t over D channels, or n_s - n_t where both are layer-normalised first,
their gradients with respect to s are

    mse, none          2 e / D
    mse, teacher_rms   2 e / (D (mean t^2 + eps))
    mse, layer_norm    2 (e - n_s mean(e n_s)) / (D sigma_s)
    cosine             (cos s / |s| - t / (|t| + eps)) / (|s| + eps)

Numbers of the token that they need are kept from the forward pass for the backward pass, and no [N, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistill.differentiation import first_derivative_only, full_precision
from fastdistill.reference import LAYER_EPS, compute_dtype
from fastdistill.rows import TokenRows

CHUNK_BYTES = 1 << 20
"""Bytes of one [tokens, D] buffer, so that the few in use stay in a CPU core's second-level cache."""

GPU_CHUNK_BYTES = 128 << 20
"""The same on a GPU, where a chunk must be large beside the cost of launching its operations. Never measured on one."""


def layer_error(student: Tensor, teacher: Tensor, chunks: list[TokenRows], metric: str, normalize: str) -> Tensor:
    """The sum of w_i error_i, 0-d, of `student` and `teacher` `[B, S, D]` or `[N, D]` over tokens in `chunks`."""
    return _LayerError.apply(student, teacher, chunks, _FORMS[metric, normalize])


def layer_chunks(rows: TokenRows, student: Tensor) -> list[TokenRows]:
    """The rows in chunks for a layer like `student`, all about as long."""
    chunk_bytes = CHUNK_BYTES if student.device.type == "cpu" else GPU_CHUNK_BYTES
    most = max(1, chunk_bytes // (student.shape[-1] * compute_dtype(student).itemsize))
    count = max(1, -(-len(rows) // most))
    return list(rows.chunks(max(1, -(-len(rows) // count))))


def _mse(s: Tensor, t: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
    return _mean_square(torch.sub(s, t, out=buffers[0])), torch.full_like(s[:, 0], 2 / s.shape[-1])


def _teacher_rms(s: Tensor, t: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
    scale = 1 / (_mean_square(t) + LAYER_EPS)
    return _mean_square(torch.sub(s, t, out=buffers[0])) * scale, 2 / s.shape[-1] * scale


def _layer_norm(s: Tensor, t: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
    d_s, mean_s, r_s = _centred(s, buffers[0])
    d_t, mean_t, r_t = _centred(t, buffers[1])
    e = d_t.mul_(-r_t[:, None]).addcmul_(d_s, r_s[:, None])
    error = _mean_square(e)
    along = d_s.mul_(e).sum(-1) * r_s / s.shape[-1]
    return error, 2 / s.shape[-1] * r_s, mean_s, r_s, mean_t, r_t, along


def _cosine(s: Tensor, t: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
    norm_s, norm_t = torch.linalg.vector_norm(s, dim=-1), torch.linalg.vector_norm(t, dim=-1)
    norms = (norm_s + LAYER_EPS) * (norm_t + LAYER_EPS)
    cos = torch.mul(s, t, out=buffers[0]).sum(-1) / norms
    return 1 - cos, 1 / norms, torch.where(norm_s > 0, cos * (norm_t + LAYER_EPS) / norm_s, 0)


_FORMS = {
    ("mse", "none"): _mse,
    ("mse", "teacher_rms"): _teacher_rms,
    ("mse", "layer_norm"): _layer_norm,
    ("cosine", "none"): _cosine,
}
"""Each gives of s and t `[n, D]` the errors and what `_write_gradient` takes, `[n]` each.

Two buffers like s are theirs to write on: memory that is new is slow at first use.
"""


def _mean_square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square_() / x.shape[-1]


def _centred(x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x less its mean `[n, D]`, in the buffer; the mean; 1 / deviation."""
    mean = x.sum(-1) / x.shape[-1]
    d = torch.sub(x, mean[:, None], out=buffer)
    return d, mean, 1 / (_mean_square(d) + LAYER_EPS).sqrt_()


class _LayerError(torch.autograd.Function):
    """Saves its inputs and a few numbers a token."""

    @staticmethod
    def forward(ctx, student, teacher, chunks, form):
        errors, numbers = [], []
        for chunk, s, t, *buffers in _walk(student, teacher, chunks):
            with full_precision(s):
                error, *gradient = form(s, t, *buffers)
            errors.append(chunk.zero_uncounted_(error.mul_(chunk.weights)))
            numbers.append(torch.stack(gradient))
        ctx.save_for_backward(student, teacher, torch.cat(numbers, 1))
        ctx.chunks = chunks
        return torch.cat(errors).sum()

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss):
        student, teacher, numbers = ctx.saved_tensors
        make = torch.empty_like if numbers.shape[1] == student[..., 0].numel() else torch.zeros_like
        output = make(student, memory_format=torch.contiguous_format)
        start = 0
        for chunk, s, t, *buffers in _walk(student, teacher, ctx.chunks):
            scale, *others = numbers[:, start : start + len(chunk), None]
            start += len(chunk)
            place = chunk.neighbours(output)
            into = place if place is not None and place.dtype == s.dtype else buffers[1]
            with full_precision(s):
                _write_gradient(into, buffers[0], s, t, scale * (dloss * chunk.weights)[:, None], *others)
            chunk.zero_uncounted_(into).masked_fill_(dloss == 0, 0)  # of a layer that is left out, whatever it holds
            if into is not place:
                chunk.put(output, into)
        return output, None, None, None


def _write_gradient(into: Tensor, buffer: Tensor, s: Tensor, t: Tensor, scale: Tensor, *others: Tensor) -> None:
    if not others:
        torch.sub(s, t, out=into).mul_(scale)
    elif len(others) == 1:
        torch.mul(s, scale * others[0], out=into).addcmul_(t, -scale)
    else:
        mean_s, r_s, mean_t, r_t, along = others
        d_t = torch.sub(t, mean_t, out=buffer)
        e = torch.sub(s, mean_s, out=into).mul_(r_s).addcmul_(d_t, -r_t)
        e.mul_(scale * (1 - along)).addcmul_(d_t, -scale * along * r_t)  # e - n_s along, with n_s = e + n_t


def _walk(student: Tensor, teacher: Tensor, chunks: list[TokenRows]) -> Iterator[tuple[Any, ...]]:
    """Each chunk with the student's and the teacher's vectors, not to be changed, and two buffers like them.

    All four are `[n, D]` in the compute dtype.
    """
    dtype = compute_dtype(student)
    buffers = student.new_empty(2, len(chunks[0]), student.shape[-1], dtype=dtype)
    for chunk in chunks:
        vectors = (_vectors(chunk, states.detach(), dtype) for states in (student, teacher))
        yield chunk, *vectors, *buffers[:, : len(chunk)]


def _vectors(chunk: TokenRows, states: Tensor, dtype: torch.dtype) -> Tensor:
    view = chunk.neighbours(states)
    return chunk.take(states, dtype) if view is None else view.to(dtype)
