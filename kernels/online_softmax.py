"""Walking along a row of logits, for kernels that give one program a row, or one of `splits` parts of it.

A program's threads are lanes: lane l reads vectors of VEC neighbouring elements, 16 bytes, in tiles [NT, VEC] of one
vector a lane. All of a tile's arithmetic stays in its thread; lanes meet once, at the end of the row (Milakov and
Gimelshein 2018, arXiv:1805.02867, a lane at a time).

Columns are counted from the last 16-byte boundary at or before the row's first element, so that a tile's vectors are
aligned even where the vocabulary is odd. A range [begin, end) of columns is the whole vectors in it, read 16 bytes at
a time, and fewer than VEC elements at either end, read one by one in a tile of their own (`ragged_columns`).
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)
"""The maximum of no logits: finite, so that -inf logits and empty lanes never make inf - inf."""

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def scaled(z, k, m):
    """k z - m, rounded once: with the rounded k max(z) as m, exact enough for logits of any size."""
    if _INTERPRETED:  # by NumPy, which has no fused multiply-add
        return (z.to(tl.float64) * k - m).to(z.dtype)
    else:
        return tl.fma(z, k, -m)


@triton.jit
def row_start(row, positions, start, stride_b, stride_s):
    """Element offset of `row` of a `[B, positions, V]` tensor that begins at element `start`; int64."""
    row = row.to(tl.int64)
    return start + row // positions * stride_b + row % positions * stride_s


@triton.jit
def tile_columns(NT: tl.constexpr, VEC: tl.constexpr):
    """Columns of the first tile, [NT, VEC]."""
    return tl.arange(0, NT)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def whole_vectors(begin, end, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """First and last column (exclusive) of the whole vectors that are this split's part of [begin, end)."""
    first = (begin + VEC - 1) // VEC * VEC
    last = tl.maximum(end // VEC * VEC, first)
    if SPLITS == 1:
        return first, last
    part = tl.cdiv(last - first, SPLITS * BLOCK) * BLOCK
    first += split * part
    return first, tl.maximum(tl.minimum(first + part, last), first)


@triton.jit
def ragged_columns(begin, end, split, NT: tl.constexpr, VEC: tl.constexpr):
    """The elements of [begin, end) before and after its whole vectors, as columns and mask [NT, VEC].

    Lane 0 has those before, lane 1 those after, the others none; split 0 has all.
    """
    lane = tl.arange(0, NT)[:, None]
    first = (begin + VEC - 1) // VEC * VEC
    last = tl.maximum(end // VEC * VEC, first)
    columns = tl.where(lane == 0, first - VEC, last) + tl.arange(0, VEC)[None, :]
    before = (lane == 0) & (columns >= begin) & (columns < tl.minimum(first, end))
    after = (lane == 1) & (columns >= last) & (columns < end)
    return columns, (before | after) & (split == 0)


@triton.jit
def load_columns(row_ptr, columns, mask, COMPUTE: tl.constexpr):
    """Logits of a row in the compute dtype; -inf where the mask is not set."""
    return tl.load(row_ptr + columns, mask=mask, other=float("-inf")).to(COMPUTE)


@triton.jit
def store_columns(row_ptr, columns, mask, values):
    """Values cast to the row's dtype."""
    tl.store(row_ptr + columns, values.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def first_column_of(
    lane_peak,
    tile,
    row_ptr,
    ragged,
    is_ragged,
    last,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The first column where the row has its largest logit, from each lane's largest, `lane_peak` [NT].

    `tile` [NT] is where the tile begins that a lane's largest came from, or -1 for none but the ragged one. Only these
    two tiles are read again.
    """
    peak = tl.max(lane_peak, 0)
    has_it = (lane_peak == peak)[:, None]
    none = 2147483647
    columns = tl.maximum(tile, 0)[:, None] + tile_columns(NT, VEC)
    mask = has_it & (tile >= 0)[:, None] & (columns < last)
    found = mask & (load_columns(row_ptr, columns, mask, COMPUTE) == peak)
    in_tile = tl.min(tl.min(tl.where(found, columns, none), 1), 0)
    mask = has_it & is_ragged
    found = mask & (load_columns(row_ptr, ragged, mask, COMPUTE) == peak)
    return tl.minimum(in_tile, tl.min(tl.min(tl.where(found, ragged, none), 1), 0))
