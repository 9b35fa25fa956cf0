from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from time import perf_counter

import pytest
import torch

from bench.machine import machine
from bench.operation import PASSES, Cannot, Case, Operation, Step, compare, in_turn, make_step, result
from bench.peak_memory import gpu_peak_memory_mb, peak_memory_mb
from bench.roof import ROOFS
from fastdistill.testing import DEVICE


def pytest_benchmark_update_machine_info(config, machine_info):
    """What matters to a result, in place of host name, processor flags and the like."""
    machine_info.clear()
    machine_info.update(machine())


def pytest_generate_tests(metafunc):
    """An operation's cases by its implementations by passes: tiny ones, as tests, where benchmarks are disabled."""
    if "measure" not in metafunc.fixturenames:
        return
    operation, option = metafunc.module.OPERATION, metafunc.config.getoption
    disabled = option("benchmark_disable") and not option("benchmark_enable")
    metafunc.parametrize("case", operation.cases["tiny" if disabled else DEVICE], ids=str)
    metafunc.parametrize("implementation", operation.implementations)
    metafunc.parametrize("pass_", PASSES)


@pytest.fixture(scope="session", autouse=True)
def freed_memory_is_kept():
    """Or glibc hands it back to the system, to be had anew page by page, as the chance of what lies beside it will."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold, most = -1, -3, 32 << 20
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_threshold, most)


@pytest.fixture
def measure(benchmark) -> Callable[[Operation, Case, str, str], None]:
    """Compare an implementation with float64 at the tiny size, time its pass, and record what came of it."""

    def run(operation: Operation, case: Case, implementation: str, pass_: str) -> None:
        try:
            compare(operation, implementation, operation.tiny(case))
            alone = make_step(operation, implementation, case, pass_)
            step, eager_seconds = _beside_eager(alone, operation, case, pass_)
            if benchmark.disabled:
                benchmark.pedantic(step.run, setup=step.prepare)
                return
            roof = ROOFS[operation.roof](case.torch_dtype)
            benchmark.pedantic(step.run, setup=step.prepare, rounds=_rounds(step))
            peak_mb = None
            if pass_ == "both":
                on_gpu = DEVICE == "cuda"
                peak_mb = gpu_peak_memory_mb(alone) if on_gpu else peak_memory_mb(operation.name, implementation, case)
        except Cannot as reason:
            pytest.skip(str(reason))
        except torch.OutOfMemoryError:
            pytest.skip("the GPU's memory does not suffice")
        stats = benchmark.stats.stats
        beside = eager_seconds[-stats.rounds :]  # not those of the runs that chose the rounds
        kept = result(operation, implementation, case, pass_, stats.median, beside, roof, peak_mb)
        benchmark.extra_info.update(kept)

    return run


def _beside_eager(step: Step, operation: Operation, case: Case, pass_: str) -> tuple[Step, list[float]]:
    """As `in_turn` does, but the step alone where a GPU's memory does not suffice for eager."""
    try:
        paired, seconds = in_turn(step, make_step(operation, "eager", case, pass_))
        paired.prepare()
    except torch.OutOfMemoryError:
        step.free()
        return step, []
    return paired, seconds


def _rounds(step: Step, seconds: float = 1.0) -> int:
    """As many as take about a second with what prepares them, 5 at least; after one that may load or compile."""
    _seconds(step)
    return max(5, min(30, int(seconds / _seconds(step))))


def _seconds(step: Step) -> float:
    start = perf_counter()
    step.prepare()
    step.run()
    return perf_counter() - start
