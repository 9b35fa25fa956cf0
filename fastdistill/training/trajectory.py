"""Where a run is expected to be on its way: a band of the held-out loss, from its measured start."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from fastdistill.training.evaluate import Evaluation

AT_MOST_LEFT = {0.0: 1.0, 0.1: 0.9, 0.25: 0.75, 0.5: 0.6, 1.0: 0.5}
"""By progress: the share of the way from untrained student to teacher that is at most expected to lie ahead.

No loss in nats is to be expected of every model and text, but this much of the way is: a rule of thumb with room for
worse text and worse starts. Of the demo's distilled students 46, 33, 19 and 14 % lay ahead at 12.5, 25, 50 and 100 % of
the steps, of those without a teacher two thirds and more.
"""


@dataclass(frozen=True)
class Trajectory:
    """From `start`, the untrained student's held-out loss, to `goal`, its teacher's, in `unit`."""

    start: float
    goal: float
    unit: str

    @classmethod
    def of(cls, untrained: Evaluation, teacher: Evaluation) -> Trajectory | None:
        """In nats a token, or with two tokenizers in bits per byte; None where there is no way to go: the student is no
        worse to begin with, or a loss is not finite.
        """
        start, goal = held_out(untrained), held_out(teacher)
        unit = "nats a token" if teacher.bits_per_byte is None else "bits per byte"
        return cls(start, goal, unit) if 0 < start - goal < math.inf else None

    def upper(self, progress: float) -> float:
        """The upper edge of the band after that share of the steps, straight between those of `AT_MOST_LEFT`; the
        lower is `goal`.
        """
        known = sorted(AT_MOST_LEFT)
        after = bisect_left(known, progress) or 1
        low, high = known[after - 1 : after + 1]
        part = (progress - low) / (high - low)
        left = AT_MOST_LEFT[low] + part * (AT_MOST_LEFT[high] - AT_MOST_LEFT[low])
        return self.goal + left * (self.start - self.goal)

    def describe(self) -> str:
        edges = [f"{self.upper(progress):.3f} at {progress:.0%} of the steps" for progress in sorted(AT_MOST_LEFT)[1:]]
        return (
            f"held-out {self.unit}, from {self.start:.3f}, the untrained student's, towards {self.goal:.3f}, the "
            f"teacher's: at most {', '.join(edges)}"
        )


def held_out(evaluation: Evaluation) -> float:
    """What can be set beside a teacher's: nats a token, or bits per byte where tokenizers differ."""
    return evaluation.loss if evaluation.bits_per_byte is None else evaluation.bits_per_byte
