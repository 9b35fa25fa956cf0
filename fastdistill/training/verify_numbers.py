"""What a check of `fastdistill verify` saw, in a line beside what it expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


class Failed(Exception):
    """A behaviour that is not what it should be; the message has the numbers."""


def equal(what: str, came: float, expected: float, tolerance: float = 1e-5) -> str:
    """Within `tolerance`, of 1 or of what is expected where that is larger."""
    if not abs(came - expected) <= tolerance * max(1.0, abs(expected)):
        raise Failed(f"{what} {came:.6g}, expected {expected:.6g}")
    return f"{what} {came:.6g} = {expected:.6g}"


def true(what: str, is_so: bool) -> str:
    """`what` holds the numbers."""
    if not is_so:
        raise Failed(f"not so: {what}")
    return what


def refused(what: str, error: type[Exception], words: Sequence[str], call: Callable[[], object]) -> str:
    """`call` raises `error`, with a message that has all `words` in it."""
    try:
        call()
    except error as raised:
        if missing := [word for word in words if word not in str(raised)]:
            raise Failed(f"{what}: {', '.join(missing)} not in the message {str(raised)!r}") from raised
        return f"{what}, refused: {raised}"
    raise Failed(f"{what}: not refused")


def difference(came: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error among tensors."""
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in zip(came, expected, strict=True)]
    return max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)


def parity(
    what: str,
    loss: Loss,
    definition: Loss,
    learned: Sequence[Tensor],
    fixed: Sequence[Tensor],
    device: torch.device,
) -> str:
    """`loss` and its gradients with respect to `learned`, in float32 on `device`, are those of its definition in
    float64; both are called with `learned` and then `fixed`.
    """

    def with_gradients(function: Loss, convert: Callable[[Tensor], Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        leaves = [convert(x).requires_grad_() for x in learned]
        value = function(*leaves, *(convert(x) for x in fixed))
        return value.item(), torch.autograd.grad(value, leaves)

    came, gradients = with_gradients(loss, lambda x: x.clone().to(device))
    expected, truth = with_gradients(definition, lambda x: x.double() if x.is_floating_point() else x)
    seen, away = equal(what, came, expected), difference(gradients, truth)
    if not away <= 1e-5:
        raise Failed(f"{seen}, but gradient {away:.1e} away")
    return f"{seen}, gradient {away:.0e} away"
