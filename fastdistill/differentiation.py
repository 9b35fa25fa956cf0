"""What the hand-written gradients share: they are made outside autocast, once, and of the first order alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast changes nothing on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's backward refuse create_graph=True.

    `once_differentiable` alone refuses only where the incoming gradient requires one itself, and elsewhere lets a
    second derivative leave this operation out in silence.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def refusing(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this fastdistill loss has no second derivative: differentiate it without create_graph=True"
            )
        return once(ctx, *gradients)

    return refusing


def spend(ctx: Any, operation: str) -> None:
    """Refuse the second backward of an operation whose gradients were made in forward."""
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"{operation} can be differentiated once: its gradients were made in forward and scaled in place by the "
            "first backward. Call it again for a second one"
        )
    ctx.spent = True
