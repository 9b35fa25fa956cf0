"""Small Triton kernels, run as compiled for the architecture in FASTDISTILL_PTX (`conftest.py`), against PyTorch."""

# ruff: noqa: N803 -- compile-time constants of a kernel are capitals
from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.ptx.driver import recorded
from tests.ptx.machine import Fault

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
WARPS = pytest.mark.parametrize("num_warps", [1, 8])


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


@triton.jit
def copy(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size, other=0), mask=at < size)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64]
)
def test_a_masked_copy(dtype):
    x, y = normal(1000, dtype=dtype), torch.zeros(1000, dtype=dtype)
    launch(copy, (4,), x, y, 999, BLOCK=256)
    assert torch.equal(y, torch.cat([x[:999], torch.zeros(1, dtype=dtype)]))


def test_wide_accesses_are_counted():
    x, y = normal(1024), torch.zeros(1024)
    with recorded() as launches:
        launch(copy, (1,), x, y, 1024, BLOCK=1024)
        launch(copy, (1,), x[1:], y, 1023, BLOCK=1024)
    assert [launch.name for launch in launches] == ["copy", "copy"]
    assert [launch.statistics.share("ld", "global", 16) for launch in launches] == [1, 0]
    with recorded() as launches:
        pass
    assert not launches


def test_an_access_out_of_bounds_is_a_fault():
    with pytest.raises(Fault, match=r"out-of-bounds 4-byte global ld at .*, thread 232 of block \(3, 0, 0\) of copy"):
        launch(copy, (4,), normal(1000), torch.zeros(2000), 1001, BLOCK=256, num_warps=8)


@triton.jit
def softmax(x, y, size, stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + at, mask=at < size, other=-float("inf")).to(tl.float32)
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * stride + at, (powers / tl.sum(powers, 0)).to(y.dtype.element_ty), mask=at < size)


@FLOATS
@WARPS
def test_a_softmax_across_warps(dtype, num_warps):
    x, y = normal(3, 1000, dtype=dtype), torch.zeros(3, 1000, dtype=dtype)
    launch(softmax, (3,), x, y, 1000, 1000, BLOCK=1024, num_warps=num_warps)
    expected = torch.softmax(x.double(), -1)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@triton.jit
def convert(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@FLOATS
def test_rounding_to_each_type(dtype):
    one_and_more = 1 + torch.arange(-512, 512) / 2**13
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.0, 65520.0, 1e-8, 6e-8, 3.39e38, 1e-40])
    for x in (one_and_more, normal(1024), torch.cat([special, -special]).repeat(52)[:1024]):
        y = torch.zeros(1024, dtype=dtype)
        launch(convert, (1,), x, y, BLOCK=1024)
        assert torch.equal(y.view(torch.uint8), x.to(dtype).view(torch.uint8))
        back = torch.zeros(1024)
        launch(convert, (1,), y, back, BLOCK=1024)
        assert torch.equal(back, y.float())
    launch(convert, (1,), torch.full((1024,), torch.nan), y, BLOCK=1024)
    assert y.isnan().all()


@triton.jit
def tiles(x, first, second, size, THREADS: tl.constexpr, VEC: tl.constexpr):
    """The base-2 logarithm of the sum of powers of 2, a lane at a time; and what another thread has stored."""
    at = tl.arange(0, THREADS)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    largest, total = tl.full([THREADS], -1e30, tl.float32), tl.zeros([THREADS], tl.float32)
    for start in tl.range(0, size, THREADS * VEC, loop_unroll_factor=2):
        values = tl.load(x + start + at).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(values - larger[:, None]), 1)
        largest = larger
    over_all = tl.max(largest, 0)
    tl.store(first, over_all + tl.log2(tl.sum(total * tl.exp2(largest - over_all), 0)))
    tl.debug_barrier()
    tl.store(second + tl.arange(0, VEC), tl.sum(tl.load(x + at).to(tl.float32), 0) + tl.load(first))


@FLOATS
@WARPS
def test_reductions_over_both_axes_of_a_tile(dtype, num_warps):
    threads = 32 * num_warps
    x, first, second = normal(5, threads, 8, dtype=dtype), torch.zeros(1), torch.zeros(8)
    with recorded() as launches:
        launch(tiles, (1,), x, first, second, x.numel(), THREADS=threads, VEC=8, num_warps=num_warps)
    expected = x.double().exp2().sum().log2()
    torch.testing.assert_close(first.double()[0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second.double(), x[0].double().sum(0) + expected, rtol=1e-5, atol=1e-4)
    assert launches[0].statistics.share("ld", "global", 16) > 0.9


@triton.jit
def gather(x, index, y, stride, size, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(index + row)
    if rows >= 0:
        columns = (at % 7).to(tl.int64) * (size // 7) + at // 7
        tl.store(y + row * size + at, tl.load(x + rows * stride + columns, mask=at < size, other=0.0), mask=at < size)
    else:
        tl.store(y + row * size + at, 0.0, mask=at < size)


def test_offsets_of_64_bits_and_branches_by_block():
    x, index = normal(4, 1000), torch.tensor([3, -100, 0, 2, 2])
    y = torch.full((5, 700), -1.0)
    launch(gather, (5, 6), x, index, y, x.stride(0), 700, BLOCK=128)
    at = torch.arange(700)
    expected = x[index.clamp(min=0)][:, at % 7 * 100 + at // 7] * (index >= 0)[:, None]
    assert torch.equal(y, expected)


@triton.jit
def counted(trips, y, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    left, total = tl.load(trips + row), tl.zeros([BLOCK], tl.int64)
    while left > 0:
        total += at * left
        left -= 1
    tl.store(y + row * BLOCK + at, total)


def test_trips_that_depend_on_data():
    trips, y = torch.tensor([0, 3, 1, 7, -1, 20]), torch.zeros(6, 128, dtype=torch.int64)
    launch(counted, (6,), trips, y, BLOCK=128)
    assert torch.equal(y, (trips * (trips + 1) // 2)[:, None] * torch.arange(128))


@triton.jit
def powers(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, tl.exp2(values))
    tl.store(y + BLOCK + at, tl.log2(tl.abs(values)))
    tl.store(y + 2 * BLOCK + at, tl.sqrt(tl.abs(values)) / (values * values + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transcendental_functions(dtype):
    x, y = normal(256, dtype=dtype), torch.zeros(3, 256, dtype=dtype)
    launch(powers, (1,), x, y, BLOCK=256)
    wide = x.double()
    expected = torch.stack([wide.exp2(), wide.abs().log2(), wide.abs().sqrt() / (wide * wide + 1)])
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=4 * epsilon, atol=2 * epsilon)


@triton.jit
def largest(x, y, size, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * size + at, mask=at < size, other=-float("inf"))
    tl.store(y + row, tl.argmax(values, 0))


@FLOATS
@WARPS
def test_the_index_of_the_largest(dtype, num_warps):
    x, y = normal(5, 1000, dtype=dtype), torch.zeros(5, dtype=torch.int64)
    launch(largest, (5,), x, y, 1000, BLOCK=1024, num_warps=num_warps)
    assert torch.equal(y, (x == x.amax(-1, keepdim=True)).int().argmax(-1))


@triton.jit
def divide(x, y, z, by, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, values // by)
    tl.store(z + at, values % by)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("by", [7, -13])
def test_integer_division(dtype, by):
    x = torch.arange(-64, 64, dtype=dtype) * 123457
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    launch(divide, (1,), x, y, z, by, BLOCK=128)
    assert torch.equal(y, torch.div(x, by, rounding_mode="trunc"))
    assert torch.equal(z, torch.fmod(x, by))


@triton.jit
def transpose(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(y + columns[:, None] * ROWS + rows[None, :], tl.trans(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@WARPS
def test_values_that_change_threads(dtype, num_warps):
    x, y = normal(32, 64, dtype=dtype), torch.zeros(64, 32, dtype=dtype)
    launch(transpose, (1,), x, y, ROWS=32, COLUMNS=64, num_warps=num_warps)
    assert torch.equal(y, x.T)
