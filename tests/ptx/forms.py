"""The instructions that compute a value of each lane from values of that lane, by their full opcodes.

An opcode that is not here is not known: no modifier is ever passed over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.ptx import values
from tests.ptx.values import Function

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}").type for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}").type for bits in (16, 32, 64)},
    "bf16": np.uint16,
    "f16x2": np.float16,
    "bf16x2": np.uint16,
}
"""What holds the values of PTX's types; those of `f16x2` and `bf16x2`, half by half."""


class Form(NamedTuple):
    function: Function
    """Of arrays of the sources' types. A NumPy ufunc can write its result in place."""
    result: str
    sources: tuple[str, ...]
    undefined: Function | None = None
    """Of the same arrays: where PTX leaves the result undefined."""


FORMS: dict[str, Form] = {}

SIGNED = ("s16", "s32", "s64")
UNSIGNED = ("u16", "u32", "u64")
INTEGERS = SIGNED + UNSIGNED
BITS = ("b16", "b32", "b64")


def _define(opcode: str, function: Function, result: str, *sources: str, undefined: Function | None = None) -> None:
    FORMS[opcode] = Form(function, result, sources, undefined)


def _define_f32(opcode: str, function: Function, sources: int) -> None:
    """`opcode.f32` and `opcode.ftz.f32`."""
    _define(f"{opcode}.f32", function, *["f32"] * (1 + sources))
    _define(f"{opcode}.ftz.f32", values.flushing(function), *["f32"] * (1 + sources))


def _define_16_bits(opcode: str, f16: Function, bf16: Function, sources: int) -> None:
    for type_, function in (("f16", f16), ("f16x2", f16), ("bf16", bf16), ("bf16x2", bf16)):
        _define(f"{opcode}.{type_}", function, *[type_] * (1 + sources))


# Integers and bits

for type_ in INTEGERS:
    for name, function in {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}.items():
        _define(f"{name}.{type_}", function, type_, type_, type_)
    _define(f"mul.lo.{type_}", np.multiply, type_, type_, type_)
    _define(f"mul.hi.{type_}", values.upper_product, type_, type_, type_)
    _define(f"mad.lo.{type_}", lambda x, y, z: x * y + z, type_, type_, type_, type_)
    _define(f"div.{type_}", values.quotient, type_, type_, type_, undefined=values.by_zero)
    _define(f"rem.{type_}", np.fmod, type_, type_, type_, undefined=values.by_zero)
    _define(f"shr.{type_}", values.shift_right, type_, type_, "u32")
for type_ in ("s16", "s32", "u16", "u32"):
    wide = f"{type_[0]}{2 * int(type_[1:])}"
    _define(f"mul.wide.{type_}", lambda x, y, to=DTYPES[wide]: np.multiply(x, y, dtype=to), wide, type_, type_)
    _define(f"mad.wide.{type_}", lambda x, y, z: np.multiply(x, y, dtype=z.dtype) + z, wide, type_, type_, wide)
for type_ in SIGNED:
    _define(f"abs.{type_}", np.absolute, type_, type_)
    _define(f"neg.{type_}", np.negative, type_, type_)
for type_ in ("pred", *BITS):
    for name, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        _define(f"{name}.{type_}", function, type_, type_, type_)
    _define(f"not.{type_}", np.invert, type_, type_)
for type_ in BITS:
    _define(f"shl.{type_}", values.shift_left, type_, type_, "u32")
for direction, function in {"l": values.shift_pair_left, "r": values.shift_pair_right}.items():
    for mode, limited in {"wrap": lambda amount: amount & 31, "clamp": lambda amount: np.minimum(amount, 32)}.items():
        _define(
            f"shf.{direction}.{mode}.b32",
            lambda low, high, amount, function=function, limited=limited: function(low, high, limited(amount)),
            *("b32", "b32", "b32", "u32"),
        )
for type_ in ("u32", "s32"):
    _define(f"bfe.{type_}", values.extract_bits, type_, type_, "u32", "u32")
_define("prmt.b32", values.permute_bytes, "b32", "b32", "b32", "b32")
_define("popc.b32", np.bitwise_count, "u32", "b32")
_define("popc.b64", np.bitwise_count, "u32", "b64")

# Floating point

for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
    for opcode in (name, f"{name}.rn"):
        _define_f32(opcode, function, 2)
        _define(f"{opcode}.f64", function, "f64", "f64", "f64")
        _define_16_bits(opcode, function, values.in_f32(function), 2)
_define_f32("fma.rn", values.fma_f32, 3)
_define("fma.rn.f64", values.fma_f64, "f64", "f64", "f64", "f64")
_define_16_bits("fma.rn", values.fma_f16, values.fma_bf16, 3)
for name, function in {"min": values.minimum, "max": values.maximum}.items():
    _define_f32(name, function, 2)
    _define(f"{name}.f64", function, "f64", "f64", "f64")
    _define_16_bits(name, function, values.in_f32(function), 2)
for name, function in {"min": values.minimum_or_nan, "max": values.maximum_or_nan}.items():
    _define(f"{name}.NaN.f32", function, "f32", "f32", "f32")
    _define(f"{name}.ftz.NaN.f32", values.flushing(function), "f32", "f32", "f32")
    _define_16_bits(f"{name}.NaN", function, values.in_f32(function), 2)
for name, function in {"abs": np.absolute, "neg": np.negative}.items():
    _define_f32(name, function, 1)
    _define(f"{name}.f64", function, "f64", "f64")
    _define_16_bits(name, function, values.in_f32(function), 1)
for opcode in ("div.rn", "div.full", "div.approx"):
    _define_f32(opcode, np.divide, 2)
for opcode, function in {
    "rcp.rn": values.reciprocal,
    "rcp.approx": values.reciprocal,
    "sqrt.rn": np.sqrt,
    "sqrt.approx": np.sqrt,
    "rsqrt.approx": values.reciprocal_root,
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
}.items():
    _define_f32(opcode, function, 1)
_define("div.rn.f64", np.divide, "f64", "f64", "f64")
_define("rcp.rn.f64", values.reciprocal, "f64", "f64")
_define("rcp.approx.ftz.f64", values.gross_reciprocal, "f64", "f64")
_define("sqrt.rn.f64", np.sqrt, "f64", "f64")
_define("rsqrt.approx.f64", values.reciprocal_root, "f64", "f64")

# Comparison and choice


def _define_comparison(opcode: str, function: Function, type_: str) -> None:
    """By itself, and combined with a predicate: `setp.lt.and.s32`."""
    _define(f"setp.{opcode}.{type_}", function, "pred", type_, type_)
    for name, combine in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        _define(
            f"setp.{opcode}.{name}.{type_}",
            lambda x, y, p, combine=combine: combine(function(x, y), p),
            *("pred", type_, type_, "pred"),
        )


for comparison in ("eq", "ne", "lt", "le", "gt", "ge"):
    for type_ in INTEGERS:
        _define_comparison(comparison, values.INTEGER_COMPARISONS[comparison], type_)
for comparison in ("eq", "ne"):
    for type_ in BITS:
        _define_comparison(comparison, values.INTEGER_COMPARISONS[comparison], type_)
for comparison, same in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
    for type_ in UNSIGNED:
        _define_comparison(comparison, values.INTEGER_COMPARISONS[same], type_)
for comparison, function in values.COMPARISONS.items():
    for type_ in ("f16", "f16x2", "f32", "f64"):
        _define_comparison(comparison, function, type_)
    for type_ in ("bf16", "bf16x2"):
        _define_comparison(comparison, values.of_bf16(function), type_)
for type_ in (*BITS, *INTEGERS, "f32", "f64"):
    _define(f"selp.{type_}", values.choose, type_, type_, type_, "pred")
for type_ in ("pred", *BITS, *INTEGERS, "f32", "f64"):
    _define(f"mov.{type_}", values.same, type_, type_)

# Conversion

INTEGERS_TO_CONVERT = ("s8", "u8", *INTEGERS)
ROUNDINGS: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}

for source in INTEGERS_TO_CONVERT:
    for result in INTEGERS_TO_CONVERT:
        _define(f"cvt.{result}.{source}", lambda x, to=DTYPES[result]: x.astype(to), result, source)
    for result in ("f32", "f64"):
        _define(f"cvt.rn.{result}.{source}", lambda x, to=DTYPES[result]: x.astype(to), result, source)
    _define(f"cvt.rn.f16.{source}", lambda x: values.to_f16(x.astype(np.float32)), "f16", source)
    _define(f"cvt.rn.bf16.{source}", lambda x: values.to_bf16(x.astype(np.longdouble)), "bf16", source)
for result in INTEGERS_TO_CONVERT:
    for name, rounding in ROUNDINGS.items():
        for source in ("f16", "f32", "f64"):
            function = values.to_integer(rounding, DTYPES[result], from_f64=source == "f64")
            _define(f"cvt.{name}.{result}.{source}", function, result, source)
        function = values.to_integer(rounding, DTYPES[result], from_f64=False)
        _define(f"cvt.{name}.ftz.{result}.f32", values.flushing_sources(function), result, "f32")
        _define(f"cvt.{name}.{result}.bf16", values.of_bf16(function), result, "bf16")
for name, rounding in ROUNDINGS.items():
    _define(f"cvt.{name}.f32.f32", rounding, "f32", "f32")
    _define(f"cvt.{name}.ftz.f32.f32", values.flushing(rounding), "f32", "f32")
    _define(f"cvt.{name}.f64.f64", rounding, "f64", "f64")
for result, to in {"f32": np.float32, "f64": np.float64}.items():
    _define(f"cvt.{result}.f16", lambda x, to=to: x.astype(to), result, "f16")
    _define(f"cvt.{result}.bf16", lambda x, to=to: values.from_bf16(x).astype(to), result, "bf16")
_define("cvt.f64.f32", lambda x: x.astype(np.float64), "f64", "f32")
_define("cvt.rn.f32.f64", lambda x: x.astype(np.float32), "f32", "f64")
for source in ("f32", "f64"):
    _define(f"cvt.rn.f16.{source}", values.to_f16, "f16", source)
    _define(f"cvt.rn.bf16.{source}", values.to_bf16, "bf16", source)
_define("cvt.rn.f16x2.f32", values.pair(lambda x: values.to_f16(x).view(np.uint16)), "b32", "f32", "f32")
_define("cvt.rn.bf16x2.f32", values.pair(values.to_bf16), "b32", "f32", "f32")
