"""Memory, warps, blocks, branches and faults; `test_values.py` has what instructions compute."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ptx import interpreter
from tests.ptx.machine import Access, Fault, Statistics
from tests.ptx.parse import Unsupported
from tests.ptx.program import run

LANES = torch.arange(32, dtype=torch.int32)


def out(size: int = 32, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full((size,), -1, dtype=dtype)


def stored(body: str, *more: torch.Tensor, threads: int = 32, shared_memory: int = 0) -> list[int]:
    """What the threads leave in `%r0`."""
    result = out(threads)
    body = f"{body} mad.wide.u32 %d15, %t, 4, %x; st.global.b32 [%d15], %r0;"
    run(body, result, *more, threads=threads, shared_memory=shared_memory)
    return result.tolist()


# Global memory


@pytest.mark.parametrize(("bits", "register"), [(8, "%h"), (16, "%h"), (32, "%r"), (64, "%d")])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_accesses_of_every_width_move_bytes(bits, register, count):
    size = bits * count // 8
    if size > 16:
        with pytest.raises(Unsupported, match="32 bytes"):
            run("ld.global.v4.b64 {%d1, %d2, %d3, %d4}, [%x];", out())
        return
    vector = f".v{count}" if count > 1 else ""
    registers = ", ".join(f"{register}{i}" for i in range(count))
    given, result = torch.randint(0, 256, (33 * size,), dtype=torch.uint8), torch.zeros(33 * size, dtype=torch.uint8)
    statistics = run(
        f"""mad.wide.u32 %d8, %t, {size}, %x; mad.wide.u32 %d9, %t, {size}, %y;
        ld.global{vector}.b{bits} {{{registers}}}, [%d8+{size}];
        st.global{vector}.b{bits} [ %d9 + 0 ], {{ {registers} }};""",
        given,
        result,
    )
    assert torch.equal(result, torch.cat([given[size:], torch.zeros(size, dtype=torch.uint8)]))
    assert statistics.bytes == {Access("ld", "global", size): 32 * size, Access("st", "global", size): 32 * size}


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ("ld.global.s8 %r0, [%y];", -2),
        ("ld.global.u8 %r0, [%y];", 0xFE),
        ("ld.global.s16 %r0, [%y];", -258),
        ("ld.global.b16 %r0, [%y];", 0xFEFE),
        ("ld.global.v2.s8 {_, %r0}, [%y];", -2),
        ("ld.global.cg.b32 %r0, [%y];", -16843010),
        ("ld.global.ca.b32 %r0, [%y]; st.global.cs.b32 [%y], %r0; st.global.wt.b32 [%y], %r0;", -16843010),
        ("ld.global.b8 %h0, [%y]; cvt.s16.s8 %h1, %h0; cvt.s32.s16 %r0, %h1;", -2),
        ("ld.global.s8 %d0, [%y]; shr.s64 %d0, %d0, 32; cvt.u32.u64 %r0, %d0;", -1),
        ("ld.global.s16 %r1, [%y]; cvt.u8.u32 %r0, %r1;", 0xFE),
        ("ld.global.s16 %r1, [%y]; cvt.s8.s32 %r0, %r1;", -2),
    ],
)
def test_a_wider_register_takes_the_sign_or_zeros(load, expected):
    assert set(stored(load, torch.full((4,), -2, dtype=torch.int8))) == {expected}


def test_the_lower_bits_of_a_wider_register_are_stored():
    result = out(2)
    run("mov.b64 %d0, -4294967295; st.global.b32 [%x], %d0; mov.b32 %r0, 258; st.global.b8 [%x+4], %r0;", result)
    assert result.tolist() == [1, -254]


def test_a_mask_limits_loads_and_stores():
    given, result = LANES + 100, out()
    statistics = run(
        """setp.lt.u32 %p0, %t, 10; mad.wide.u32 %d0, %t, 4, %x; mad.wide.u32 %d1, %t, 4, %y;
        mov.b32 %r0, 5; @%p0 ld.global.b32 %r0, [%d0]; setp.ge.u32 %p1, %t, 30; @!%p1 st.global.b32 [%d1], %r0;""",
        given[:10].clone(),
        result,
    )
    assert result.tolist() == [*range(100, 110), *[5] * 20, -1, -1]
    assert statistics.bytes == {Access("ld", "global", 4): 40, Access("st", "global", 4): 120}


def test_one_access_can_reach_several_tensors():
    tensors = [LANES.clone(), LANES + 100, out()]
    run(
        """and.b32 %r0, %t, 1; setp.eq.b32 %p0, %r0, 0; selp.b64 %d0, %x, %y, %p0; selp.b64 %d5, %y, %x, %p0;
        mad.wide.u32 %d1, %t, 4, %d0; ld.global.b32 %r1, [%d1]; mad.wide.u32 %d2, %t, 4, %z; st.global.b32 [%d2], %r1;
        mad.wide.u32 %d3, %t, 4, %d5; st.global.b32 [%d3], 7;""",
        *tensors,
    )
    assert tensors[2].tolist() == [i + 100 * (i % 2) for i in range(32)]
    assert tensors[0].tolist() == [7 if i % 2 else i for i in range(32)]
    assert tensors[1].tolist() == [i + 100 if i % 2 else 7 for i in range(32)]


def test_a_view_gives_its_storage():
    given, result = torch.arange(100, dtype=torch.int32), out()
    run("mad.wide.u32 %d0, %t, 4, %x; ld.global.b32 %r0, [%d0+-4]; st.global.b32 [%y], %r0;", given[50:60], result)
    assert result[0] == 80


def test_a_storage_may_start_anywhere():
    whole = torch.zeros(16, dtype=torch.int32)
    shift = -whole.data_ptr() // 4 % 4 + 1
    part = torch.from_numpy(whole.numpy()[shift : shift + 8])
    run("mov.b32 %r0, 2; st.global.b32 [%x], 1; st.global.v4.b32 [%x+12], {%r0, %r0, %r0, %r0};", part)
    assert part.tolist() == [1, 0, 0, 2, 2, 2, 2, 0]
    with pytest.raises(Fault, match="out-of-bounds"):
        run("ld.global.b32 %r0, [%x+-4];", part)


PLACES = {
    "one past the end": ("ld.global.b32 %r0, [%x+64];", "out-of-bounds 4-byte global ld"),
    "across the end": ("ld.global.b64 %d0, [%x+64];", "out-of-bounds 8-byte global ld"),
    "before the start": ("st.global.b8 [%x+-1], 0;", "out-of-bounds 1-byte global st"),
    "a null pointer": ("mov.b64 %d0, 0; ld.global.b8 %h0, [%d0];", "out-of-bounds 1-byte global ld at 0x0"),
    "misaligned": ("ld.global.b32 %r0, [%x+2];", "misaligned 4-byte global ld"),
    "a vector's part aligned alone": ("st.global.v4.b32 [%x+8], {%t, %t, %t, %t};", "misaligned 16-byte global st"),
}


@pytest.mark.parametrize(("body", "message"), PLACES.values(), ids=PLACES.keys())
def test_a_bad_address_is_a_fault(body, message):
    with pytest.raises(Fault, match=message) as fault:
        run(body, torch.zeros(16, dtype=torch.int32))
    assert f"thread 0 of block (0, 0, 0) of kernel: {body.split(';')[-2].strip()}" in str(fault.value)


def test_between_two_tensors_is_a_fault():
    whole = torch.zeros(64, dtype=torch.uint8).numpy()
    parts = torch.from_numpy(whole[:16]), torch.from_numpy(whole[48:])
    run("mul.wide.u32 %d0, %t, 48; add.s64 %d0, %d0, %x; setp.lt.u32 %p0, %t, 2; @%p0 ld.global.b8 %h0, [%d0];", *parts)
    with pytest.raises(Fault, match=f"at {parts[0].data_ptr() + 16:#x}, thread 1 of"):
        run("mad.wide.u32 %d0, %t, 16, %x; ld.global.b8 %h0, [%d0];", *parts)


def test_a_fault_names_the_lane_and_the_block():
    body = """mov.u32 %r0, %ctaid.x; setp.eq.b32 %p0, %r0, 2; setp.eq.and.b32 %p1, %t, 5, %p0;
    @%p1 ld.global.b32 %r1, [%x+4];"""
    with pytest.raises(Fault, match=r"thread 5 of block \(2, 1, 0\) of kernel: @%p1 ld.global.b32 %r1"):
        run(f"mov.u32 %r2, %ctaid.y; setp.eq.b32 %p2, %r2, 0; @%p2 ret; {body}", out(1), grid=(3, 2, 1))


# Parameters and special registers


def test_parameters_hold_their_arguments():
    result = out(10)
    run(
        """ld.param.b32 %r0, [a1]; ld.param.b32 %r1, [a2]; ld.param.b64 %d0, [a3]; ld.param.b8 %h0, [a4];
        ld.param.s32 %d1, [a1]; ld.param.b16 %h1, [a1]; ld.param.b32 %r2, [a3+4]; ld.param.b64 %d2, [a5];
        st.global.b32 [%x], %r0; st.global.b32 [%x+4], %r1; st.global.b64 [%x+8], %d0; st.global.b8 [%x+16], %h0;
        shr.s64 %d1, %d1, 32; st.global.b32 [%x+20], %d1; st.global.b16 [%x+24], %h1; st.global.b32 [%x+28], %r2;
        st.global.b64 [%x+32], %d2;""",
        result,
        -7,
        1.5,
        (5 << 32) + 6,
        True,
        2.5,
        types=["u64", "u32", "f32", "u64", "u8", "f64"],
    )
    assert result.tolist() == [-7, 0x3FC00000, 6, 5, -255, -1, -7, 5, 0, 0x40040000]


def test_a_parameter_may_be_read_from_its_address():
    result = out(64)
    run(
        """mov.b64 %d0, a1; mov.b64 %d1, a2; setp.lt.u32 %p0, %t, 9; selp.b64 %d2, %d0, %d1, %p0;
        ld.param.b64 %d3, [%d2]; ld.param.b32 %r0, [%d2+4]; mad.wide.u32 %d4, %t, 8, %x;
        cvt.u32.u64 %r1, %d3; st.global.b32 [%d4], %r1; st.global.b32 [%d4+4], %r0;""",
        result,
        (5 << 32) + 6,
        (7 << 32) + 8,
        types=["u64", "u64", "u64"],
    )
    assert result.view(32, 2).tolist() == [[6, 5]] * 9 + [[8, 7]] * 23


@pytest.mark.parametrize("offset", [-8, 1, 16])
def test_an_address_of_no_parameter_is_a_fault(offset):
    body = f"mov.b64 %d0, a0; setp.eq.u32 %p0, %t, 5; @%p0 add.s64 %d0, %d0, {offset}; ld.param.b64 %d1, [%d0];"
    with pytest.raises(Fault, match="no parameter's address, thread 5 "):
        run(body, out(1), 0, types=["u64", "u64"])


def test_blocks_know_where_they_are():
    result = out(2 * 3 * 4)
    run(
        """mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z;
        mov.u32 %r3, %nctaid.x; mov.u32 %r4, %nctaid.y; mov.u32 %r5, %nctaid.z; mov.u32 %r6, %ntid.x;
        mad.lo.s32 %r7, %r2, %r4, %r1; mad.lo.s32 %r7, %r7, %r3, %r0; mad.wide.u32 %d0, %r7, 4, %x;
        mad.lo.s32 %r8, %r2, 10, %r1; mad.lo.s32 %r8, %r8, 10, %r0; mad.lo.s32 %r8, %r5, 1000, %r8;
        mad.lo.s32 %r8, %r6, 10000, %r8; st.global.b32 [%d0], %r8;""",
        result,
        grid=(2, 3, 4),
        threads=64,
    )
    assert result.tolist() == [644000 + 100 * z + 10 * y + x for z in range(4) for y in range(3) for x in range(2)]


def test_more_blocks_than_run_at_once(monkeypatch):
    monkeypatch.setattr(interpreter, "LANES_AT_ONCE", 128)
    result = out(7)
    body = "mov.u32 %r0, %ctaid.x; mad.wide.u32 %d0, %r0, 4, %x; st.global.b32 [%d0], %r0;"
    statistics = run(body, result, grid=(7, 1, 1), threads=64)
    assert result.tolist() == list(range(7))
    assert statistics.bytes == {Access("st", "global", 4): 4 * 64 * 7}


def test_no_blocks_do_nothing():
    assert run("st.global.b32 [%x], 0;", out(), grid=(0, 1, 1)) == Statistics()


# Parts of registers


def test_registers_are_taken_apart_and_put_together():
    result = out(4)
    run(
        """mov.b32 %r0, 0x11223344; mov.b32 {%h0, %h1}, %r0; mov.b32 %r1, {%h1, %h0}; st.global.b32 [%x], %r1;
        mov.b64 %d0, {%r0, %r1}; mov.b64 {_, %r2}, %d0; st.global.b32 [%x+4], %r2; st.global.b64 [%x+8], %d0;""",
        result,
    )
    assert result.tolist() == [0x33441122, 0x33441122, 0x11223344, 0x33441122]


def test_immediates_are_numbers_of_the_type():
    result = out(6)
    run(
        """mov.b32 %r0, 0f3F800000; st.global.b32 [%x], %r0; mov.b64 %d0, 0d3FF8000000000000; st.global.b64 [%x+8], %d0;
        mov.b16 %h0, -1; mov.pred %p0, -1; selp.b32 %r1, 0x7fU, 0, %p0; st.global.b32 [%x+4], %r1;
        cvt.u32.u16 %r2, %h0; st.global.b32 [%x+16], %r2; mov.b32 %r3, 4294967295; st.global.b32 [%x+20], %r3;""",
        result,
    )
    assert result.tolist() == [0x3F800000, 0x7F, 0, 0x3FF80000, 0xFFFF, -1]


# Branches


def test_branches_part_and_meet_again():
    body = """mov.b32 %r0, 0; setp.lt.u32 %p0, %t, 7; @%p0 bra LOW; add.s32 %r0, %r0, 100; bra.uni END;
    LOW: add.s32 %r0, %r0, 1; END: shfl.sync.idx.b32 %r1, %r0, 31, 31, -1; add.s32 %r0, %r0, %r1;"""
    assert stored(body) == [101] * 7 + [200] * 25


def test_a_side_behind_the_place_where_the_sides_meet():
    body = """mov.b32 %r0, 0; setp.lt.u32 %p0, %t, 7; @%p0 bra LOW; add.s32 %r0, %r0, 100;
    MEET: shfl.sync.idx.b32 %r1, %r0, 31, 31, -1; add.s32 %r0, %r0, %r1; bra END;
    LOW: add.s32 %r0, %r0, 1; bra MEET; END:"""
    assert stored(body) == [101] * 7 + [200] * 25


def test_sides_meet_in_every_trip_of_a_loop_that_is_entered_in_the_middle():
    body = """mov.b32 %r0, 0; mov.b32 %r2, 0; bra.uni TOP;
    ODD: add.s32 %r0, %r0, 1; MEET: shfl.sync.idx.b32 %r1, %r0, 1, 31, -1; add.s32 %r0, %r0, %r1; add.s32 %r2, %r2, 1;
    setp.ge.u32 %p1, %r2, 3; @%p1 bra END;
    TOP: and.b32 %r3, %t, 1; setp.eq.b32 %p0, %r3, 1; @%p0 bra ODD; add.s32 %r0, %r0, 10; bra MEET;
    END: bar.warp.sync -1;"""
    odd, even = 0, 0
    for _ in range(3):
        even, odd = even + 10 + odd + 1, 2 * (odd + 1)
    assert stored(body) == [even, odd] * 16


FIVES = {
    "a NumPy ufunc": "add.s32 %r0, 2, 3;",
    "a function": "mov.b32 %r0, 5;",
    "a division": "div.s32 %r0, 10, 2;",
    "both halves": "mov.b32 %r1, 5; add.f16x2 %r0, %r1, 0;",
    "put together": "mov.b32 %r0, {%h0, %h1};",
    "taken apart": "mov.b64 {%r0, _}, %d0;",
    "a parameter": "ld.param.b32 %r0, [a1];",
    "loaded": "ld.global.b32 %r0, [%y];",
    "a shuffle": "shfl.sync.idx.b32 %r0, 5, 0, 31, 0x7f;",
    "a reduction": "redux.sync.max.s32 %r0, 5, 0x7f;",
    "under a guard": "@%p1 mov.b32 %r0, 5;",
    "under a guard that lets none through": "@!%p1 add.s32 %r0, 1, 2; mov.b32 %r0, 5;",
}


@pytest.mark.parametrize("instruction", FIVES.values(), ids=FIVES.keys())
def test_only_lanes_on_the_branch_take_part(instruction):
    result = out()
    run(
        f"""mov.pred %p1, -1; mov.b16 %h0, 5; mov.b16 %h1, 0; mov.b64 %d0, 5; mov.b32 %r0, 9;
        setp.lt.u32 %p0, %t, 7; @!%p0 bra END; {instruction} END: mad.wide.u32 %d1, %t, 4, %x;
        st.global.b32 [%d1], %r0;""",
        result,
        5,
        torch.tensor([5]),
        types=["u64", "u32", "u64"],
    )
    assert result.tolist() == [5] * 7 + [9] * 25


def test_each_thread_has_its_own_number_of_trips():
    body = """mov.b32 %r0, 0; mov.b32 %r1, 0; TOP: setp.ge.u32 %p0, %r1, %t; @%p0 bra END;
    add.s32 %r0, %r0, %r1; add.s32 %r1, %r1, 1; bra TOP; END:"""
    assert stored(body, threads=64) == [i * (i - 1) // 2 for i in range(64)]


def test_threads_that_have_returned_do_no_more():
    result = out()
    statistics = run(
        """mad.wide.u32 %d0, %t, 4, %x; st.global.b32 [%d0], 1; setp.ge.u32 %p0, %t, 3; @%p0 ret;
        st.global.b32 [%d0], 2;""",
        result,
    )
    assert result.tolist() == [2] * 3 + [1] * 29
    assert statistics.instructions["st.global.b32"] == 35
    assert statistics.instructions["ret"] == 35


def test_a_nested_loop_within_a_branch():
    body = """mov.b32 %r0, 0; and.b32 %r1, %t, 1; setp.eq.b32 %p0, %r1, 0; @%p0 bra END; mov.b32 %r2, 0;
    OUTER: mov.b32 %r3, 0; INNER: add.s32 %r0, %r0, 1; add.s32 %r3, %r3, 1; setp.le.u32 %p1, %r3, %r2; @%p1 bra INNER;
    add.s32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %t; @%p2 bra OUTER; END:"""
    assert stored(body) == [i * (i + 1) // 2 if i % 2 else 0 for i in range(32)]


# Shared memory and barriers

REVERSE = """shl.b32 %r1, %t, 2; mov.b32 %r2, shared; add.s32 %r2, %r2, %r1; st.shared.b32 [%r2], %t; bar.sync 0;
sub.s32 %r3, 63, %t; shl.b32 %r3, %r3, 2; ld.shared.b32 %r0, [%r3+0];"""


def test_threads_of_a_block_share_memory():
    assert stored(REVERSE, threads=64, shared_memory=256) == list(reversed(range(64)))


def test_blocks_do_not_share_memory():
    result = out(2)
    run(
        """mov.u32 %r0, %ctaid.x; setp.eq.b32 %p0, %t, 31; @%p0 st.shared.b32 [shared+4], %r0; bar.sync 0;
        mov.b32 %r1, 0; @%p0 ld.shared.b32 %r1, [shared+4]; shfl.sync.idx.b32 %r1, %r1, 31, 31, -1;
        mad.wide.u32 %d0, %r0, 4, %x; st.global.b32 [%d0], %r1;""",
        result,
        grid=(2, 1, 1),
        shared_memory=12,
    )
    assert result.tolist() == [0, 1]


SHARED = {
    "past the end": ("st.shared.b32 [shared+8], 0;", "out-of-bounds 4-byte shared st at 0x8"),
    "before the start": ("mov.b32 %r0, 0; st.shared.b32 [%r0+-4], 0;", "out-of-bounds 4-byte shared st at -0x4"),
    "misaligned": ("st.shared.v2.b32 [shared+4], {%t, %t};", "misaligned 8-byte shared st at 0x4"),
    "never written": ("st.shared.b32 [shared], 0; ld.shared.v2.b32 {%r1, %r2}, [shared];", "never written: 8-byte"),
}


@pytest.mark.parametrize(("body", "message"), SHARED.values(), ids=SHARED.keys())
def test_a_bad_use_of_shared_memory_is_a_fault(body, message):
    with pytest.raises(Fault, match=message):
        run(body, out(), shared_memory=8)


def test_shared_memory_is_empty_at_every_launch():
    body = """ld.param.b32 %r0, [a0]; setp.eq.b32 %p0, %t, %r0; @%p0 st.shared.b32 [shared], 0; bar.sync 0;
    ld.shared.b32 %r1, [shared];"""
    run(body, 5, types=["u32"], shared_memory=8)
    with pytest.raises(Fault, match="never written"):
        run(body, 99, types=["u32"], shared_memory=8)


BARRIERS = {
    "half of a block": "setp.lt.u32 %p0, %t, 32; @%p0 bra END; bar.sync 0; END:",
    "half of a warp": "setp.lt.u32 %p0, %t, 48; @%p0 bra END; bar.sync 0; END:",
    "under a guard": "setp.lt.u32 %p0, %t, 32; @%p0 bar.sync 0;",
}


@pytest.mark.parametrize("body", BARRIERS.values(), ids=BARRIERS.keys())
def test_a_barrier_that_some_threads_pass_by_is_a_fault(body):
    with pytest.raises(Fault, match="a barrier that its whole block does not reach, thread"):
        run(body, threads=64)


def test_a_barrier_does_not_wait_for_threads_that_have_returned():
    run("setp.lt.u32 %p0, %t, 32; @%p0 ret; bar.sync 0;", threads=64)


def test_threads_are_back_at_every_launch():
    body = """ld.param.b32 %r0, [a0]; setp.lt.u32 %p0, %t, %r0; @%p0 bar.sync 0;
    setp.lt.u32 %p1, %t, 40; @%p1 ret;"""
    run(body, 64, types=["u32"], threads=64)
    with pytest.raises(Fault, match="a barrier"):
        run(body, 32, types=["u32"], threads=64)


def test_there_may_be_no_memory():
    with pytest.raises(Fault, match="out-of-bounds"):
        run("ld.global.b32 %r0, [%x];", torch.zeros(0))
    with pytest.raises(Fault, match="out-of-bounds"):
        run("mov.b64 %d0, 64; ld.global.b32 %r0, [%d0];")
    run("st.global.b32 [%y], 0;", torch.zeros(0), out())


def test_blocks_reach_barriers_by_themselves():
    body = "mov.u32 %r0, %ctaid.x; setp.eq.b32 %p0, %r0, 0; @%p0 bra END; bar.sync 0; END: bar.sync 0;"
    run(body, grid=(3, 1, 1), threads=64)


# Warps


@pytest.mark.parametrize(
    ("mode", "amount", "limits", "expected"),
    [
        ("bfly", 16, 31, [i ^ 16 for i in range(32)]),
        ("bfly", 3, 31, [i ^ 3 for i in range(32)]),
        ("idx", 5, 31, [5] * 32),
        ("idx", 40, 31, [8] * 32),
        ("idx", 1, 0x1C1F, [i // 4 * 4 + 1 for i in range(32)]),
        ("up", 1, 0, [max(i - 1, 0) for i in range(32)]),
        ("up", 2, 0x1800, [i - 2 if i % 8 >= 2 else i for i in range(32)]),
        ("down", 3, 31, [i + 3 if i + 3 < 32 else i for i in range(32)]),
        ("down", 4, 0x181F, [i + 4 if i % 8 < 4 else i for i in range(32)]),
        ("bfly", 8, 7, [i ^ 8 if i >= 8 and i ^ 8 <= 7 else i for i in range(32)]),
    ],
)
def test_shuffles(mode, amount, limits, expected):
    body = f"mul.lo.s32 %r1, %t, 10; shfl.sync.{mode}.b32 %r0, %r1, {amount}, {limits}, -1;"
    assert stored(body, threads=64) == [10 * (i + first) for first in (0, 32) for i in expected]


def test_a_shuffle_by_what_each_lane_asks_for():
    body = "xor.b32 %r1, %t, 31; shfl.sync.idx.b32 %r0, %t, %r1, 31, -1;"
    assert stored(body) == [31 - i for i in range(32)]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add.s32", -272),
        ("add.u32", -272),
        ("min.s32", -24),
        ("max.s32", 7),
        ("min.u32", 0),
        ("max.u32", -1),
        ("and.b32", 0),
        ("or.b32", -1),
        ("xor.b32", 0),
    ],
)
def test_reductions_over_a_warp(operation, expected):
    assert set(stored(f"sub.s32 %r1, 7, %t; redux.sync.{operation} %r0, %r1, -1;")) == {expected}


def test_a_reduction_over_the_named_lanes():
    body = """and.b32 %r1, %t, 1; mov.b32 %r2, 0x55555555; shl.b32 %r2, %r2, %r1;
    sub.s32 %r5, %t, 100; redux.sync.max.s32 %r3, %r5, %r2; redux.sync.min.s32 %r6, %t, %r2;
    redux.sync.add.s32 %r4, %t, %r2; mad.lo.s32 %r0, %r3, 1000, %r4; mad.lo.s32 %r0, %r6, 100000, %r0;"""
    assert stored(body) == [-70000 + 240 if i % 2 == 0 else 100000 - 69000 + 256 for i in range(32)]


PARTS_OF_WARPS = {
    "a shuffle of half a warp": "@%p0 shfl.sync.bfly.b32 %r0, %t, 1, 31, -1;",
    "a lane that is not named": "@%p0 shfl.sync.idx.b32 %r0, %t, 0, 31, 0x7fff;",
    "a lane named that does not come": "@%p0 shfl.sync.bfly.b32 %r0, %t, 0, 31, 0x1ffff;",
    "a read of one not named": "@%p0 shfl.sync.bfly.b32 %r0, %t, 16, 31, 0xffff;",
    "a reduction": "@%p0 redux.sync.add.s32 %r0, %t, -1;",
    "a barrier of the warp": "@%p0 bar.warp.sync -1;",
    "ldmatrix": "@%p0 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [shared];",
    "not all of those that remain": "@!%p0 bra END; bar.warp.sync -1; END:",
}


@pytest.mark.parametrize("body", PARTS_OF_WARPS.values(), ids=PARTS_OF_WARPS.keys())
def test_a_warps_instruction_without_all_that_it_names_is_a_fault(body):
    with pytest.raises(Fault, match="the lanes named are not those that take part, thread"):
        run(f"setp.lt.u32 %p0, %t, 16; mov.b32 %r0, 0; {body}", shared_memory=128)


def test_named_lanes_alone_need_to_come():
    body = """mov.b32 %r0, %t; setp.lt.u32 %p0, %t, 16; @%p0 shfl.sync.bfly.b32 %r0, %t, 1, 31, 0xffff;
    @%p0 bar.warp.sync 0xffff; bar.warp.sync -1;"""
    assert stored(body) == [i ^ 1 for i in range(16)] + list(range(16, 32))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_are_loaded_and_stored(count, transposed):
    """Of each, lane 4 r + c has the numbers 2 c and 2 c + 1 of row r; of the transposed one, with `.trans`."""
    given, result = torch.arange(4 * 64, dtype=torch.int16).view(4, 8, 8), torch.zeros(32, 4, dtype=torch.int32)
    stored_again = torch.zeros(4, 8, 8, dtype=torch.int16)
    registers = ", ".join(f"%r{i}" for i in range(count))
    run(
        f"""mov.b32 %r0, 0; mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0;
        shl.b32 %r5, %t, 4; mad.wide.u32 %d0, %t, 16, %x;
        ld.global.v4.b32 {{%r8, %r9, %r10, %r11}}, [%d0]; st.shared.v4.b32 [%r5], {{%r8, %r9, %r10, %r11}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {{{registers}}}, [%r5+0];
        mad.wide.u32 %d1, %t, 16, %y; st.global.v4.b32 [%d1], {{%r0, %r1, %r2, %r3}};
        stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r5+512], {{{registers}}}; bar.sync 0;
        setp.lt.u32 %p0, %t, {8 * count}; mad.wide.u32 %d2, %t, 16, %z;
        @%p0 ld.shared.v4.b32 {{%r8, %r9, %r10, %r11}}, [%r5+512];
        @%p0 st.global.v4.b32 [%d2], {{%r8, %r9, %r10, %r11}};""",
        given,
        result,
        stored_again,
        shared_memory=1024,
    )
    matrices = given.mT if transposed else given
    expected = matrices.contiguous().view(torch.int32).reshape(4, 32).T * (torch.arange(4) < count)
    assert torch.equal(result, expected)
    assert torch.equal(stored_again[:count], given[:count])


# What nothing may depend on

UNWRITTEN = {
    "stored": "st.global.b32 [%x], %r0;",
    "an address": "ld.global.b32 %r1, [%d0];",
    "a guard": "@%p0 st.global.b32 [%x], 0;",
    "a branch": "@%p0 bra END; END:",
    "computed with": "add.s32 %r1, %r0, 1; st.global.b32 [%x], %r1;",
    "computed with the other": "add.s32 %r1, %t, %r0; st.global.b32 [%x], %r1;",
    "handed over by a shuffle": "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; st.global.b32 [%x], %r1;",
    "a lane to read": "shfl.sync.idx.b32 %r1, %t, %r0, 31, -1;",
    "lanes that take part": "redux.sync.add.s32 %r1, %t, %r0;",
    "reduced": "redux.sync.add.s32 %r1, %r0, -1; st.global.b32 [%x], %r1;",
    "written by some threads": "setp.lt.u32 %p1, %t, 31; @%p1 mov.b32 %r0, 0; st.global.b32 [%x], %r0;",
    "written on one path": "setp.lt.u32 %p1, %t, 31; @%p1 bra A; bra B; A: mov.b32 %r0, 0; B: st.global.b32 [%x], %r0;",
    "written on the other path": "setp.lt.u32 %p1, %t, 31; @%p1 bra A; mov.b32 %r0, 0; A: st.global.b32 [%x], %r0;",
    "written in the next trip": """mov.b32 %r1, 0; TOP: setp.eq.b32 %p1, %r1, 0; @!%p1 st.global.b32 [%x], %r2;
    @%p1 mov.b32 %r2, %r0; add.s32 %r1, %r1, 1; setp.lt.s32 %p2, %r1, 2; @%p2 bra TOP;""",
    "written by none of its parts": "mov.b32 %r0, {%h0, %h1}; st.global.b32 [%x], %r0;",
}


@pytest.mark.parametrize("body", UNWRITTEN.values(), ids=UNWRITTEN.keys())
def test_the_use_of_a_register_never_written_is_a_fault(body):
    with pytest.raises(Fault, match=r"%[rdp]\d, never written or computed from what was not, is used, thread"):
        run(body, out())


HARMLESS = {
    "not used": "add.s32 %r1, %r2, 1; st.global.b32 [%x], 0;",
    "guarded alike": "setp.lt.u32 %p0, %t, 5; @%p0 mov.b32 %r0, 1; add.s32 %r1, %r0, 1; @%p0 st.global.b32 [%x], %r1;",
    "shuffled from those that have it": """setp.lt.u32 %p0, %t, 16; @%p0 mov.b32 %r0, 1;
    shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1; @!%p0 st.global.b32 [%x], %r1;""",
    "reduced by those that have it": """setp.lt.u32 %p0, %t, 16; mov.b32 %r2, 0xffff; @%p0 mov.b32 %r0, 1;
    not.b32 %r3, %r2; selp.b32 %r2, %r2, %r3, %p0; redux.sync.add.s32 %r1, %r0, %r2; @%p0 st.global.b32 [%x], %r1;""",
    "half of a register": "mov.b16 %h0, 0; mov.b32 %r0, {%h0, %h1}; mov.b32 {%h2, _}, %r0; st.global.b16 [%x], %h2;",
    "bytes": "mov.b32 %r0, 0; prmt.b32 %r1, %r0, %r2, 0x3210; st.global.b32 [%x], %r1;",
    "written again": "setp.lt.u32 %p0, %t, 5; @%p0 mov.b32 %r0, 1; @!%p0 mov.b32 %r0, 2; st.global.b32 [%x], %r0;",
}


@pytest.mark.parametrize("body", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_was_never_written_may_lie_about(body):
    run(body, out())


def test_registers_are_empty_at_every_launch():
    body = "ld.param.b32 %r1, [a1]; setp.eq.b32 %p0, %r1, 1; @%p0 mov.b32 %r0, 1; st.global.b32 [%x], %r0;"
    run(body, out(), 1, types=["u64", "u32"])
    with pytest.raises(Fault, match="never written"):
        run(body, out(), 0, types=["u64", "u32"])


@pytest.mark.parametrize("name", ["div", "rem"])
def test_division_by_zero_is_a_fault(name):
    body = f"setp.ne.b32 %p0, %t, 0; mov.b32 %r0, 1; @%p0 {name}.s32 %r0, 6, %t;"
    assert stored(body)[1:4] == ([6, 3, 2] if name == "div" else [0, 0, 0])
    with pytest.raises(Fault, match="undefined result, thread 0"):
        run(f"{name}.s32 %r0, 6, %t;")


# What is not known

UNKNOWN = {
    "instruction": ("mma.sync %r0, %r1;", "mma.sync is not known"),
    "modifier": ("add.sat.s32 %r0, %t, 1;", "add.sat.s32 is not known"),
    "rounding": ("add.rz.f32 %r0, %t, %t;", "add.rz.f32 is not known"),
    "type": ("mul.lo.s8 %r0, %t, 1;", "mul.lo.s8 is not known"),
    "vector": ("ld.global.v8.b32 {%r0}, [%x];", "ld.global.v8.b32 is not known"),
    "order of memory": ("ld.acquire.gpu.global.b32 %r0, [%x];", "is not known"),
    "space": ("ld.local.b32 %r0, [%x];", "ld.local.b32 is not known"),
    "mode": ("shfl.down.b32 %r0, %t, 1, 31;", "shfl.down.b32 is not known"),
    "matrix": ("ldmatrix.sync.aligned.m16n16.x1.shared.b16 {%r0}, [%r1];", "is not known"),
    "operands": ("add.s32 %r0, %t;", "operands are not known"),
    "more operands": ("not.b32 %r0, %t, %t;", "operands are not known"),
    "parts": ("ld.global.v2.b32 {%r0, %r1, %r2}, [%x];", "operands are not known"),
    "parts of parts": ("mov.b32 {%h0, %h1, %h2}, %t;", "operands are not known"),
    "two results": ("setp.eq.s32 %p0|%p1, %t, 1;", "operands are not known"),
    "one result of two": ("setp.eq.f16x2 %p0, %t, %t;", "operands are not known"),
    "width": ("add.s32 %d0, %t, 1;", "another width"),
    "width of a source": ("add.s64 %d0, %t, 1;", "another width"),
    "wider source": ("add.s32 %r0, %x, 1;", "another width"),
    "predicate as a number": ("add.s32 %r0, %p0, 1;", "another width"),
    "constant of another width": ("add.f64 %d0, %x, 0f3F800000;", "Immediate"),
    "register": ("add.s32 %r0, %nobody, 1;", "%nobody"),
    "special register": ("mov.u32 %r0, %clock;", "%clock"),
    "result": ("add.s32 5, %t, 1;", "as a result"),
    "parameter": ("ld.param.b32 %r0, [nobody];", "operands are not known"),
    "address": ("ld.global.b32 %r0, [nobody];", "as an address"),
    "no address": ("ld.global.b32 %r0, %x;", "as an address"),
    "barrier of a part": ("bar.sync 1, 64;", "operands are not known"),
    "label": ("bra NOWHERE;", "the jump 'bra NOWHERE'"),
    "directive": (".local .b8 depot[8];", "the statement '.local"),
    "operand": ("add.s32 %r0, %t, 1.5;", "the operand '1.5'"),
    "guard": ("@%nobody add.s32 %r0, %t, 1;", "the guard"),
    "negated result": ("mov.pred !%p0, -1;", "negated"),
    "negated source": ("mov.pred %p0, !%p1;", "negated"),
}


@pytest.mark.parametrize(("body", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_is_not_known_is_named(body, message):
    with pytest.raises(Unsupported, match=message) as error:
        run(body, out())
    assert body.strip(";") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one kernel is expected, and there are 0"),
        (".entry a() .reqntid 32 { ret; } .entry b() .reqntid 32 { ret; }", "there are 2"),
        (".entry a() .reqntid 32 { ret;", "without an end"),
        (".entry a() .reqntid 32 { TOP: bra TOP; bra TOP; }", "code that nothing leads to"),
        (".entry a() .minnctapersm 2 { ret; }", "the threads a block of a: '.minnctapersm 2'"),
        (".entry a() .reqntid 8, 4, 1 { ret; }", "the threads a block of a"),
        (".entry a() .reqntid 33 { ret; }", "33 threads a block are no whole warps"),
        (".entry a(.param .align 4 .b8 x[8]) .reqntid 32 { ret; }", "the parameter"),
    ],
)
def test_a_text_that_is_no_kernel_of_tritons(text, message):
    with pytest.raises(Unsupported, match=message):
        interpreter.run(text, (1, 1, 1), [])


def test_an_argument_of_another_type():
    result = out(1)
    body = "ld.param.b32 %r0, [a1]; st.global.b32 [%x], %r0;"
    run(body, result, 2, types=["u64", "f32"])
    assert result.view(torch.float32).item() == 2
    with pytest.raises(Unsupported, match="for a parameter of type b16"):
        run(body, result, 1.5, types=["u64", "b16"])


def test_too_many_arguments():
    text = ".entry a(.param .u32 x) .reqntid 32 { ret; }"
    with pytest.raises(ValueError, match="zip"):
        interpreter.run(text, (1, 1, 1), [1, 2])


def test_text_as_triton_writes_it():
    text = """
    //
    .version 8.7
    .target sm_90a
    .address_size 64
    .extern .shared .align 16 .b8 global_smem[];
    .global .align 1 .b8 _$_str[3] = {95, 95, 0};
    .visible .entry kernel(
        .param .u64 .ptr .global .align 1 kernel_param_0,
        .param .f32 kernel_param_1,
        .param .u64 .ptr .global .align 1 kernel_param_2
    )
    .reqntid 32, 1, 1
    {
        .reg .b32 	%r<3>;
        .reg .b64 	%rd<2>;
        .loc	1 5 0                           // zoo.py:5:0
    $L__func_begin0:
    // %bb.0:
        ld.param.b64 	%rd1, [kernel_param_0];  /* a ; b */
        ld.param.b32 	%r1, [kernel_param_1];
    $L__tmp0:
        .pragma "nounroll";
        // begin inline asm
        { .reg .b32 a; mov.b32 a, %r1; mov.b32 %r2, a; }
        // end inline asm
        bra.uni $L__BB0_1;
    $L__BB0_1:
        st.global.b32 [ %rd1 + 0 ], { %r2 };
        ret;
    $L__func_end0:
    }
        .file	1 "zoo.py"
        .section	.debug_abbrev
        {
    .b8 1                                   // Abbreviation Code
        }
    """
    result = torch.zeros(1)
    interpreter.run(text, (1, 1, 1), [result, 0.25])
    assert result.item() == 0.25


# What a launch took


def test_the_share_of_wide_accesses():
    statistics = run(
        """mad.wide.u32 %d0, %t, 16, %x; ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d0]; ld.global.b32 %r4, [%x];
        mul.lo.s32 %r5, %r4, 3; mul.lo.s32 %r5, %r5, 3; st.shared.b32 [shared], 0;""",
        torch.zeros(128, dtype=torch.int32),
        shared_memory=8,
    )
    assert statistics.share("ld", "global", 16) == 0.8
    assert statistics.share("ld", "global", 4) == 1
    assert statistics.share("st", "shared", 16) == 0
    assert math.isnan(statistics.share("st", "global", 16))
    assert statistics.instructions["ld.global.b32"] == 32
    assert statistics.instructions["mul.lo.s32"] == 64
    assert sum(statistics.instructions.values()) == 32 * 9
