"""Weights that follow what they weigh: each component beside `kd` and `lm` held at its share of those two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdistill.training.config import Config
from fastdistill.training.window import Losses

MAIN = "main"
"""The weighted sum of `kd` and `lm`, against which the others are measured; these two keep their weights."""
KEPT = 0.9
"""Of a running mean, at each new value."""
FARTHEST = 1e3
"""How far a factor may be from 1, above or below."""
_SCALE = 2.0**12
"""Of a loss whose gradient is measured, so that half precision does not lose it."""


class Balancer(nn.Module):
    """For each component the factor that brings its size to that of weighted kd + lm, so that its weight is its part.

    A size is the loss's magnitude (of this kind is Liu et al. 2019, arXiv:1803.10704, with rates) or the norm of its
    gradient (as in GradNorm, Chen et al. 2018, arXiv:1711.02257), as a running mean over optimizer steps. Both are
    constants to the gradient. The means are buffers, so that a checkpoint holds them, and stay on the device.
    """

    def __init__(self, names: Sequence[str], how: str, every: int = 1):
        """`names` are the components' that have a factor; `how` is "magnitude", or "gradient", which is measured
        `every` so many optimizer steps.
        """
        super().__init__()
        self.names, self.how, self.every = (MAIN, *names), how, every
        for name in self.names:
            self.register_buffer(name, torch.full((), torch.nan))

    @classmethod
    def of(cls, config: Config, names: Sequence[str]) -> Balancer | None:
        return cls(names, config.balance, config.balance_steps) if config.balance != "none" and names else None

    def factor(self, name: str) -> Tensor | float:
        """1 for a component that has none, and until both sizes are known."""
        if name not in self.names:
            return 1.0
        factor = self.get_buffer(MAIN) / self.get_buffer(name)
        return torch.where(factor.isfinite(), factor.clamp(1 / FARTHEST, FARTHEST), 1.0)

    def measures(self, step: int, changed: bool) -> bool:
        """Whether gradients are to be measured at optimizer step `step`; at one where components `changed` they are."""
        return self.how == "gradient" and (changed or step % self.every == 0)

    @torch.no_grad()
    def update(self, losses: Losses[Tensor]) -> None:
        """Take in the numbers of a whole window; none that is not finite."""
        for name in self.names:
            new = self._size(name, losses)
            if new is not None:
                mean = self.get_buffer(name)
                moved = torch.where(mean.isnan(), new, KEPT * mean + (1 - KEPT) * new)
                mean.copy_(torch.where(new.isfinite(), moved, mean))

    def _size(self, name: str, losses: Losses[Tensor]) -> Tensor | None:
        if self.how == "gradient":
            return losses.diagnostics.get(f"gradient norm of {name}")
        if name != MAIN:
            return losses.raw.get(name)
        return torch.stack([losses.weighted[name] for name in ("kd", "lm") if name in losses.weighted]).sum()


def gradient_norm(loss: Tensor, embedded: Tensor) -> Tensor:
    """Norm of a loss's gradient at the student's embedded tokens, `[B, S, D]`, which all losses go through.

    The graph between them stays, so that it can be gone through again; nothing else gets a gradient.
    """
    (gradient,) = torch.autograd.grad(_SCALE * loss, embedded, retain_graph=True)
    return gradient.float().norm() / _SCALE
