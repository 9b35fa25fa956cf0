"""The launch table: what is launched for rows of one size on each architecture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is installed on Linux x86_64 alone")

from fastdistill import backend
from fastdistill.kernels import launch
from fastdistill.kernels.launch import (
    ARCHITECTURES,
    MAX_COLUMNS,
    MAX_SPLITS,
    MAX_TILES,
    TENSOR_CORES,
    attention_plan,
    row_plan,
    tile_plan,
    vector_length,
)

ROW = 2 * 128256
"""Bytes of a row of Llama 3's vocabulary in a half precision."""


@pytest.fixture(params=[60, 61, 70, 75, 80, 86, 89, 90, 100, 120])
def arch(request, monkeypatch) -> int:
    """The architecture of the GPU that Triton has."""
    target = SimpleNamespace(arch=request.param)
    monkeypatch.setattr(launch.knobs.runtime, "interpret", False)
    monkeypatch.setattr(launch.driver, "_active", SimpleNamespace(get_current_target=lambda: target))
    return request.param


def test_many_rows_have_a_program_each(arch):
    assert row_plan(8192, ROW) == (8, 1)
    assert row_plan(8192, ROW).lanes == 256


@pytest.mark.parametrize("rows", [1, 3, 16, 50, 100])
def test_few_rows_are_split_until_every_sm_has_work_or_parts_are_small(arch, rows):
    plan = row_plan(rows, 100 * ROW)
    assert plan.splits == MAX_SPLITS or rows * plan.splits >= ARCHITECTURES.get(arch, ARCHITECTURES[60]).sms
    assert plan.splits == 1 or rows * plan.splits // 2 < ARCHITECTURES.get(arch, ARCHITECTURES[60]).sms
    assert row_plan(rows, 4096).splits == 1


def test_a_part_is_at_least_four_tiles_of_4_kb(arch):
    splits = [row_plan(1, row_bytes).splits for row_bytes in (32767, 32768, 65536, 131072, ROW)]
    assert splits == [1, 2, 4, 8, 8]


def test_a_row_that_is_read_twice_fills_an_sm_where_the_l2_cache_is_large(arch):
    assert row_plan(8192, ROW, reads_twice=True) == (32 if arch in (80, 89, 90, 100, 120) else 8, 1)
    assert row_plan(1, ROW, reads_twice=True).splits == 1


def test_an_architecture_that_is_not_in_the_table_is_as_the_one_before_it(monkeypatch):
    for arch, known in ((72, 70), (87, 86), (103, 100), (121, 120)):
        monkeypatch.setattr(
            launch.driver,
            "_active",
            SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=arch)),  # noqa: B023
        )
        assert launch._current_architecture() is ARCHITECTURES[known]


def test_a_vector_is_16_bytes_of_the_widest_type():
    assert [vector_length(*sizes) for sizes in ((2, 2), (2, 4), (4, 4), (8, 2))] == [8, 4, 4, 2]


@pytest.mark.parametrize("width", [1, 8, 127, 576, 768, 1024, 4096, 5120, 8191, 8192, 16384])
@pytest.mark.parametrize(("layers", "rows"), [(1, 1), (6, 1024), (32, 8192), (3, 0)])
def test_tiles_cover_the_rows_and_hold_them_whole_up_to_8192_columns(arch, layers, rows, width):
    plan = tile_plan(layers, rows, width)
    held = 16 if width % 8 else 32
    assert plan.rows * plan.columns == held * 32 * plan.warps
    assert plan.columns >= min(width, MAX_COLUMNS)
    assert plan.columns < 2 * width
    assert plan.warps in (1, 2, 4, 8, 16)
    assert (plan.programs - 1) * plan.tiles * plan.rows < rows <= plan.programs * plan.tiles * plan.rows or rows == 0


def test_programs_have_several_tiles_only_where_every_sm_has_more_than_enough(arch):
    assert tile_plan(6, 1024, 768).tiles == 1
    assert tile_plan(32, 8192, 4096).tiles == MAX_TILES


def test_attention_is_multiplied_in_tensor_cores_in_half_precision_where_triton_uses_them(arch):
    half, single = torch.float16, torch.float32
    assert attention_plan(half, torch.bfloat16, single, 64).as_they_are == (arch >= 80)
    assert not attention_plan(half, single, single, 64).as_they_are
    assert not attention_plan(single, single, single, 128).as_they_are
    assert TENSOR_CORES == backend.TENSOR_CORES


def test_attention_of_vectors_that_fit_no_tile_is_refused(arch):
    half, single, double = torch.float16, torch.float32, torch.float64
    for student, teacher, compute, limit in (
        (half, half, single, 256 if arch >= 80 else 128),
        (half, single, single, 128),
        (double, double, double, 64),
    ):
        attention_plan(student, teacher, compute, limit)
        with pytest.raises(RuntimeError, match=f"at most {limit} channels of these types here, got {2 * limit}"):
            attention_plan(student, teacher, compute, 2 * limit)
