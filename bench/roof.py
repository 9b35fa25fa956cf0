"""What this machine can do at most, measured in the process that measures the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter

import torch

from bench import gpu
from fastdistill.testing import DEVICE


def _least_seconds(run: Callable[[], object], rounds: int = 15) -> float:
    """The shortest of some runs: what else the machine does in between lowers no roof."""
    run()
    times = []
    for _ in range(rounds):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


@cache
def copy_rate(dtype: torch.dtype) -> float:
    """GB/s, read and written, of a copy of 256 MB on a CPU, 1 GB on a GPU."""
    if DEVICE == "cuda":
        return gpu.copy_rate((1 << 30) // dtype.itemsize, dtype)
    source = torch.ones((256 << 20) // dtype.itemsize, dtype=dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source)) / 1e9


@cache
def product_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two square matrices, of 2048 rows on a CPU, 8192 on a GPU."""
    if DEVICE == "cuda":
        return gpu.product_rate(dtype)
    size = 2048
    left, right = torch.randn(2, size, size, dtype=dtype)
    return 2 * size**3 / _least_seconds(lambda: left @ right) / 1e12


ROOFS = {"copy": copy_rate, "product": product_rate}
