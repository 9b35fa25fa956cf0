from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.machine import machine
from bench.peak_memory import peak_memory_mb


def pytest_benchmark_update_machine_info(config, machine_info):
    """What matters to a result, in place of host name, processor flags and the like."""
    machine_info.clear()
    machine_info.update(machine())


@pytest.fixture
def size(benchmark) -> str:
    """ "real", or "tiny" where benchmarks are disabled and their bodies run once as tests."""
    return "tiny" if benchmark.disabled else "real"


@pytest.fixture
def measure(benchmark) -> Callable[..., None]:
    """Time `make_step(**case)()` and record the case and its peak memory."""

    def run(operation: str, make_step: Callable[..., Callable[[], None]], **case) -> None:
        benchmark.pedantic(make_step(**case), rounds=3)
        if not benchmark.disabled:
            benchmark.extra_info.update(operation=operation, **case, peak_mb=peak_memory_mb(operation, **case))

    return run
