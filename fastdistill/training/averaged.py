"""A running mean of the weights, which often predicts better than the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """The exponential mean of a module's trained parameters over optimizer steps; with `decay` 0 there is none.

    The mean is `decay` times itself and the rest of the new weights; in the first steps the decay is
    `(1 + step) / (10 + step)`, so that the untrained weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad] if decay else []
        self.parameters = [parameter for _, parameter in trained]
        self.means: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in trained}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, parameter in zip(self.means.values(), self.parameters, strict=True):
            mean.lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts, the module has the mean for its weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for mean, parameter in zip(self.means.values(), self.parameters, strict=True):
            weights = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(weights)
