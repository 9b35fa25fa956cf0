"""The PyTorch path of attention_kl: maps of a block of queries at a time, and made anew for the gradient.

With p the softmaxes of a query's scores s, the gradient of KL(teacher || student) in the student's scores is
p_student - p_teacher. A query keeps the maximum of its scores and the sum Z = sum e^(s - max), of each model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.differentiation import first_derivative_only, full_precision
from fastdistill.reference import HIDDEN

BUFFERS = 3
"""Of a block of queries' scores, `[B, H, queries, S]`, that are alive at a time."""

CHUNK_BYTES = 2 << 20
"""Bytes of these together on a CPU, whose second-level caches should hold them. Smaller blocks also see fewer keys."""

GPU_CHUNK_BYTES = 128 << 20
"""The same on a GPU, where a block must be large beside the cost of launching its operations. Never measured on one."""

MIN_QUERIES = 16
"""Of a block, whatever its bytes: products of fewer rows are slow."""

STATISTICS = 4
"""Numbers that are kept of a query and head: maximum and sum of both models."""


class Model(NamedTuple):
    """Queries `[B, H, S, d]`, keys `[B, Hkv, S, d]` and what their products are multiplied by."""

    query: Tensor
    key: Tensor
    scale: float


class Sight(NamedTuple):
    """Which queries count and what they see, as `reference.attention_visible` has it of `weights != 0`."""

    weights: Tensor
    """Of each query, `[B, S]`, in the compute dtype."""
    documents: Tensor | None
    causal: bool
    itself: bool

    def hidden(self, queries: slice) -> Tensor:
        """Whether some queries do not see the keys up to their last, or all keys: bool `[B, 1, queries, keys]`."""
        positions = torch.arange(self.weights.shape[1], device=self.weights.device)
        rows, columns = positions[queries, None], positions[: self.keys(queries)]
        counts = self.weights != 0
        hidden = ~(counts[:, queries, None] & counts[:, None, : len(columns)])
        if self.causal:
            hidden |= columns > rows
        if not self.itself:
            hidden |= columns == rows
        if self.documents is not None:
            hidden |= self.documents[:, queries, None] != self.documents[:, None, : len(columns)]
        return hidden[:, None]

    def keys(self, queries: slice) -> int:
        return queries.stop if self.causal else self.weights.shape[1]


def block_queries(heads: int, positions: int, itemsize: int, device_type: str) -> int:
    """How many queries a block has; `heads` counts those of all rows, `itemsize` the bytes of a score."""
    most = CHUNK_BYTES if device_type == "cpu" else GPU_CHUNK_BYTES
    return max(MIN_QUERIES, most // max(1, BUFFERS * heads * positions * itemsize))


def attention_kl(student: Model, teacher: Model, sight: Sight) -> tuple[Tensor, Tensor]:
    """The sum of w_i KL_hi, 0-d, and, without a gradient, that of each head, `[H]`."""
    return _AttentionKL.apply(
        student.query, student.key, teacher.query, teacher.key, student.scale, teacher.scale, sight
    )


class _AttentionKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_q, student_k, teacher_q, teacher_k, student_scale, teacher_scale, sight):
        models = Model(student_q, student_k, student_scale), Model(teacher_q, teacher_k, teacher_scale)
        batch, heads, positions, _ = student_q.shape
        statistics = sight.weights.new_empty(STATISTICS, batch, heads, positions, 1)
        per_head = sight.weights.new_zeros(heads)
        with full_precision(student_q):
            for queries, (s, t) in _score_blocks(models, sight):
                max_s, max_t = (scores.amax(-1, keepdim=True) for scores in (s, t))
                difference = t.sub_(max_t) - s.sub_(max_s)
                z_s, p_t = s.exp_().sum(-1, keepdim=True), t.exp_()
                z_t = p_t.sum(-1, keepdim=True)
                rows = torch.linalg.vecdot(p_t, difference) / z_t[..., 0] + (z_s / z_t).log()[..., 0]
                weights = sight.weights[:, None, queries]
                per_head += torch.where(weights != 0, weights * rows, 0).sum((0, 2))
                statistics[:, :, :, queries] = torch.stack([max_s, z_s, max_t, z_t])
        ctx.save_for_backward(student_q, student_k, teacher_q, teacher_k, statistics)
        ctx.scales, ctx.sight = (student_scale, teacher_scale), sight
        ctx.mark_non_differentiable(per_head)
        return per_head.sum(), per_head

    @staticmethod
    @first_derivative_only
    def backward(ctx, dtotal, _):
        student_q, student_k, teacher_q, teacher_k, statistics = ctx.saved_tensors
        sight, scale = ctx.sight, ctx.scales[0]
        models = Model(student_q, student_k, scale), Model(teacher_q, teacher_k, ctx.scales[1])
        wants_q, wants_k = ctx.needs_input_grad[:2]
        grad_q = torch.empty_like(student_q, memory_format=torch.contiguous_format) if wants_q else None
        grad_k = torch.zeros_like(student_k, dtype=sight.weights.dtype) if wants_k else None
        key = _counted(student_k, sight)
        with full_precision(student_q):
            for queries, (s, t) in _score_blocks(models, sight):
                max_s, z_s, max_t, z_t = statistics[:, :, :, queries]
                p_t = t.sub_(max_t).exp_().div_(z_t)
                gradient = s.sub_(max_s).exp_().div_(z_s).sub_(p_t)
                gradient *= (dtotal * scale * sight.weights)[:, None, queries, None]
                gradient = _by_key(gradient, key)
                if grad_q is not None:
                    grad_q[:, :, queries] = (gradient @ key[:, :, : gradient.shape[-1]]).view_as(grad_q[:, :, queries])
                if grad_k is not None:
                    query = _by_key(_counted(student_q, sight, queries), key)
                    grad_k[:, :, : gradient.shape[-1]] += gradient.mT @ query
        return grad_q, None if grad_k is None else grad_k.to(student_k.dtype), *(None,) * 5


def _score_blocks(models: tuple[Model, Model], sight: Sight) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of queries, and both models' scores `[B, H, queries, keys]`, `HIDDEN` where a query does not see a key."""
    batch, heads, positions, _ = models[0].query.shape
    most = block_queries(batch * heads, positions, sight.weights.dtype.itemsize, sight.weights.device.type)
    keys = [_counted(model.key, sight) for model in models]
    for start in range(0, positions, most):
        queries = slice(start, min(start + most, positions))
        hidden = sight.hidden(queries)
        scores = []
        for model, key in zip(models, keys, strict=True):
            query = _by_key(_counted(model.query, sight, queries) * model.scale, key)
            products = query @ key[:, :, : hidden.shape[-1]].mT
            scores.append(products.view(batch, heads, *hidden.shape[2:]).masked_fill_(hidden, HIDDEN))
        yield queries, scores


def _counted(vectors: Tensor, sight: Sight, positions: slice = slice(None)) -> Tensor:
    """Those positions' vectors `[B, H, positions, d]` in the compute dtype, 0 where they do not count."""
    counts = sight.weights[:, None, positions, None] != 0
    return vectors[:, :, positions].to(sight.weights.dtype).masked_fill(~counts, 0)


def _by_key(of_queries: Tensor, key: Tensor) -> Tensor:
    """`[B, H, queries, x]` with the queries of the heads that share keys one after another, `[B, Hkv, _, x]`."""
    batch, heads, queries, width = of_queries.shape
    return of_queries.reshape(batch, key.shape[1], heads // key.shape[1] * queries, width)
