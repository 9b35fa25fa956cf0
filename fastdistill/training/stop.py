"""A clean way to be interrupted: by Ctrl-C, by SIGTERM, or by the clock."""

from __future__ import annotations

import signal
import time


class Stopped(Exception):
    """The run ends before its last step, with all saved that it needs to go on. `asked`: a setting said so."""

    def __init__(self, message: str, *, asked: bool):
        super().__init__(message)
        self.asked = asked


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM only sets `signalled`; one that comes later acts as it always does.

    A launcher hands on to its processes the signal that the terminal has already given them: within a second it is
    the same one.
    """

    def __init__(self, deadline: float | None = None):
        """`deadline` is on the clock of `time.monotonic`."""
        self.signalled, self.deadline = False, deadline

    @property
    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def requested(self) -> bool:
        return self.signalled or self.out_of_time

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: object) -> None:
        self.signalled = True
        for each in self._before:
            signal.signal(each, self._again)
        self._first = time.monotonic()

    def _again(self, number: int, frame: object) -> None:
        if time.monotonic() - self._first >= 1:
            self._restore()
            signal.raise_signal(number)

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
