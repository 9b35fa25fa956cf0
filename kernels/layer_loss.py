"""The distance between mapped hidden states, up to `MAX_LAYERS` layers in a launch.

For each token that counts, with s and t its vectors of D channels, n = layer_norm(.) and e = n_s - n_t in "layer_norm",
the error and its gradient in s are

    none          mean e^2, e = s - t                   2 e / D
    teacher_rms   mean e^2 / (mean t^2 + eps)           2 e / (D (mean t^2 + eps))
    layer_norm    mean e^2                              2 r_s (e - n_s mean(e n_s)) / D,  r_s = 1 / sqrt(var s + eps)
    cosine        1 - cos, |.| + eps for norms          (s cos / |s| - t / (|t| + eps)) / (|s| + eps)

A layer's loss is the sum of w_i error_i over `num_tokens`, and the loss their sum weighted by `factors`.

A program has ROWS tokens of a layer at a time, TILES times, and holds their vectors in registers: one read for the
statistics and one for the gradient, up to `MAX_COLUMNS` channels. Wider vectors pass by in tiles of so many, and twice
for the statistics of layer_norm. Between forward and backward a token keeps as many numbers as `SAVED` says, and the
gradient needs no sum.

Bytes a pair of 2-byte elements: 4 for the statistics and 6 for the gradient. Tokens of weight 0 are not read. Programs
add up what is theirs in one order and `_layer_loss_mean_kernel` adds up the programs: results repeat bit for bit.

The compiled code has been run by an interpreter of PTX on a CPU, never yet on a GPU.
"""

# Arguments stand in rows: one a line, they would be most of the file.
# fmt: off
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .launch import MAX_COLUMNS, TilePlan, on_its_device, tile_plan

EPS = tl.constexpr(1e-5)

MAX_LAYERS = 32
"""Three addresses a layer are 768 bytes of a kernel's parameters, which may be 4 KB; more layers are more launches."""

SAVED = {"none": 0, "teacher_rms": 1, "layer_norm": 5, "cosine": 2}
"""The forms, and the numbers that each keeps of a token for its gradient."""

# Rows -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _of_layer(tensors, layer):
    """The pointer of one layer among those of all, which no table in memory holds."""
    chosen = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        chosen = tl.where(layer == i, tensors[i], chosen)
    return chosen


@triton.jit
def _row_offsets(rows, positions, stride_b, stride_s):
    """Element offsets [ROWS, 1] of rows of a `[B, positions, D]` tensor."""
    rows = rows.to(tl.int64)
    return (rows // positions * stride_b + rows % positions * stride_s)[:, None]


@triton.jit
def _inside(columns, width, WHOLE: tl.constexpr):
    """Which columns there are; all of them where the width is a multiple of BLOCK_D."""
    if WHOLE:
        return columns >= 0
    else:
        return columns < width


@triton.jit
def _load_pairs(s_rows, t_rows, columns, counts, inside, COMPUTE: tl.constexpr):
    """Tiles [ROWS, BLOCK_D] of student and teacher, 0 beyond the width and in rows that do not count."""
    mask = counts[:, None] & inside
    s = tl.load(s_rows + columns, mask=mask, other=0.0).to(COMPUTE)
    t = tl.load(t_rows + columns, mask=mask, other=0.0).to(COMPUTE)
    return s, t


@triton.jit
def _less(x, mean, inside):
    return tl.where(inside, x - mean[:, None], 0.0)


@triton.jit
def _over_deviation(squares, width):
    return 1 / tl.sqrt(squares / width + EPS)


@triton.jit
def _moments(
    s_rows, t_rows, columns, counts, width, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Mean and 1 / deviation of each row of both models, of several tiles: four [ROWS].

    Variances are of channels less the mean of the first tile, which is within sqrt(D / BLOCK_D) deviations of the
    row's: no outlier drowns the rest.
    """
    none = tl.zeros([ROWS], COMPUTE)
    shift_s, shift_t, sum_s, sum_t, squares_s, squares_t = none, none, none, none, none, none
    for start in range(0, width, BLOCK_D):
        inside = _inside(start + columns, width, WHOLE)
        s, t = _load_pairs(s_rows, t_rows, start + columns, counts, inside, COMPUTE)
        if start == 0:
            shift_s, shift_t = tl.sum(s, 1) / BLOCK_D, tl.sum(t, 1) / BLOCK_D
        s, t = _less(s, shift_s, inside), _less(t, shift_t, inside)
        sum_s, sum_t = sum_s + tl.sum(s, 1), sum_t + tl.sum(t, 1)
        squares_s, squares_t = squares_s + tl.sum(s * s, 1), squares_t + tl.sum(t * t, 1)
    r_s = _over_deviation(tl.maximum(squares_s - sum_s * sum_s / width, 0.0), width)
    r_t = _over_deviation(tl.maximum(squares_t - sum_t * sum_t / width, 0.0), width)
    return shift_s + sum_s / width, r_s, shift_t + sum_t / width, r_t


@triton.jit
def _tile_sums(s, t, moments, FORM: tl.constexpr):
    """What one tile adds to a row's sums, three [ROWS]; those that the form has no use for are 0.

    In layer_norm the tiles are less their rows' means.
    """
    _, r_s, _, r_t = moments
    none = tl.zeros_like(r_s)
    if FORM == "layer_norm":
        e = s * r_s[:, None] - t * r_t[:, None]
        return tl.sum(e * e, 1), tl.sum(e * s, 1) * r_s, none
    elif FORM == "cosine":
        return tl.sum(s * s, 1), tl.sum(t * t, 1), tl.sum(s * t, 1)
    elif FORM == "teacher_rms":
        return tl.sum((s - t) * (s - t), 1), tl.sum(t * t, 1), none
    else:
        return tl.sum((s - t) * (s - t), 1), none, none


@triton.jit
def _save(saved_ptr, saved, values, rows, is_row):
    for i in tl.static_range(len(values)):
        tl.store(saved_ptr + i * saved + rows, values[i], mask=is_row)


@triton.jit
def _row_errors(sums, moments, width, saved_ptr, saved, rows, is_row, FORM: tl.constexpr):
    """Errors [ROWS] from a row's sums; what their gradients need is saved."""
    a, b, c = sums
    if FORM == "layer_norm":
        _save(saved_ptr, saved, moments + (b / width,), rows, is_row)
        return a / width
    elif FORM == "cosine":
        norm_s, norm_t = tl.sqrt(a), tl.sqrt(b) + EPS
        cos = c / ((norm_s + EPS) * norm_t)
        of_s = tl.where(norm_s > 0, cos / tl.where(norm_s > 0, norm_s, 1.0), 0.0) / (norm_s + EPS)
        _save(saved_ptr, saved, (of_s, 1 / ((norm_s + EPS) * norm_t)), rows, is_row)
        return 1 - cos
    elif FORM == "teacher_rms":
        scale = 1 / (b / width + EPS)
        _save(saved_ptr, saved, (scale,), rows, is_row)
        return a / width * scale
    else:
        return a / width


@triton.jit
def _numbers(saved_rows, counts):
    return tl.load(saved_rows, mask=counts, other=0.0)[:, None]


@triton.jit
def _gradients(s, t, c, saved_rows, saved, counts, width, FORM: tl.constexpr):
    """c times the gradient [ROWS, BLOCK_D] of each row's error, from what `_row_errors` saved."""
    if FORM == "layer_norm":
        r_s = _numbers(saved_rows + saved, counts)
        n_s = (s - _numbers(saved_rows, counts)) * r_s
        n_t = (t - _numbers(saved_rows + 2 * saved, counts)) * _numbers(saved_rows + 3 * saved, counts)
        return 2 * c / width * r_s * ((n_s - n_t) - n_s * _numbers(saved_rows + 4 * saved, counts))
    elif FORM == "cosine":
        return c * (s * _numbers(saved_rows, counts) - t * _numbers(saved_rows + saved, counts))
    elif FORM == "teacher_rms":
        return 2 * c / width * _numbers(saved_rows, counts) * (s - t)
    else:
        return 2 * c / width * (s - t)


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "positions", "saved", "TILES"])
def _layer_loss_stats_kernel(
    students, teachers, weights_ptr, partials_ptr, saved_ptr, rows, positions, width, saved, stride_sb, stride_ss,
    stride_tb, stride_ts, TILES, FORM: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):
    """The sum of weighted errors over a program's tokens, and what their gradients need."""
    if WIDE:
        tl.assume(width > BLOCK_D)
    layer = tl.program_id(1)
    student_ptr, teacher_ptr = _of_layer(students, layer), _of_layer(teachers, layer)
    saved_ptr += layer.to(tl.int64) * rows
    columns = tl.arange(0, BLOCK_D)[None, :]
    first = tl.program_id(0) * TILES * ROWS
    total = tl.zeros([ROWS], COMPUTE)
    for i in range(TILES):
        row = first + i * ROWS + tl.arange(0, ROWS)
        weight = tl.load(weights_ptr + row, mask=row < rows, other=0.0)
        counts = weight != 0
        s_rows = student_ptr + _row_offsets(row, positions, stride_sb, stride_ss)
        t_rows = teacher_ptr + _row_offsets(row, positions, stride_tb, stride_ts)
        a, b, c = tl.zeros([ROWS], COMPUTE), tl.zeros([ROWS], COMPUTE), tl.zeros([ROWS], COMPUTE)
        moments = (a, a, a, a)
        if WIDE:
            if FORM == "layer_norm":
                moments = _moments(s_rows, t_rows, columns, counts, width, WHOLE, ROWS, BLOCK_D, COMPUTE)
            for start in range(0, width, BLOCK_D):
                inside = _inside(start + columns, width, WHOLE)
                s, t = _load_pairs(s_rows, t_rows, start + columns, counts, inside, COMPUTE)
                if FORM == "layer_norm":
                    s, t = _less(s, moments[0], inside), _less(t, moments[2], inside)
                more = _tile_sums(s, t, moments, FORM)
                a, b, c = a + more[0], b + more[1], c + more[2]
        else:
            inside = _inside(columns, width, WHOLE)
            s, t = _load_pairs(s_rows, t_rows, columns, counts, inside, COMPUTE)
            if FORM == "layer_norm":
                mean_s, mean_t = tl.sum(s, 1) / width, tl.sum(t, 1) / width
                s, t = _less(s, mean_s, inside), _less(t, mean_t, inside)
                squares_s, squares_t = tl.sum(s * s, 1), tl.sum(t * t, 1)
                moments = (mean_s, _over_deviation(squares_s, width), mean_t, _over_deviation(squares_t, width))
            a, b, c = _tile_sums(s, t, moments, FORM)
        total += weight * _row_errors((a, b, c), moments, width, saved_ptr, saved, row, row < rows, FORM)
    tl.store(partials_ptr + layer * tl.num_programs(0) + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["layers", "programs"])
def _layer_loss_mean_kernel(
    partials_ptr, factors_ptr, num_tokens_ptr, loss_ptr, per_layer_ptr, layers, programs, LAYERS: tl.constexpr,
    BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Each layer's loss and the loss, from the sums of the programs."""
    layer = tl.arange(0, LAYERS)
    total = tl.zeros([LAYERS], COMPUTE)
    for start in range(0, programs, BLOCK):
        part = start + tl.arange(0, BLOCK)[None, :]
        mask = (layer < layers)[:, None] & (part < programs)
        total += tl.sum(tl.load(partials_ptr + layer[:, None] * programs + part, mask=mask, other=0.0), 1)
    num_tokens = tl.load(num_tokens_ptr)
    counted = num_tokens > 0
    per_layer = tl.where(counted, total / tl.where(counted, num_tokens, 1.0), 0.0)
    factor = tl.load(factors_ptr + layer, mask=layer < layers, other=0.0)
    tl.store(per_layer_ptr + layer, per_layer, mask=layer < layers)
    tl.store(loss_ptr, tl.sum(tl.where(factor > 0, factor * per_layer, 0.0), 0))


@triton.jit(do_not_specialize=["rows", "positions", "saved", "TILES"])
def _layer_loss_grad_kernel(
    dloss_ptr, students, teachers, grads, weights_ptr, num_tokens_ptr, factors_ptr, saved_ptr, rows, positions, width,
    saved, stride_sb, stride_ss, stride_tb, stride_ts, TILES, FORM: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
):
    """The gradient in a program's tokens; 0 in those that do not count, which are not read."""
    layer = tl.program_id(1)
    student_ptr, teacher_ptr = _of_layer(students, layer), _of_layer(teachers, layer)
    grad_ptr = _of_layer(grads, layer)
    saved_ptr += layer.to(tl.int64) * rows
    # In the compute dtype before the cast: 1 / num_tokens in float16 would flush most of the gradient to zero.
    factor, num_tokens = tl.load(factors_ptr + layer), tl.load(num_tokens_ptr)
    is_on = (factor > 0) & (num_tokens > 0)
    scale = tl.where(is_on, tl.load(dloss_ptr) * factor / tl.where(is_on, num_tokens, 1.0), 0.0)
    columns = tl.arange(0, BLOCK_D)[None, :]
    first = tl.program_id(0) * TILES * ROWS
    for i in range(TILES):
        row = first + i * ROWS + tl.arange(0, ROWS)
        is_row = row < rows
        c = tl.load(weights_ptr + row, mask=is_row, other=0.0) * scale
        counts = c != 0
        c = c[:, None]
        s_rows = student_ptr + _row_offsets(row, positions, stride_sb, stride_ss)
        t_rows = teacher_ptr + _row_offsets(row, positions, stride_tb, stride_ts)
        g_rows = grad_ptr + (row.to(tl.int64) * width)[:, None]
        # As many tiles as there are: with one, this is no loop.
        for start in range(0, width if WIDE else BLOCK_D, BLOCK_D):
            inside = _inside(start + columns, width, WHOLE)
            s, t = _load_pairs(s_rows, t_rows, start + columns, counts, inside, COMPUTE)
            g = _gradients(s, t, c, saved_ptr + row, saved, counts, width, FORM)
            mask = is_row[:, None] & inside
            tl.store(g_rows + start + columns, g.to(grad_ptr.dtype.element_ty), mask=mask)


# Launchers ------------------------------------------------------------------------------------------------------------


def _plan_and_form(
    students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor, form: str
) -> tuple[TilePlan, tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """The launch, its sizes, the strides of both models' rows, and its constants."""
    student, teacher = students[0], teachers[0]
    width = student.shape[-1]
    plan = tile_plan(len(students), weights.numel(), width)
    strides = [*(_row_strides(student)), *_row_strides(teacher)]
    constants = {
        "FORM": form, "WIDE": width > plan.columns, "WHOLE": width % plan.columns == 0, "ROWS": plan.rows,
        "BLOCK_D": plan.columns,
        "COMPUTE": tl.float64 if weights.dtype == torch.float64 else tl.float32,
        "num_warps": plan.warps, "enable_fp_fusion": True,
    }
    return plan, (weights.numel(), weights.shape[-1], width, len(students) * weights.numel()), tuple(strides), constants


def _row_strides(states: Tensor) -> tuple[int, int]:
    """Of sequences and positions; `[N, D]` is a batch of one."""
    if states.stride(-1) != 1 and states.shape[-1] > 1:
        raise ValueError(f"states must have unit stride over D, got strides {states.stride()}")
    return states.stride(0) if states.ndim == 3 else 0, states.stride(-2)


@on_its_device
def layer_loss_stats(
    weights: Tensor, students: Sequence[Tensor], teachers: Sequence[Tensor], num_tokens: Tensor, factors: Tensor, *,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (0-d), each layer's own `[L]`, and what the gradient needs, `[SAVED[form], L, N]`.

    Args:
        weights: `[B, S]` or `[N]`, contiguous, in the compute dtype; 0 where the teacher has no such position.
        students, teachers: at most `MAX_LAYERS` of `[B, S, D]` and `[B, St, D]`, or `[N, D]`: one dtype, one width and
            one layout each, with unit stride over D.
        num_tokens: the divisor, 0-d.
        factors: each layer's share of the loss, `[L]`; 0 leaves a layer out.
        form: a key of `SAVED`.
    """
    layers = len(students)
    loss, per_layer = weights.new_empty(()), weights.new_empty(layers)
    saved = weights.new_empty(SAVED[form], layers, weights.numel())
    plan, sizes, strides, constants = _plan_and_form(students, teachers, weights, form)
    partials = weights.new_empty(layers, plan.programs)
    if plan.programs > 0:
        _layer_loss_stats_kernel[(plan.programs, layers)](
            tuple(students), tuple(teachers), weights, partials, saved, *sizes, *strides, plan.tiles, **constants,
        )
    _layer_loss_mean_kernel[(1,)](
        partials, factors, num_tokens, loss, per_layer, layers, plan.programs, LAYERS=triton.next_power_of_2(layers),
        BLOCK=64, COMPUTE=constants["COMPUTE"], num_warps=4,
    )
    return loss, per_layer, saved


@on_its_device
def layer_loss_grad(
    dloss: Tensor, students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor, num_tokens: Tensor,
    factors: Tensor, saved: Tensor, *, form: str,
) -> list[Tensor]:
    """The gradients of the loss times `dloss`, 0-d in the compute dtype: contiguous, each in its student's dtype."""
    grads = [torch.empty_like(student, memory_format=torch.contiguous_format) for student in students]
    plan, sizes, strides, constants = _plan_and_form(students, teachers, weights, form)
    if plan.programs > 0:
        _layer_loss_grad_kernel[(plan.programs, len(students))](
            dloss, tuple(students), tuple(teachers), tuple(grads), weights, num_tokens, factors, saved, *sizes,
            *strides, plan.tiles, **constants,
        )
    return grads


# Compile cases --------------------------------------------------------------------------------------------------------


def _launch_on_meta(dtype: torch.dtype, form: str, *, layers: int, rows: int, width: int) -> None:
    students = [torch.empty(rows, width, dtype=dtype, device="meta") for _ in range(layers)]
    weights, number, factors = (torch.empty(shape, device="meta") for shape in ((rows,), (), (layers,)))
    *_, saved = layer_loss_stats(weights, students, students, number, factors, form=form)
    layer_loss_grad(number, students, students, weights, number, factors, saved, form=form)


def _case(form: str, *, layers: int = 6, rows: int = 4096, width: int = 4096) -> CompileCase:
    budget = {} if width % 8 or width > MAX_COLUMNS else _BUDGETS[form]
    launch = partial(_launch_on_meta, form=form, layers=layers, rows=rows, width=width)
    return CompileCase(f"{form}, {layers} x {width}", launch, budget=budget)


def _budget(stats: float, grad: float) -> dict[str, float | dict[str, float]]:
    """bfloat16 before sm_80, where the cast is emulated, costs the gradient 5 more."""
    by_dtype = {"float32": grad, "float16": grad, "bfloat16": grad + 5}
    return {"_layer_loss_stats_kernel": stats, "_layer_loss_grad_kernel": by_dtype}


_BUDGETS = {
    "none": _budget(12.5, 13.5),
    "teacher_rms": _budget(15, 13.5),
    "layer_norm": _budget(26, 16),
    "cosine": _budget(16.5, 13.5),
}

COMPILE_CASES = [
    *(_case(form) for form in SAVED),
    _case("layer_norm", layers=32, rows=8192),
    *(_case("layer_norm", width=width) for width in (576, 8192, 16384)),
    _case("cosine", width=127),
]
