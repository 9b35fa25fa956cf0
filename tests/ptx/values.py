"""What the instructions compute, on arrays: the rules of the PTX ISA, chapter 9.7, where NumPy has others.

bfloat16, which NumPy lacks, is `uint16` that holds its bits. A NaN that is computed has the host's payload; one that is
converted to 16 bits has the GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[..., Array]

LOW = np.uint64(0xFFFFFFFF)


# Rounding


def flush(x: Array) -> Array:
    """Subnormal numbers become zeros of their sign."""
    return x * (np.abs(x) >= np.finfo(x.dtype).smallest_normal)


def flushing(function: Function) -> Function:
    """As `.ftz` has it: of what comes and of what is computed."""
    return lambda *x: flush(function(*map(flush, x)))


def flushing_sources(function: Function) -> Function:
    return lambda *x: function(*map(flush, x))


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """The nearest, ties to even; every NaN is 0x7FFF."""
    bits = (x if x.dtype == np.float32 else _to_odd(x)).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), nearest.astype(np.uint16))


def _to_odd(x: Array) -> Array:
    """f32; what is not exact gets an odd last bit, so that rounding it once more is as rounding once."""
    nearest = x.astype(np.float32)
    bits = nearest.view(np.uint32) - (np.abs(nearest) > np.abs(x))
    return (bits | (nearest != x)).astype(np.uint32).view(np.float32)


def to_f16(x: Array) -> Array:
    """The nearest, ties to even; every NaN is 0x7FFF."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16)).view(np.float16)


def pair(to_bits: Function) -> Function:
    """One register of two numbers of 16 bits: the first is the upper half."""
    return lambda upper, lower: (to_bits(upper).astype(np.uint32) << np.uint32(16)) | to_bits(lower)


def in_f32(function: Function) -> Function:
    """Of bfloat16 operands, one more."""
    return lambda *bits: to_bf16(function(*map(from_bf16, bits)))


def of_bf16(function: Function) -> Function:
    """Of bfloat16 operands, what is no floating-point number."""
    return lambda *bits: function(*map(from_bf16, bits))


# Floating point


def fma_f64(x: Array, y: Array, z: Array) -> Array:
    """Through long double: the product loses what is below 2^-64 of it, where the GPU's loses nothing."""
    return (np.multiply(x, y, dtype=np.longdouble) + z).astype(np.float64)


def fma_f32(x: Array, y: Array, z: Array) -> Array:
    return _fma_to_odd(x, y, z).astype(np.float32)


def fma_f16(x: Array, y: Array, z: Array) -> Array:
    return to_f16(_fma_to_odd(x, y, z))


def fma_bf16(x: Array, y: Array, z: Array) -> Array:
    return to_bf16(_fma_to_odd(from_bf16(x), from_bf16(y), from_bf16(z)))


def _fma_to_odd(x: Array, y: Array, z: Array) -> Array:
    """f64, where the product is exact; a sum that is not gets an odd last bit, as in `_to_odd`.

    The error of the sum is Knuth's (The Art of Computer Programming, volume 2, section 4.2.2).
    """
    product = np.multiply(x, y, dtype=np.float64)
    total = product + z
    added = total - product
    error = (product - (total - added)) + (z - added)
    bits = total.view(np.int64)
    inexact = ((error < 0) | (error > 0)) & (bits & 1 == 0)
    bits += np.where((error > 0) == (total > 0), 1, -1) * inexact
    return total


def _larger_zero(numpy_function: Function, zero_of: Function) -> Function:
    """NumPy's max or min, for which zeros are equal, with PTX's rule that +0 is the larger."""

    def function(x: Array, y: Array) -> Array:
        result = numpy_function(x, y)
        bits = f"u{result.itemsize}"
        np.copyto(result.view(bits), zero_of(x.view(bits), y.view(bits)), where=x == y)
        return result

    return function


maximum = _larger_zero(np.fmax, np.bitwise_and)
"""Of a number and NaN, the number."""
minimum = _larger_zero(np.fmin, np.bitwise_or)
maximum_or_nan = _larger_zero(np.maximum, np.bitwise_and)
minimum_or_nan = _larger_zero(np.minimum, np.bitwise_or)


def reciprocal(x: Array) -> Array:
    return x.dtype.type(1) / x


def reciprocal_root(x: Array) -> Array:
    return x.dtype.type(1) / np.sqrt(x)


def gross_reciprocal(x: Array) -> Array:
    """`rcp.approx.ftz.f64` sees and gives the upper half of the bits."""
    return _upper_half(flush(reciprocal(_upper_half(flush(x)))))


def _upper_half(x: Array) -> Array:
    return (x.view(np.uint64) & ~LOW).view(np.float64)


INTEGER_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": lambda x, y: np.less(x, y) | np.greater(x, y),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda x, y: ~(np.less(x, y) | np.greater(x, y)),
    "neu": np.not_equal,
    "ltu": lambda x, y: ~np.greater_equal(x, y),
    "leu": lambda x, y: ~np.greater(x, y),
    "gtu": lambda x, y: ~np.less_equal(x, y),
    "geu": lambda x, y: ~np.less(x, y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
"""Of numbers that may be NaN, for which those without a `u` are false."""


def to_integer(rounding: Function, dtype: Any, from_f64: bool) -> Function:
    """Clamped to the type; NaN becomes 0, or the sign bit alone where either type has 64 bits."""
    limits = np.iinfo(dtype)
    of_nan = np.array(1 << (limits.bits - 1), f"u{limits.bits // 8}").view(dtype)
    if not from_f64 and limits.bits < 64:
        of_nan = dtype(0)

    def function(x: Array) -> Array:
        x = rounding(x.astype(np.float64))
        low, high, nan = x <= float(limits.min), x >= float(limits.max), np.isnan(x)
        inside = np.where(low | high | nan, 0, x).astype(dtype)
        return np.select([low, high, nan], [dtype(limits.min), dtype(limits.max), of_nan], inside)

    return function


# Integers


def quotient(x: Array, y: Array) -> Array:
    """Rounded towards zero, where NumPy's is rounded down. What it is for y = 0 does not matter."""
    return (x - np.fmod(x, y)) // y


def by_zero(x: Array, y: Array) -> Array:
    return y == 0


def upper_product(x: Array, y: Array) -> Array:
    """The upper half of the bits of the product."""
    bits = 8 * x.itemsize
    if bits < 64:
        return ((x.astype(np.int64) * y.astype(np.int64)) >> bits).astype(x.dtype)
    a, b = x.view(np.uint64), y.view(np.uint64)
    half = np.uint64(32)
    low, left, right = (a & LOW) * (b & LOW), (a >> half) * (b & LOW), (a & LOW) * (b >> half)
    carry = ((low >> half) + (left & LOW) + (right & LOW)) >> half
    upper = (a >> half) * (b >> half) + (left >> half) + (right >> half) + carry
    if x.dtype == np.int64:
        upper = upper - np.where(x < 0, b, 0).astype(np.uint64) - np.where(y < 0, a, 0).astype(np.uint64)
    return upper.view(x.dtype)


def shift_left(x: Array, amount: Array) -> Array:
    """By more than its bits: by all of them."""
    bits = 8 * x.itemsize
    return np.where(amount < bits, x << np.minimum(amount, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x: Array, amount: Array) -> Array:
    bits = 8 * x.itemsize
    shifted = x >> np.minimum(amount, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(amount < bits, shifted, x.dtype.type(0))


def shift_pair_left(low: Array, high: Array, amount: Array) -> Array:
    """The upper 32 bits of 64, shifted by at most 32."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both << amount.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def shift_pair_right(low: Array, high: Array, amount: Array) -> Array:
    """The lower 32 bits."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both >> amount.astype(np.uint64)).astype(np.uint32)


def extract_bits(x: Array, position: Array, length: Array) -> Array:
    """`bfe`: `length` bits from `position` on, of which the lower 8 bits count; above bit 31 lie signs, or zeros."""
    length = np.minimum(length & 0xFF, 32).astype(np.int64)
    shifted = x.astype(np.int64) >> np.minimum(position & 0xFF, 63).astype(np.int64)
    if x.dtype.kind == "u":
        return (shifted & ((1 << length) - 1)).astype(x.dtype)
    unused = 63 - length  # and one more: a shift by 64 is none
    return ((shifted << unused << 1) >> unused >> 1).astype(x.dtype)


def permute_bytes(x: Array, y: Array, selector: Array) -> Array:
    """`prmt`: each hexadecimal digit of the selector takes one of 8 bytes; with 8 added, the byte's sign all over."""
    both = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32))
    result = np.zeros(1, np.uint32)
    for i in range(4):
        digit = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = ((both >> (np.uint64(8) * (digit & np.uint32(7)))) & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result = result | (np.where(digit & np.uint32(8), sign, byte) << np.uint32(8 * i))
    return result


def same(x: Array) -> Array:
    return x


def choose(x: Array, y: Array, first: Array) -> Array:
    return np.where(first, x, y)
