"""Triton kernels compiled for a GPU that is not there, and run on CPU tensors by the interpreter of their PTX.

    activate(75)
    with recorded() as launches:
        kernel[grid](tensor, ...)
    assert launches[0].statistics.share("ld", "global", 16) > 0.9

`activate` comes before the first kernel of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fastdistill import absent_gpu
from tests.ptx import interpreter
from tests.ptx.machine import Statistics


class Recorded(NamedTuple):
    name: str
    """The kernel's."""
    statistics: Statistics


_recordings: list[list[Recorded]] = []


def activate(arch: int) -> None:
    """Make every later `kernel[grid](...)` of this process run the PTX of sm_`arch` on the CPU.

    Raises:
        ValueError: for an architecture that `fastdistill.absent_gpu` does not know.
        RuntimeError: where TRITON_INTERPRET replaces the compiler.
    """
    absent_gpu.activate(arch, _run)


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """The launches made inside of it, in order."""
    launches: list[Recorded] = []
    _recordings.append(launches)
    try:
        yield launches
    finally:
        _recordings.pop()


def _run(launch: absent_gpu.Launch) -> None:
    statistics = interpreter.run(launch.ptx, launch.grid, launch.arguments, launch.shared_memory)
    for launches in _recordings:
        launches.append(Recorded(launch.name, statistics))
