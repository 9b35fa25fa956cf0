"""How the time of a step divides into its phases, without waiting for the device."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """`start` begins a stretch of work; each `mark` gives the time since the last call to a phase.

    On a GPU the marks are events in its queue, and `read` alone waits for them; elsewhere they are the host's time.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.stretches: list[list[tuple[str, Any]]] = []

    def start(self) -> None:
        self.stretches.append([("", self._now())])

    def mark(self, phase: str) -> None:
        self.stretches[-1].append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading, in the order in which they first came."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for marks in self.stretches:
            for (_, before), (phase, after) in pairwise(marks):
                between = before.elapsed_time(after) / 1000 if self.on_gpu else after - before
                seconds[phase] = seconds.get(phase, 0.0) + between
        self.stretches.clear()
        return seconds

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
