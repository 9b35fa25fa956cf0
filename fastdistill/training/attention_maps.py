"""Attention maps from queries and keys: over which positions each position's softmax spreads its weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.reference import compute_dtype

HIDDEN = torch.finfo(torch.float32).min
"""A score that no softmax sees, and that makes no NaN of a row that sees nothing."""


def log_attention(query: Tensor, key: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Logarithm of the row-normalised maps, `[B, H, S, S]`, in fp32 or, of fp64, in fp64.

    Args:
        query, key: `[B, H, S, d]` and `[B, Hkv, S, d]`, H a multiple of Hkv: each key serves H / Hkv heads in a row.
        scale: of their products.
        visible: bool, `[B, S, S]`: whether a query (row) sees a key. What it does not see has log-weight `HIDDEN` or
            near it, so that its weight is 0.
    """
    query, key = query.to(compute_dtype(query)), key.to(compute_dtype(key))
    with torch.autocast(query.device.type, enabled=False):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = (scale * query) @ key.mT
        return scores.masked_fill(~visible[:, None], HIDDEN).log_softmax(-1)


def map_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row of maps given by their logarithms, `[..., S, S]` to `[..., S]`, in nats."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def map_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of each row of maps given by their logarithms, `[..., S, S]` to `[..., S]`; at most 2."""
    return (teacher.exp() - student.exp()).square().sum(-1)


def grouped_heads(maps: Tensor, groups: int) -> Tensor:
    """Mean map of each group of heads that follow each other, `[B, H, S, S]` to `[B, groups, S, S]`, as logarithms."""
    if maps.shape[1] == groups:
        return maps
    each = maps.unflatten(1, (groups, -1))
    return each.logsumexp(2) - math.log(each.shape[2])
