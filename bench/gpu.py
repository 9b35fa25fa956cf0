"""What the GPU benchmarks share: times with a cold L2 cache, peak memory, and results that are written as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.machine import machine


def median_ms(step: Callable[[], Any]) -> float:
    """Milliseconds of a step, the median of half a second's runs."""
    from triton.testing import do_bench

    ms: Any = do_bench(step, warmup=100, rep=500, return_mode="median")
    return ms


def peak_bytes(step: Callable[[], Any]) -> int:
    """Bytes that a step needs at most beyond what was allocated before it; what it returns counts."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def copy_rate(elements: int, dtype: torch.dtype) -> float:
    """GB/s, read and written, of a copy within the device."""
    source = torch.randn(elements, device="cuda").to(dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6


def product_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """TFLOP/s of a product of two square matrices."""
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: left @ right) / 1e9


def main(name: str, results: Callable[[], Iterator[dict[str, Any]]]) -> int:
    """`python -m bench.NAME FILE`: write results into FILE, after each that comes, and print its figures."""
    if len(sys.argv) != 2:
        print(f"usage: python -m bench.{name} RESULTS.json", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(f"bench.{name} measures a GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    kept = []
    for result in results():
        kept.append(result)
        figures = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in result.items())
        print("  ".join(figures), flush=True)
        Path(sys.argv[1]).write_text(json.dumps({"machine": machine(), "results": kept}, indent=1) + "\n")
    return 0
