"""The truth guard: a run that does not learn says so at its first step, not after a night."""

from __future__ import annotations

import math

from torch import Tensor, nn


class TrainingFault(Exception):
    """Training cannot go on, or would not mean what it prints."""


class FirstStepGuard:
    """Shows that the first optimizer step happened: with a learning rate above 0, and with weights that moved.

    Of each parameter it watches the element with the largest gradient, which any optimizer moves first.
    """

    def __init__(self) -> None:
        self._confirmed = False
        self._watched: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def before_step(self, module: nn.Module) -> None:
        """Call when the gradients are made and the optimizer has not stepped yet."""
        if self._confirmed:
            return
        self._watched = []
        for parameter in module.parameters():
            if parameter.grad is not None:
                place = parameter.grad.abs().argmax()
                self._watched.append((parameter, place, parameter.detach().flatten()[place].clone()))

    def after_step(self, learning_rate: float) -> None:
        """Call when the optimizer says that it has stepped; raises `TrainingFault` if it cannot be true."""
        if self._confirmed:
            return
        if not self._watched:
            raise TrainingFault("no parameter has a gradient after the first backward: none is tied to the loss")
        if learning_rate <= 0:
            raise TrainingFault(f"the learning rate of the first optimizer step is {learning_rate}, not above 0")
        moved = [bool(p.detach().flatten()[place] != before) for p, place, before in self._watched]
        if not any(moved):
            raise TrainingFault(
                f"the optimizer stepped with learning rate {learning_rate:.2e}, and none of {len(moved)} parameters "
                "moved"
            )
        self._confirmed, self._watched = True, []


class BadStepGuard:
    """Counts steps whose loss is NaN or infinite; after `limit` in a row the run ends, naming the components."""

    def __init__(self, limit: int, skipped: int = 0, in_a_row: int = 0):
        self.limit, self.skipped, self.in_a_row = limit, skipped, in_a_row

    def state(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def accept(self, values: dict[str, float]) -> bool:
        """Whether all of the window's `values`, by name, are finite. False: skip it. Raises at the limit."""
        bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise TrainingFault(f"the loss was not finite in {self.in_a_row} steps in a row, last: {', '.join(bad)}")
        return False
