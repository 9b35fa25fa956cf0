"""What a kernel file exports, so that `fastdistill compile-check` can compile its kernels without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class CompileCase:
    """One form of a file's kernels; each file exports a list of them, `COMPILE_CASES`."""

    name: str
    launch: Callable[[torch.dtype], None]
    """Calls the launchers with tensors of the dtype on the device "meta", sized as in real use."""
    streams: int = 2
    """How many tensors the kernels' main loops read; an element of each is a pair."""
    stream_dtype: torch.dtype | None = None
    """That of these tensors, if it is not the case's dtype."""
    budget: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    """The most instructions a pair that a kernel's main loops may take together, by its name; a number, or by dtype."""
