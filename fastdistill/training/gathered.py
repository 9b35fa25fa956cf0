"""Rows of all processes, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if ranks() > 1 else 0


def gathered(rows: Tensor) -> Tensor:
    """`[B, ...]` of each process, in their order: `[ranks B, ...]`, the same on all of them.

    The gradient of a process's rows is the sum of what the losses of all processes say of them, so all must go
    backward through it. B must be the same on all processes, which cannot be seen without waiting for the device.
    """
    return _Gathered.apply(rows) if ranks() > 1 else rows


class _Gathered(torch.autograd.Function):
    """Public collectives alone: those of torch.distributed.nn are deprecated, and the ones named in their place are
    private and not in all versions of PyTorch that are served.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        everywhere = rows.new_empty(ranks() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everywhere, rows.contiguous())
        return everywhere

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed.narrow(0, rank() * ctx.count, ctx.count)
