"""A Triton driver for a GPU that this machine lacks: kernels are specialised and compiled for it as for a real one.

    activate(60, on_launch)

makes every later `kernel[grid](...)` of this process go through Triton's own path (specialisation of the arguments,
compilation, ptxas, the shared-memory limit) for sm_60, and hands what would have been launched to `on_launch`. It must
be called before the first kernel runs, and not with TRITON_INTERPRET=1, which replaces the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

WARP = 32
MAX_THREADS_PER_BLOCK = 1024


class SM(NamedTuple):
    """What one streaming multiprocessor holds, from the CUDA C++ Programming Guide, "Technical Specifications"."""

    warps: int
    blocks: int
    shared_memory: int
    """Bytes of shared memory, shared by its blocks."""
    shared_memory_per_block: int
    """The most that one block can ask for."""
    reserved_shared_memory: int
    """What the system keeps of a block's."""
    registers: int = 65536


SMS = {
    60: SM(64, 32, 65536, 49152, 0),
    61: SM(64, 32, 98304, 49152, 0),
    70: SM(64, 32, 98304, 98304, 0),
    75: SM(32, 16, 65536, 65536, 0),
    80: SM(64, 32, 167936, 166912, 1024),
    86: SM(48, 16, 102400, 101376, 1024),
    89: SM(48, 24, 102400, 101376, 1024),
    90: SM(64, 32, 233472, 232448, 1024),
    100: SM(64, 32, 233472, 232448, 1024),
    120: SM(48, 24, 102400, 101376, 1024),
}
"""Architectures by the number in their name: 60 for sm_60."""


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel."""

    name: str
    ptx: str
    cubin: bytes
    num_warps: int
    shared_memory: int
    grid: tuple[int, int, int]
    arguments: list[Any]
    """In the order of the PTX's parameters: tensors and numbers, no constexpr."""


def activate(arch: int, on_launch: Callable[[Launch], None]) -> None:
    """Make sm_`arch` the GPU of this process; each launch is handed to `on_launch` in its place.

    Raises:
        ValueError: for an architecture that is not in `SMS`.
        RuntimeError: where TRITON_INTERPRET replaces the compiler.
    """
    if arch not in SMS:
        raise ValueError(f"arch must be one of {', '.join(map(str, SMS))}, got {arch}")
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler: run without it")
    driver.set_active(_AbsentGPU(arch, on_launch))


class _AbsentGPU(DriverBase):
    def __init__(self, arch: int, on_launch: Callable[[Launch], None]) -> None:
        self.arch, self.on_launch = arch, on_launch
        self.utils = _Utils(arch)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return _Launcher(source, metadata, self.on_launch)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device: one number an architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed on a GPU that is not there")


class _Utils:
    """The part of the CUDA driver that Triton calls to load a kernel."""

    def __init__(self, arch: int) -> None:
        self.sm = SMS[arch]

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, bytes, int, int, int]:
        registers = spills = 0  # Triton does not look at them
        return None, cubin, registers, spills, MAX_THREADS_PER_BLOCK

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.sm.shared_memory_per_block}


class _Launcher:
    def __init__(self, source: Any, metadata: Any, on_launch: Callable[[Launch], None]) -> None:
        self.types, self.metadata, self.on_launch = list(source.signature.values()), metadata, on_launch
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name[:150]}.json") or {}
        self.ptx = Path(next(file for name, file in files.items() if name.endswith(".ptx"))).read_text()

    def __call__(self, x: int, y: int, z: int, stream, cubin, packed_metadata, launch_metadata, enter, leave, *args):
        arguments = list(_parameters(args, self.types))
        launch = Launch(
            self.metadata.name,
            self.ptx,
            cubin,
            self.metadata.num_warps,
            self.metadata.shared,
            (x, y, z),
            arguments,
        )
        self.on_launch(launch)


def _parameters(arguments: Iterable[Any], types: Iterable[Any]) -> Iterator[Any]:
    """What the compiled kernel is given: no constexpr, and of a tuple its elements."""
    for argument, type_ in zip(arguments, types, strict=True):
        if isinstance(type_, tuple):
            yield from _parameters(argument, type_)
        elif type_ != "constexpr":
            yield argument
