"""How row-wise kernels are launched: warps and parts of a row, by row length, number of rows and architecture.

All tuning numbers stand here, each with its reason. They come from register counts of compiled code and from
arithmetic; none has been timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

P = ParamSpec("P")
T = TypeVar("T")

WARP = 32
VECTOR_BYTES = 16
"""What one load instruction moves at most."""

WARPS = 8
"""A program has 256 lanes, of 32 to 64 registers in the usual forms: four to six programs share an SM's 65536
registers, so that one's merging of its lanes hides behind another's loads. On sm_75, whose SM takes 1024 threads, four
programs are all. On every architecture 256 lanes have 4 KB in flight a load, and the loops have four loads in flight:
64 KB an SM, where Little's law asks for about 13 on sm_60 (732 GB/s, 600 ns, 56 SMs) and 25 on sm_90."""


class Architecture(NamedTuple):
    sms: int
    """Streaming multiprocessors of its largest GPU: with fewer programs than these, rows are split."""
    one_launch_warps: int
    """Warps of a program that reads its row twice. 32 fill an SM alone, so that one row an SM is in flight and its
    second read may come from the L2 cache: 132 rows of 50257 pairs of 2-byte logits are 27 MB. Only where that cache
    is large (40 MB on sm_80, 50 on sm_90, 72 on sm_89, more on sm_100); the 4 to 6 MB of sm_60, 70, 75 and 86 hold
    next to nothing of the rows in flight, and there the usual 8 keep more loads in flight."""


ARCHITECTURES = {
    60: Architecture(56, WARPS),  # P100
    70: Architecture(80, WARPS),  # V100
    75: Architecture(72, WARPS),  # RTX 8000; a T4 has 40
    80: Architecture(108, 32),  # A100
    86: Architecture(84, WARPS),  # A40, RTX 3090
    89: Architecture(144, 32),  # L40, RTX 4090
    90: Architecture(132, 32),  # H100, H200
    100: Architecture(160, 32),  # B200, B300
    120: Architecture(188, 32),  # RTX PRO 6000
}

MAX_SPLITS = 16
"""Parts of a row: their sums are merged by one warp, 16 values at a time."""

MIN_TILES = 4
"""Tiles of 4 KB in a part: less would leave more time to its merging than to its reading."""


class LaunchPlan(NamedTuple):
    warps: int
    splits: int

    @property
    def lanes(self) -> int:
        return WARP * self.warps


def row_plan(rows: int, row_bytes: int, *, reads_twice: bool = False) -> LaunchPlan:
    """The launch for `rows` rows of `row_bytes` bytes; `reads_twice` where a program goes over its whole row twice."""
    if knobs.runtime.interpret:  # by NumPy, to which a tile costs the same at any size; two parts, to run that way too
        return LaunchPlan(32, 2 if rows < 4 and not reads_twice else 1)
    architecture = _current_architecture()
    if reads_twice:
        return LaunchPlan(architecture.one_launch_warps, 1)
    splits, part_bytes = 1, MIN_TILES * WARPS * WARP * VECTOR_BYTES
    while splits < MAX_SPLITS and rows * splits < architecture.sms and row_bytes >= 2 * splits * part_bytes:
        splits *= 2
    return LaunchPlan(WARPS, splits)


ELEMENTS = 32
"""Elements of a row that a thread holds of each of two tensors: the fewest warps a row, to which its sums must be
brought together, that leave it room in 128 registers."""

LOOSE_ELEMENTS = 16
"""The same where rows do not begin on 16-byte boundaries: each element then has an address of its own."""

MAX_COLUMNS = ELEMENTS * WARP * WARPS

MAX_TILES = 16
"""Tiles of a program one after another, for which it finds its layer once and leaves one sum."""

RESIDENT_WARPS = 16
"""That an SM holds at least, at 128 registers a thread."""

WAVES = 4
"""Times that all SMs are filled, or more: fewer would leave some without work at the end."""


class TilePlan(NamedTuple):
    """Programs of `tiles` tiles [rows, columns], enough for all rows of a layer; a row may be several tiles wide."""

    warps: int
    rows: int
    columns: int
    tiles: int
    programs: int


def tile_plan(layers: int, rows: int, width: int) -> TilePlan:
    """The launch of `layers` times `rows` rows of `width` elements, each row held whole if it is not too wide."""
    columns = min(1 << (width - 1).bit_length(), MAX_COLUMNS)
    if knobs.runtime.interpret:  # large tiles, and several of each of several programs, to run that way too
        tile_rows, warps, wanted = max(1, 4 * MAX_COLUMNS // columns), 1, 2 * layers
    else:
        of_a_warp = WARP * (LOOSE_ELEMENTS if width % 8 else ELEMENTS)
        warps, tile_rows = max(1, columns // of_a_warp), max(1, of_a_warp // columns)
        wanted = WAVES * _current_architecture().sms * RESIDENT_WARPS // warps
    count = -(-rows // tile_rows)
    tiles = max(1, min(MAX_TILES, layers * count // wanted))
    return TilePlan(warps, tile_rows, columns, tiles, -(-count // tiles))


TENSOR_CORES = 80
"""The architecture from which Triton multiplies tiles of half precision in tensor cores; on those of sm_70 and 75 it
does so in ordinary instructions, as it does float32 everywhere if all its digits are to count."""

HALVES = (torch.float16, torch.bfloat16)

MAX_WIDTH = 256
"""Channels of the widest vectors whose tiles fit an SM's shared memory as operands of tensor cores."""

MAX_WIDE_BYTES = 512
"""Bytes of the widest vectors of which four tiles of 16 fit 48 KB, all that a block has on sm_60."""


class AttentionPlan(NamedTuple):
    """Tiles of `queries` by `keys` scores, and whether vectors are multiplied as they are, or in the compute type."""

    warps: int
    queries: int
    keys: int
    as_they_are: bool


def attention_plan(student: torch.dtype, teacher: torch.dtype, compute: torch.dtype, width: int) -> AttentionPlan:
    """The launch for vectors of these types, `width` channels at most, a power of two.

    They are the largest tiles of which no register is spilled inside a loop on any architecture. Both models' 64 x 32
    scores are 32 registers a thread of 4 warps, beside operands and a gradient of 64 channels; without tensor cores a
    thread keeps its rows of the operands in registers, all channels of them.

    Raises:
        RuntimeError: the vectors are too wide for the kernels.
    """
    in_tensor_cores = student in HALVES and teacher in HALVES and (knobs.runtime.interpret or _arch() >= TENSOR_CORES)
    limit = MAX_WIDTH if in_tensor_cores else MAX_WIDE_BYTES // compute.itemsize
    if width > limit:
        raise RuntimeError(f"attention_kl's kernels take at most {limit} channels of these types here, got {width}")
    if not in_tensor_cores:
        return AttentionPlan(8, 16, 16, False)
    return AttentionPlan(4 if width <= 64 else 8, 64 if width <= 128 else 32, 32, True)


def vector_length(*itemsizes: int) -> int:
    """Elements a lane reads at a time of tensors with these item sizes: 16 bytes of the widest."""
    return VECTOR_BYTES // max(itemsizes)


def on_its_device(launcher: Callable[P, T]) -> Callable[P, T]:
    """Have the GPU of a launcher's first tensor current within it: that is where Triton launches."""

    @wraps(launcher)
    def launch(*arguments: P.args, **keywords: P.kwargs) -> T:
        tensor = next(each for each in arguments if isinstance(each, Tensor))
        with torch.cuda.device_of(tensor):
            return launcher(*arguments, **keywords)

    return launch


def _current_architecture() -> Architecture:
    """That of the current GPU, or the nearest older one."""
    arch = _arch()
    return ARCHITECTURES[max(known for known in ARCHITECTURES if known <= arch)]


def _arch() -> int:
    active: Any = driver.active
    return int(active.get_current_target().arch)
