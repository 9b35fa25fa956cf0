"""How much memory a run has taken, and what to do when there is no more."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from fastdistill.training.config import Config, dashed
from fastdistill.training.guard import TrainingFault


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once so far: of tensors on a GPU; on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def most_allocated(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors at once that `run()` allocates there, beyond what there was before.

    On a CPU as PyTorch's profiler sees it, which makes `run` slower.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results = profiled.profiler.kineto_results if profiled.profiler else None
    assert results is not None
    alive = most = 0
    events: list[Any] = sorted(results.events(), key=lambda event: event.start_ns())
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler's library writes past Python to standard error."""
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def rescue(save: Callable[[], None] | Literal[False], config: Config) -> Iterator[None]:
    """Turns running out of memory into a `TrainingFault` that says what to change, once `save` has kept what there is.

    One of several processes has no `save`: the others wait for it elsewhere, and would not save with it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        asked = _what_was_asked(error)
    else:
        return
    # Here the failed call is gone, and with it the tensors that it held.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if save:
        save()
    saved = "All that was done is saved" if save else "The latest checkpoint is where to go on"
    flags = as_flags(easier(config))
    less = (
        f"With {' '.join(flags)} a step is the same and needs less"
        if flags
        else ("Less is needed with a shorter --seq-len, a smaller student or --teacher-device cpu, in a new run")
    )
    raise TrainingFault(f"out of memory: {asked}. {saved}. {less}", flags or None)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the CPU's allocator gave up; the latter has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _what_was_asked(error: BaseException) -> str:
    """The size that could not be had, as the allocator said it, and how full the device is."""
    asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
    size = f"{asked[1]} more could not be had" if asked else "no more could be had"
    if not torch.cuda.is_available():
        return size
    free, total = torch.cuda.mem_get_info()
    return f"{size}, {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are in use"


def easier(config: Config) -> dict[str, Any]:
    """Settings with which the same steps need less memory; none where there are no such."""
    if config.batch_size > 1:
        parts = next(n for n in range(2, config.batch_size + 1) if config.batch_size % n == 0)
        return {"batch_size": config.batch_size // parts, "grad_accum": config.grad_accum * parts}
    return {} if config.gradient_checkpointing else {"gradient_checkpointing": True}


def as_flags(settings: dict[str, Any]) -> list[str]:
    """As a command line has them."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{dashed(name)}"] if value is True else [f"--{dashed(name)}", str(value)]
    return flags
