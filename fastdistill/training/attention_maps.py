"""Attention maps given by their logarithms: their squared distance, and their means over heads."""

from __future__ import annotations

import math

from torch import Tensor


def map_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of each row of two maps, `[..., S, S]` to `[..., S]`; at most 2."""
    return (teacher.exp() - student.exp()).square().sum(-1)


def grouped_heads(maps: Tensor, groups: int) -> Tensor:
    """Mean map of each group of heads that follow each other, `[B, H, S, S]` to `[B, groups, S, S]`, as logarithms."""
    if maps.shape[1] == groups:
        return maps
    each = maps.unflatten(1, (groups, -1))
    return each.logsumexp(2) - math.log(each.shape[2])
