from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import pytest

from bench.machine import machine
from bench.peak_memory import peak_memory_mb


def pytest_benchmark_update_machine_info(config, machine_info):
    """What matters to a result, in place of host name, processor flags and the like."""
    machine_info.clear()
    machine_info.update(machine())


@pytest.fixture(scope="session", autouse=True)
def freed_memory_is_kept():
    """Or glibc hands it back to the system, to be had anew page by page, as the chance of what lies beside it will."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold, most = -1, -3, 32 << 20
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, most)


@pytest.fixture
def size(benchmark) -> str:
    """ "real", or "tiny" where benchmarks are disabled and their bodies run once as tests."""
    return "tiny" if benchmark.disabled else "real"


@pytest.fixture
def measure(benchmark) -> Callable[..., None]:
    """Time `make_step(**case)()` and record the case and its peak memory."""

    def run(operation: str, make_step: Callable[..., Callable[[], None]], *, rounds: int = 3, **case) -> None:
        benchmark.pedantic(make_step(**case), rounds=rounds, warmup_rounds=1)
        if not benchmark.disabled:
            benchmark.extra_info.update(operation=operation, **case, peak_mb=peak_memory_mb(operation, **case))

    return run
