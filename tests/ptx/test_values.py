"""Every instruction that computes values, against exact arithmetic."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence

import pytest

from tests.ptx import exact, program
from tests.ptx.forms import FORMS


def spelled_out(pattern: str) -> Iterator[str]:
    """`add.{s,u}32` as `add.s32` and `add.u32`."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


INTEGERS = "{s16,s32,s64,u16,u32,u64}"
SMALL_INTEGERS = "{s8,s16,s32,s64,u8,u16,u32,u64}"
HALVES = "{f16,f16x2,bf16,bf16x2}"
ORDERS = "{eq,ne,lt,le,gt,ge}"
FLOAT_ORDERS = "{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}"
COMBINED = "{.,.and.,.or.,.xor.}"
OPCODES = [
    opcode
    for pattern in (
        f"{{add,sub,min,max,mul.lo,mul.hi,mad.lo,div,rem,shr,mov,selp}}.{INTEGERS}",
        "{mul,mad}.wide.{s16,s32,u16,u32}",
        "{abs,neg}.{s16,s32,s64}",
        "{and,or,xor,not,mov}.{pred,b16,b32,b64}",
        "{shl,selp}.{b16,b32,b64}",
        "bfe.{u32,s32}",
        "shf.{l,r}.{wrap,clamp}.b32",
        "prmt.b32",
        "popc.{b32,b64}",
        "{add,sub,mul}{,.rn}.{f32,ftz.f32,f64}",
        "fma.rn.{f32,ftz.f32,f64}",
        f"{{add,sub,mul,add.rn,sub.rn,mul.rn,fma.rn,min,max,min.NaN,max.NaN,abs,neg}}.{HALVES}",
        "{min,max}{,.ftz,.NaN,.ftz.NaN}.f32",
        "{abs,neg}.{f32,ftz.f32}",
        "{min,max,abs,neg}.f64",
        "{div.rn,div.full,div.approx,rcp.rn,rcp.approx,sqrt.rn,sqrt.approx,rsqrt.approx,ex2.approx,lg2.approx}{,.ftz}.f32",
        "{div.rn,rcp.rn,rcp.approx.ftz,sqrt.rn,rsqrt.approx}.f64",
        "{mov,selp}.{f32,f64}",
        f"setp.{ORDERS}{COMBINED}{INTEGERS}",
        f"setp.{{lo,ls,hi,hs}}{COMBINED}{{u16,u32,u64}}",
        f"setp.{{eq,ne}}{COMBINED}{{b16,b32,b64}}",
        f"setp.{FLOAT_ORDERS}{COMBINED}{{f16,f16x2,bf16,bf16x2,f32,f64}}",
        f"cvt.{SMALL_INTEGERS}.{SMALL_INTEGERS}",
        f"cvt.rn.{{f16,bf16,f32,f64}}.{SMALL_INTEGERS}",
        f"cvt.{{rni,rzi,rmi,rpi}}.{SMALL_INTEGERS}.{{f16,bf16,f32,f64}}",
        f"cvt.{{rni,rzi,rmi,rpi}}.ftz.{SMALL_INTEGERS}.f32",
        "cvt.{rni,rzi,rmi,rpi}.{f32.f32,ftz.f32.f32,f64.f64}",
        "cvt.{f32,f64}.{f16,bf16}",
        "cvt.f64.f32",
        "cvt.rn.f32.f64",
        "cvt.rn.{f16,bf16}.{f32,f64}",
        "cvt.rn.{f16x2,bf16x2}.f32",
    )
    for opcode in spelled_out(pattern)
]
GROUPS: dict[tuple[str, ...], list[str]] = {}
"""Opcodes by name and types of the sources: those of a group run in one program."""
for opcode in OPCODES:
    GROUPS.setdefault((opcode.split(".")[0], *exact.signature(opcode)[1]), []).append(opcode)

APPROXIMATE = {
    **dict.fromkeys(["div.full", "div.approx", "rcp.approx", "sqrt.approx", "rsqrt.approx"], 2.0**-22),
    **dict.fromkeys(["ex2.approx", "lg2.approx"], 2.0**-22),
    "rcp.approx.ftz.f64": 2.0**-19,
    "rsqrt.approx.f64": 2.0**-50,
}
"""By what an opcode begins with: how far from the exact value the result may be, relative to it."""


BEYOND_A_TIE_OF_BF16 = (1 << 60) + (1 << 52) + 1


def edges(type_: str) -> list[int]:
    if type_ == "pred":
        return [0, 1]
    if type_.endswith("x2"):
        half = edges(type_.removesuffix("x2"))
        return [low | high << 16 for low, high in zip(half, half[3:] + half[:3], strict=True)]
    if type_ not in exact.FLOATS:
        bits = exact.width(type_)
        numbers = [0, 1, 2, 3, 7, -1, -2, -7, 1 << bits - 1, (1 << bits - 1) - 1, BEYOND_A_TIE_OF_BF16]
        return [number & (1 << bits) - 1 for number in numbers]
    numbers = [0.0, 1.0, 1.5, 2.5, 3.0, 127.5, 128.0, 300.7, 65504.0, 2.0**31, 2.0**63, 1e-3, float("inf")]
    one = exact.encode(type_, 1.0)
    numbers += [sign * (1 + 2.0**-tie + 2.0**-40) for tie in (8, 11, 24) for sign in (1, -1)]  # ties of narrower types
    bits = [exact.encode(type_, number) for number in numbers] + [1, 2, one + 1, one - 1, one >> 1]
    bits += [exact.encode(type_, float("inf")) - 1, 1 << exact.FLOATS[type_][1], (1 << exact.FLOATS[type_][1]) - 1]
    sign = 1 << exact.width(type_) - 1
    nans = [exact.quiet_nan(type_), exact.quiet_nan(type_) - 1, exact.encode(type_, float("inf")) + 1]
    return [sign_bit | each for each in bits + nans for sign_bit in (0, sign)]


def rows(types: Sequence[str], seed: str) -> list[tuple[int, ...]]:
    """256 rows of sources: each edge, combinations of edges, parts of their bits, and whatever bits."""
    source = random.Random(seed)

    def value(type_: str) -> int:
        size = exact.width(type_)
        kind = source.random()
        if kind < 0.5:
            return source.choice(edges(type_))
        return source.getrandbits(size) if kind < 0.8 else source.getrandbits(size) & source.choice(edges(type_))

    each_edge = list(zip(*([*edges(type_)] * 8 for type_ in types), strict=False))[:64]
    return each_edge + [tuple(value(type_) for type_ in types) for _ in range(256 - len(each_edge))]


def test_what_the_product_of_an_f64_fma_would_round_off():
    x, z = 1 + 2.0**-30, -(1 + 2.0**-29)
    bits = [[exact.encode("f64", value)] for value in (x, x, z)]
    assert program.results(["fma.rn.f64"], bits)["fma.rn.f64"] == [exact.encode("f64", 2.0**-60)]


def close(opcode: str, case: tuple[int, ...], got: int, expected: int) -> bool:
    result, _ = exact.signature(opcode)
    if result in ("f16x2", "bf16x2"):
        halves = ([bits >> shift & 0xFFFF for bits in (*case, got, expected)] for shift in (0, 16))
        return all(close(opcode.removesuffix("x2"), tuple(x[:-2]), *x[-2:]) for x in halves)
    if got == expected or (exact.is_nan(result, got) and exact.is_nan(result, expected) and not narrows(opcode)):
        return True
    x, y = exact.decode(result, got), exact.decode(result, expected)
    if opcode == "fma.rn.f64":
        product = exact.decode("f64", case[0]) * exact.decode("f64", case[1])
        return abs(x - y) <= 2.0**-63 * abs(product) + 2.0**-52 * abs(y)
    tolerance = max((far for start, far in APPROXIMATE.items() if opcode.startswith(start)), default=0)
    return tolerance > 0 and abs(x - y) <= tolerance * abs(y)


def narrows(opcode: str) -> bool:
    """To 16 bits, of which a GPU's NaN has all but the sign."""
    return re.match(r"cvt\.rn\.b?f16", opcode) is not None


def test_every_form_is_listed_here():
    assert sorted(OPCODES) == sorted(FORMS)


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_values(group: tuple[str, ...]):
    name, *types = group
    cases = rows(types, " ".join(group))
    if name in ("div", "rem") and types[0] not in exact.FLOATS:
        cases = [case for case in cases if case[1]]
    if name in ("shl", "shr"):
        cases = [(x, amount % 70 if amount < 1 << 31 else amount) for x, amount in cases]
    got = program.results(GROUPS[group], list(zip(*cases, strict=True)))
    for opcode in GROUPS[group]:
        for case, bits in zip(cases, got[opcode], strict=True):
            expected = exact.expected(opcode, *case)
            assert close(opcode, case, bits, expected), (
                f"{opcode} of {', '.join(map(hex, case))} is {bits:#x}, not {expected:#x}"
            )
