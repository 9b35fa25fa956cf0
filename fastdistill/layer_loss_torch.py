"""The PyTorch path of layer_loss: errors of tokens in chunks, with the gradient in closed form.

`reference.py` defines the errors. With e = s - t over D channels, or n_s - n_t where both are layer-normalised first,
their gradients with respect to s are

    none           2 e / D
    teacher_rms    2 e / (D (mean t^2 + eps))
    layer_norm     2 (e - n_s mean(e n_s)) / (D sigma_s)
    cosine         (cos s / |s| - t / (|t| + eps)) / (|s| + eps)

A pass over a token's vectors leaves a few numbers of it, `SUMS`; errors are made of those of all tokens and layers at
once, and a second pass makes the gradient with their help. No [N, D] is kept between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.differentiation import first_derivative_only
from fastdistill.reference import LAYER_EPS, compute_dtype
from fastdistill.rows import TokenRows, flattened

CHUNK_BYTES = 1 << 21
"""Bytes of one [tokens, D] buffer. Two are in use, and stay in the second-level caches of the CPU cores at work."""

GPU_CHUNK_BYTES = 128 << 20
"""The same on a GPU, where a chunk must be large beside the cost of launching its operations. Never measured on one."""

SCATTERED = 64
"""Fewer rows than these lying together, on average, are copied together: each chunk has its cost."""


def layer_errors(students: list[Tensor], teachers: list[Tensor], rows: TokenRows, form: str) -> Tensor:
    """The sum of w_i error_i of each layer, `[L]`, over the tokens in `rows`.

    The layers' states are `[B, S, D]` or `[N, D]`: students of one shape and dtype, teachers of one shape.
    """
    return _LayerErrors.apply(rows, form, len(students), *students, *teachers)


# What a pass leaves ---------------------------------------------------------------------------------------------------

SUMS = {"none": 1, "teacher_rms": 2, "layer_norm": 6, "cosine": 3}
"""Numbers of a token: |e|; |e| and |t|; |e|, e . n_s, and the mean and 1 / deviation of s and of t; |s|, |t|, s . t."""


def _sum_up(form: str, sums: Tensor, s: Tensor, t: Tensor, *buffers: Tensor) -> None:
    """Into `sums` `[SUMS[form], n]`, the numbers of `s` and `t` `[n, D]`; the buffers are like these, to be written on.

    New memory in their place would be slow at its first use.
    """
    if form == "layer_norm":
        d_s, d_t = (_centred(x, buffer, *sums[i : i + 2]) for x, buffer, i in ((s, buffers[0], 2), (t, buffers[1], 4)))
        e = d_t.mul_(-sums[5, :, None]).addcmul_(d_s, sums[3, :, None])
        _norm(e, sums[0])
        # From the rounded e: what rounding put into it along n_s is then taken out of the gradient again.
        torch.sum(d_s.mul_(e), -1, out=sums[1]).mul_(sums[3])
    elif form == "cosine":
        _norm(s, sums[0])
        _norm(t, sums[1])
        torch.sum(torch.mul(s, t, out=buffers[0]), -1, out=sums[2])
    else:
        _norm(torch.sub(s, t, out=buffers[0]), sums[0])
        if form == "teacher_rms":
            _norm(t, sums[1])


def _norm(x: Tensor, into: Tensor) -> None:
    torch.linalg.vector_norm(x, dim=-1, out=into)


def _centred(x: Tensor, buffer: Tensor, mean: Tensor, inverse_deviation: Tensor) -> Tensor:
    """x less its mean, in the buffer; the two numbers are written."""
    torch.sum(x, -1, out=mean).div_(x.shape[-1])
    d = torch.sub(x, mean[:, None], out=buffer)
    _norm(d, inverse_deviation)
    inverse_deviation.square_().div_(x.shape[-1]).add_(LAYER_EPS).rsqrt_()
    return d


def _errors(form: str, sums: Tensor, width: int) -> Tensor:
    if form == "cosine":
        return 1 - sums[2] / ((sums[0] + LAYER_EPS) * (sums[1] + LAYER_EPS))
    error = sums[0].square() / width
    return error / (sums[1].square() / width + LAYER_EPS) if form == "teacher_rms" else error


# The gradient ---------------------------------------------------------------------------------------------------------


def _factors(form: str, sums: Tensor, width: int) -> Tensor:
    """What `_write_gradient` needs of each token; the first number multiplies all of its gradient."""
    if form == "cosine":
        norm_s, norm_t = sums[0], sums[1] + LAYER_EPS
        norms = (norm_s + LAYER_EPS) * norm_t
        return torch.stack([1 / norms, torch.where(norm_s > 0, sums[2] / norms * norm_t / norm_s, 0)])
    if form == "layer_norm":
        _, along, mean_s, r_s, mean_t, r_t = sums
        return torch.stack([2 / width * r_s, mean_s, r_s, mean_t, r_t, along / width])
    scale = torch.full_like(sums[0], 1 / width)
    return (scale / (sums[1].square() / width + LAYER_EPS) if form == "teacher_rms" else scale)[None]


def _write_gradient(into: Tensor, buffer: Tensor, s: Tensor, t: Tensor, scale: Tensor, *others: Tensor) -> None:
    """The gradient `[n, D]` from what `_factors` gives of these tokens, `[n, 1]` each."""
    if not others:
        torch.ops.aten.mse_loss_backward.grad_input(scale, s, t, 0, grad_input=into)  # 2 scale e, in one pass
    elif len(others) == 1:
        torch.mul(s, scale * others[0], out=into).addcmul_(t, -scale)
    else:
        mean_s, r_s, mean_t, r_t, along = others
        d_t = torch.sub(t, mean_t, out=buffer)
        e = torch.sub(s, mean_s, out=into).mul_(r_s).addcmul_(d_t, -r_t)
        e.mul_(scale * (1 - along)).addcmul_(d_t, -scale * along * r_t)  # e - n_s along, with n_s = e + n_t


class _LayerErrors(torch.autograd.Function):
    """Saves its inputs and the numbers that a pass leaves."""

    @staticmethod
    def forward(ctx, rows, form, layers, *states):
        sums = rows.weights.new_empty(SUMS[form], layers, len(rows))
        for chunk in _chunks(states[:layers], states[layers:], rows):
            _sum_up(form, sums[:, chunk.layer, chunk.part], chunk.student, chunk.teacher, *chunk.buffers)
        errors = _errors(form, sums, states[0].shape[-1]) * rows.weights
        ctx.save_for_backward(sums, *states)
        ctx.rows, ctx.form = rows, form
        return rows.zero_uncounted_(errors.T).sum(0)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss):
        sums, *states = ctx.saved_tensors
        students, teachers = states[: len(dloss)], states[len(dloss) :]
        rows, form = ctx.rows, ctx.form
        outputs = [_output(student, rows) for student in students]
        factors = _factors(form, sums, students[0].shape[-1])
        factors[0] *= dloss[:, None] * rows.weights
        for chunk in _chunks(students, teachers, rows):
            output, buffers = outputs[chunk.layer], chunk.buffers
            direct = chunk.span is not None and output.dtype == chunk.student.dtype
            into = output.view(-1, output.shape[-1])[chunk.span] if direct else buffers[1]
            numbers = factors[:, chunk.layer, chunk.part, None].unbind()
            _write_gradient(into, buffers[0], chunk.student, chunk.teacher, *numbers)
            chunk.rows.zero_uncounted_(into)
            if not direct:
                chunk.rows.put(output, into)
        for output, is_off in zip(outputs, dloss == 0, strict=True):  # layers left out, whatever they hold
            if dloss.device.type != "cpu" or is_off:
                output.masked_fill_(is_off, 0)
        return None, None, None, *outputs, *(None,) * len(teachers)


def _output(student: Tensor, rows: TokenRows) -> Tensor:
    """Memory for the gradient `[B, S, D]` or `[N, D]`, contiguous, with zeros outside of `rows`."""
    output = torch.empty_like(student, memory_format=torch.contiguous_format)
    if len(rows) == student[..., 0].numel():
        return output
    if not rows.all_counted:  # on a GPU, which would have to be waited for to know where they are
        return output.zero_()
    left_out = torch.ones_like(student[..., 0], dtype=torch.bool)
    rows.put(left_out, torch.zeros_like(rows.weights))
    output.view(-1, output.shape[-1]).index_fill_(0, left_out.flatten().nonzero()[:, 0], 0)
    return output


class _Chunk(NamedTuple):
    """Some tokens of a layer."""

    layer: int
    part: slice
    """Which of all rows they are."""
    rows: TokenRows
    span: slice | None
    """Where they are in the student's states, if they lie one after another."""
    student: Tensor
    """`[n, D]` in the compute dtype, not to be changed, like `teacher`."""
    teacher: Tensor
    buffers: Tensor
    """Two like these."""


def _chunks(students: Sequence[Tensor], teachers: Sequence[Tensor], rows: TokenRows) -> Iterator[_Chunk]:
    width, dtype = students[0].shape[-1], compute_dtype(students[0])
    chunks = list(rows.split(_sizes(rows, width * dtype.itemsize)))
    spans = [tuple(chunk.span(states[0].shape[-2]) for states in (students, teachers)) for chunk in chunks]
    buffers = rows.weights.new_empty(2, max(map(len, chunks)), width)
    for layer, pair in enumerate(zip(students, teachers, strict=True)):
        pair = [states.detach() for states in pair]
        flat = [flattened(states) for states in pair]
        start = 0
        for chunk, places in zip(chunks, spans, strict=True):
            vectors = (
                chunk.take(states, dtype) if view is None or place is None else view[place].to(dtype)
                for states, view, place in zip(pair, flat, places, strict=True)
            )
            part = slice(start, start := start + len(chunk))
            student, teacher = vectors
            yield _Chunk(layer, part, chunk, places[0], student, teacher, buffers[:, : len(chunk)])


def _sizes(rows: TokenRows, row_bytes: int) -> list[int]:
    """Of chunks that fit the memory for one; on the CPU of rows that lie together, unless they are scattered."""
    on_cpu = rows.weights.device.type == "cpu"
    most = max(1, (CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES) // row_bytes)
    runs = rows.runs() if on_cpu and len(rows) else [len(rows)]
    if len(rows) < SCATTERED * len(runs):
        runs = [len(rows)]
    counts = [max(1, -(-run // most)) for run in runs]
    return [run // count + (i < run % count) for run, count in zip(runs, counts, strict=True) for i in range(count)]
