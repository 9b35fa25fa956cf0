"""What changes with the optimizer step, as pure functions of it, so that a resumed run has nothing to restore."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, shape: str) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up to `peak`, then "cosine", "linear" or "constant".

    Both falls end just above 0, so that every step of the run moves the weights.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    fall = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * fall


def course(progress: float, first: float, last: float, shape: str) -> float:
    """Value at `progress`, 0 to 1, on the way from `first` to `last`: "linear" or "cosine"."""
    done = progress if shape == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return first + (last - first) * done
