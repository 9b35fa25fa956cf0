"""What an instruction's result is by its definition: exact arithmetic on Python's integers and fractions, rounded once.

It shares nothing with the interpreter, which computes with NumPy. Operands and results are bits, as integers; what is
only approximate on a GPU is rounded as if it were exact.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

FLOATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}
"""Bits of the exponent and of the fraction."""


def width(type_: str) -> int:
    """In bits; a predicate has 1."""
    if type_ == "pred":
        return 1
    return 32 if type_.endswith("x2") else int(type_.lstrip("bfsu"))


def signature(opcode: str) -> tuple[str, tuple[str, ...]]:
    """Types of the result and of the sources."""
    name, *modifiers, type_ = opcode.split(".")
    if name == "cvt":
        return ("b32", ("f32", "f32")) if modifiers[-1].endswith("x2") else (modifiers[-1], (type_,))
    if name == "setp":
        return "pred", (type_, type_, *(["pred"] if {"and", "or", "xor"} & set(modifiers) else []))
    if "wide" in modifiers:
        wide = f"{type_[0]}{2 * width(type_)}"
        return wide, (type_, type_, *([wide] if name == "mad" else []))
    more = {
        "selp": (type_, "pred"),
        "shl": ("u32",),
        "shr": ("u32",),
        "bfe": ("u32", "u32"),
        "shf": (type_, "u32"),
        "popc": (),
        **dict.fromkeys(["mov", "not", "abs", "neg", "rcp", "sqrt", "rsqrt", "ex2", "lg2"], ()),
        **dict.fromkeys(["fma", "mad", "prmt"], (type_, type_)),
    }.get(name, (type_,))
    return "u32" if name == "popc" else type_, (type_, *more)


def expected(opcode: str, *sources: int) -> int:
    """Bits of the result, from those of the sources; a NaN's are those of `quiet_nan`."""
    result, types = signature(opcode)
    if types[0].endswith("x2"):
        one = opcode.removesuffix("x2")
        halves = [
            (bits & 0xFFFF, bits >> 16) if type_.endswith("x2") else (bits, bits)
            for bits, type_ in zip(sources, types, strict=True)
        ]
        low, high = (expected(one, *half) for half in zip(*halves, strict=True))
        return low | high << 16
    if opcode.endswith("x2.f32"):
        upper, lower = (encode(opcode.split(".")[2].removesuffix("x2"), decode("f32", bits)) for bits in sources)
        return upper << 16 | lower
    values = [decode(type_, bits) for type_, bits in zip(types, sources, strict=True)]
    ftz = ".ftz." in opcode
    if ftz:
        values = [_flush(value, type_) for value, type_ in zip(values, types, strict=True)]
    value = _value(opcode, types[0], values)
    return encode(result, _flush(_rounded(result, value), result) if ftz and result in FLOATS else value)


# Numbers and their bits


def decode(type_: str, bits: int) -> Any:
    """A bool, an int, or a float, which holds every number of FLOATS."""
    if type_ == "pred":
        return bool(bits)
    if type_ in FLOATS:
        if type_ == "bf16":
            type_, bits = "f32", bits << 16
        size, code = {"f16": (2, "<e"), "f32": (4, "<f"), "f64": (8, "<d")}[type_]
        return struct.unpack(code, bits.to_bytes(size, "little"))[0]
    negative = type_[0] == "s" and bits >> (width(type_) - 1)
    return bits - (1 << width(type_)) if negative else bits


def encode(type_: str, value: Any) -> int:
    """The bits of a number: of an integer, those that there is room for; of a fraction, the nearest, ties to even."""
    if type_ not in FLOATS:
        return int(value) & (1 << width(type_)) - 1
    exponent_bits, fraction_bits = FLOATS[type_]
    infinity = (1 << exponent_bits) - 1 << fraction_bits
    sign = (math.copysign(1, value) < 0 if isinstance(value, float) else value < 0) << exponent_bits + fraction_bits
    if isinstance(value, float) and not math.isfinite(value):
        return quiet_nan(type_) if math.isnan(value) else sign | infinity
    magnitude, lowest = abs(Fraction(value)), 2 - (1 << exponent_bits - 1)
    exponent = lowest
    if magnitude:
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        exponent = max(exponent - (Fraction(2) ** exponent > magnitude), lowest)
    units = round(magnitude / Fraction(2) ** (exponent - fraction_bits))
    return sign | min((exponent - lowest << fraction_bits) + units, infinity)


def quiet_nan(type_: str) -> int:
    return (1 << sum(FLOATS[type_])) - 1


def is_nan(type_: str, bits: int) -> bool:
    return type_ in FLOATS and math.isnan(decode(type_, bits))


def _rounded(type_: str, value: Any) -> Any:
    return decode(type_, encode(type_, value)) if type_ in FLOATS else value


def _flush(value: Any, type_: str) -> Any:
    if type_ not in FLOATS or not math.isfinite(value):
        return value
    smallest_normal = Fraction(2) ** (2 - (1 << FLOATS[type_][0] - 1))
    return math.copysign(0.0, value) if abs(Fraction(value)) < smallest_normal else value


# Instructions


def _value(opcode: str, type_: str, values: list[Any]) -> Any:
    name, *modifiers = opcode.split(".")
    if name == "cvt":
        return _converted(modifiers, values[0])
    if name == "setp":
        return _compared(modifiers, *values)
    return (FLOATING if type_ in FLOATS and name not in ("mov", "selp") else BITWISE)[name](type_, modifiers, *values)


def _exactly(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Of fractions, where all are numbers and the result is not 0, whose sign floats know."""

    def value(type_: str, modifiers: list[str], *x: float) -> Any:
        if all(map(math.isfinite, x)):
            exact = operation(*map(Fraction, x))
            return exact if exact else operation(*x)
        return operation(*x)

    return value


def _fma(type_: str, modifiers: list[str], x: float, y: float, z: float) -> Any:
    if math.isfinite(x) and math.isfinite(y) and not math.isfinite(z):
        return z
    return _exactly(lambda x, y, z: x * y + z)(type_, modifiers, x, y, z)


def _divided(x: float, y: float) -> Any:
    if math.isnan(x) or math.isnan(y) or (math.isinf(x) and math.isinf(y)) or x == y == 0:
        return math.nan
    if x == 0 or y == 0 or math.isinf(x) or math.isinf(y):
        sign = math.copysign(1, x) * math.copysign(1, y)
        return math.copysign(0.0 if x == 0 or math.isinf(y) else math.inf, sign)
    return Fraction(x) / Fraction(y)


def _root(x: float) -> float:
    return x if x == 0 else math.nan if x < 0 else math.sqrt(x)


def _power_of_2(x: float) -> Any:
    return math.inf if x > 2000 else 0.0 if x < -2000 else 2.0**x


def _logarithm(x: float) -> float:
    return -math.inf if x == 0 else math.nan if x < 0 else math.log2(x)


def _extreme(of_two: Callable[..., Any]) -> Callable[..., Any]:
    def value(type_: str, modifiers: list[str], x: float, y: float) -> float:
        if math.isnan(x) or math.isnan(y):
            return math.nan if "NaN" in modifiers else y if math.isnan(x) else x
        return of_two(x, y, key=lambda value: (value, math.copysign(1, value)))  # -0 is below +0

    return value


FLOATING: dict[str, Callable[..., Any]] = {
    "add": _exactly(operator.add),
    "sub": _exactly(operator.sub),
    "mul": _exactly(operator.mul),
    "fma": _fma,
    "min": _extreme(min),
    "max": _extreme(max),
    "abs": lambda t, m, x: abs(x),
    "neg": lambda t, m, x: -x,
    "div": lambda t, m, x, y: _divided(x, y),
    "rcp": lambda t, m, x: _divided(1.0, x),
    "sqrt": lambda t, m, x: _root(x),
    "rsqrt": lambda t, m, x: _divided(1.0, _root(x)),
    "ex2": lambda t, m, x: _power_of_2(x),
    "lg2": lambda t, m, x: _logarithm(x),
}


def _quotient(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def _funnel(modifiers: list[str], low: int, high: int, amount: int) -> int:
    both = high << 32 | low
    return both << amount >> 32 if "l" in modifiers else both >> amount


def _bits_of(type_: str, x: int, position: int, length: int) -> int:
    position, length = position & 0xFF, length & 0xFF
    bits = [(x >> min(i, 31) if type_[0] == "s" else x >> i) & 1 for i in range(position, position + length)][:32]
    negative = type_[0] == "s" and bits and bits[-1]
    return sum(bit << i for i, bit in enumerate(bits)) - (1 << len(bits) if negative else 0)


def _permuted(x: int, y: int, selector: int) -> int:
    pool, result = (y << 32 | x).to_bytes(8, "little"), 0
    for i in range(4):
        digit = selector >> 4 * i & 0xF
        byte = pool[digit & 7]
        result |= (0xFF * (byte >> 7) if digit & 8 else byte) << 8 * i
    return result


BITWISE: dict[str, Callable[..., Any]] = {
    "mov": lambda t, m, x: x,
    "selp": lambda t, m, x, y, p: x if p else y,
    "add": lambda t, m, x, y: x + y,
    "sub": lambda t, m, x, y: x - y,
    "mul": lambda t, m, x, y: x * y >> width(t) if "hi" in m else x * y,
    "mad": lambda t, m, x, y, z: x * y + z,
    "div": lambda t, m, x, y: _quotient(x, y),
    "rem": lambda t, m, x, y: x - y * _quotient(x, y),
    "min": lambda t, m, x, y: min(x, y),
    "max": lambda t, m, x, y: max(x, y),
    "abs": lambda t, m, x: abs(x),
    "neg": lambda t, m, x: -x,
    "and": lambda t, m, x, y: x & y,
    "or": lambda t, m, x, y: x | y,
    "xor": lambda t, m, x, y: x ^ y,
    "not": lambda t, m, x: not x if t == "pred" else ~x,
    "shl": lambda t, m, x, n: x << min(n, 64),
    "shr": lambda t, m, x, n: x >> min(n, 64),
    "shf": lambda t, m, low, high, n: _funnel(m, low, high, n & 31 if "wrap" in m else min(n, 32)),
    "bfe": lambda t, m, x, position, length: _bits_of(t, x, position, length),
    "prmt": lambda t, m, x, y, selector: _permuted(x, y, selector),
    "popc": lambda t, m, x: x.bit_count(),
}

ORDERED = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge},
}


def _compared(modifiers: list[str], x: Any, y: Any, predicate: bool = False) -> bool:
    comparison = modifiers[0]
    if comparison in ("num", "nan"):
        value = (math.isnan(x) or math.isnan(y)) == (comparison == "nan")
    elif isinstance(x, float) and (math.isnan(x) or math.isnan(y)):
        value = comparison not in ORDERED
    else:
        value = ORDERED[comparison if comparison in ORDERED else comparison.removesuffix("u")](x, y)
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
    return combine[modifiers[1]](value, predicate) if modifiers[1] in combine else value


def _converted(modifiers: list[str], x: Any) -> Any:
    *rounding, result, source = modifiers
    round_ = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}.get(rounding[0] if rounding else "")
    if round_ is None or source not in FLOATS:
        return x
    if result in FLOATS:
        return math.copysign(float(round_(x)), x) if math.isfinite(x) else x
    bits = width(result)
    if math.isnan(x):
        return 0 if source != "f64" and bits < 64 else 1 << bits - 1
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if result[0] == "s" else (0, (1 << bits) - 1)
    return low if x < low else high if x > high else round_(x)
