"""The truth guard: a run that does not learn says so at its first step, not after a night."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class TrainingFault(Exception):
    """Training cannot go on, or would not mean what it prints.

    `go_on` are the flags with which the run may be resumed; None where that would end in the same way.
    """

    def __init__(self, message: str, go_on: list[str] | None = None):
        super().__init__(message)
        self.go_on = go_on


class MovementGuard:
    """Shows that optimizer steps happen: with a learning rate above 0, and with weights that move.

    Of each parameter it watches the element with the largest gradient, which any optimizer moves first; of a sharded
    one, of this process's part.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(self, module: nn.Module) -> None:
        """Call when the gradients are made and the optimizer has not stepped yet; the first call since `check` looks.

        Raises:
            TrainingFault: nothing has a gradient.
        """
        if self._watched:
            return
        found = [(_local(p.detach()), _local(p.grad)) for p in module.parameters() if p.grad is not None]
        if not found:
            raise TrainingFault("no parameter has a gradient after a backward pass: none is tied to the loss")
        for weights, gradient in found:
            if gradient.numel():
                place = gradient.abs().argmax()
                self._watched.append((weights, place, weights.take(place)))

    def check(self, learning_rate: float) -> None:
        """Whether anything has moved since `watch`; reads the device.

        Raises:
            TrainingFault: it has not, or the learning rate is not above 0.
        """
        if learning_rate <= 0:
            raise TrainingFault(f"the learning rate of an optimizer step is {learning_rate}, not above 0")
        if self._watched and not any(bool(weights.take(i) != before) for weights, i, before in self._watched):
            raise TrainingFault(
                f"the optimizer stepped with learning rate {learning_rate:.2e}, and none of {len(self._watched)} "
                "parameters moved"
            )
        self._watched = []


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class BadStepGuard:
    """Counts steps whose loss is NaN or infinite; after `limit` in a row the run ends, naming the components."""

    def __init__(self, limit: int, skipped: int = 0, in_a_row: int = 0):
        self.limit, self.skipped, self.in_a_row = limit, skipped, in_a_row

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def accept(self, values: dict[str, float]) -> bool:
        """Whether all of the window's `values`, by name, are finite. Raises `TrainingFault` at the limit."""
        bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise TrainingFault(f"the loss was not finite in {self.in_a_row} steps in a row, last: {', '.join(bad)}")
        return False


class Patience:
    """Counts evaluations whose loss is not `min_delta` below the best before them; None as `limit` is endless."""

    def __init__(
        self, limit: int | None, min_delta: float = 0.0, start: int = 0, best: float | None = None, waited: int = 0
    ):
        self.limit, self.min_delta, self.start = limit, min_delta, start
        self.best, self.waited = best, waited

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def observe(self, step: int, loss: float) -> None:
        """An evaluation at `step`; before `start` none is counted."""
        if self.best is None or loss < self.best - self.min_delta:
            self.best, self.waited = loss, 0
        elif step >= self.start:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        return self.limit is not None and self.waited >= self.limit
