"""The order in which components come into the loss, by the share of the run's optimizer steps that are done."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from fastdistill.training.config import UsageError, nearest

FOUNDING = {"attention": 0.1, "attention_alignment": 0.1, "routing_feature": 0.1, "layerwise": 0.4, "contrastive": 0.7}
"""The founding document's; what is not named is there from the start."""


class Curriculum:
    """From which optimizer step on each component counts."""

    def __init__(self, rule: str, names: Iterable[str]):
        """`rule` is "none", "founding" or parts of the run by name, as "layerwise:0.4,contrastive:0.7"; `names` are the
        components that have a weight.

        Raises:
            UsageError: the rule is none of these, names a component that has no weight, or leaves none to begin with.
        """
        self.names = list(names)
        known = {"none": {}, "founding": FOUNDING}
        starts = known[rule] if rule in known else _parsed(rule, self.names)
        self.starts = {name: starts.get(name, 0.0) for name in self.names}
        # They balance what the router chooses, and are computed with it.
        if "load_balance" in self.starts:
            self.starts["load_balance"] = self.starts["routing_feature"]
        if self.starts and min(self.starts.values()) > 0:
            raise UsageError(f"--curriculum {rule}: no component is there from the start, only {', '.join(self.names)}")

    def active(self, step: int, total_steps: int) -> frozenset[str]:
        """Components of optimizer step `step`, 0-based."""
        return frozenset(name for name, start in self.starts.items() if step >= _first(start, total_steps))

    def describe(self, total_steps: int) -> str:
        """For the log, steps counted from 1; empty if all are there from the start."""
        begins: dict[int, list[str]] = {}
        for name, start in self.starts.items():
            begins.setdefault(_first(start, total_steps) + 1, []).append(name)
        if begins.keys() <= {1}:
            return ""
        return "; ".join(f"from step {step} {', '.join(begins[step])}" for step in sorted(begins))


def _first(start: float, total_steps: int) -> int:
    # Rounded first: 0.07 * 100 is above 7 in floating point.
    return math.ceil(round(start * total_steps, 6))


def _parsed(rule: str, names: list[str]) -> Mapping[str, float]:
    if not re.fullmatch(r"[a-z_]+:\d+(\.\d+)?(,[a-z_]+:\d+(\.\d+)?)*", rule):
        raise UsageError(
            "--curriculum must be none, founding, or parts of the run by component like layerwise:0.4,contrastive:0.7, "
            f"got {rule!r}"
        )
    starts = {}
    for text in rule.split(","):
        name, start = text.split(":")
        if name not in names:
            raise UsageError(f"--curriculum {rule}: {name} has no weight{nearest(name, names)}")
        starts[name] = float(start)
        if not 0 <= starts[name] < 1:
            raise UsageError(f"--curriculum {rule}: a component begins in [0, 1) of the run, got {name} at {start}")
    return starts
