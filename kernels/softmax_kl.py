"""Softmax-KL over the vocabulary with the cross-entropy, in one read of student and teacher.

For each token, with z_s and z_t its logits, p = softmax(z / T) over the first `shared_vocab` ids, and the
cross-entropy over the student's whole vocabulary at T = 1:

    forward_kl   sum p_t (log p_t - log p_s)            gradient in z_s / T:  p_s - p_t
    reverse_kl   sum p_s (log p_s - log p_t)                                  p_s (log p_s - log p_t - reverse_kl)
    jsd          b KL(p_t || m) + (1 - b) KL(p_s || m)                        (1 - b) p_s (r - sum p_s r)
    ce           log sum exp(z_s) - z_s[target]                               p_s - onehot(target), T = 1

with m = b p_t + (1 - b) p_s and r = log(p_s / m). softmax_kl_tile.py says what is summed so that one read is enough,
online_softmax.py how a program walks along its row.

Bytes a pair of 2-byte logits: 4 for the statistics, 6 for the gradient (10 in two launches; 6 to 10 in one, where the
second read may come from the L2 cache); the Jensen-Shannon divergence reads 4 more. Between forward and backward
`SAVED` numbers a token are kept. Nothing is atomic and every sum has one order: results repeat bit for bit.

Each program has a row, or one of SPLITS parts of it. Rows of weight 0 are not read. The compiled code has been run by
an interpreter of PTX on a CPU, never yet on a GPU.
"""

# Arguments stand in rows: one a line, they would be most of the file.
# fmt: off
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .launch import VECTOR_BYTES, on_its_device, row_plan, vector_length
from .online_softmax import LOG2E
from .softmax_kl_row import (
    PARTIALS,
    SAVED,
    VALUES,
    finish,
    finish_uncounted,
    grad_row,
    jsd_sums,
    row_gradient,
    row_pointers,
    row_sums,
    store_zeros,
    whole_row,
)
from .softmax_kl_tile import merge_pairs, merge_student

# Kernels --------------------------------------------------------------------------------------------------------------

_SIZES = ["rows", "positions", "vocab", "shared_vocab"]
_PLACES = [
    "student_start", "stride_sb", "stride_ss", "teacher_start", "stride_tb", "stride_ts", "grad_start", "stride_gb",
    "stride_gs",
]
"""Not specialised: `row_pointers` aligns vectors whatever divides these, and each value would compile anew."""


@triton.jit(do_not_specialize=_SIZES + _PLACES[:6])
def _softmax_kl_stats_kernel(
    student_ptr, teacher_ptr, targets_ptr, weights_ptr, scalars_ptr, values_ptr, saved_ptr, partials_ptr, rows,
    positions, vocab, shared_vocab, student_start, stride_sb, stride_ss, teacher_start, stride_tb, stride_ts,
    DIVERGENCE: tl.constexpr, HAS_TARGETS: tl.constexpr, METRICS: tl.constexpr, POWER: tl.constexpr, TAIL: tl.constexpr,
    ALIGNED: tl.constexpr, SPLITS: tl.constexpr, NT: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Values and saved numbers of a row, or the sums of one of its SPLITS parts."""
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    if tl.load(weights_ptr + row) != 0:
        s_row, t_row, lead = row_pointers(
            row, positions, student_ptr, student_start, stride_sb, stride_ss, teacher_ptr, teacher_start, stride_tb,
            stride_ts, DIVERGENCE != "none", ALIGNED, VEC,
        )
        if SPLITS == 1:
            whole_row(
                row, rows, weights_ptr, s_row, t_row, lead, targets_ptr, scalars_ptr, values_ptr, saved_ptr, vocab,
                shared_vocab, DIVERGENCE, HAS_TARGETS, METRICS, POWER, TAIL, NT, VEC, COMPUTE,
            )
        else:
            temperature = tl.load(scalars_ptr)
            sums = row_sums(
                s_row, t_row, lead, vocab, shared_vocab, split, LOG2E / temperature, temperature, DIVERGENCE,
                HAS_TARGETS, METRICS, POWER, TAIL, SPLITS, NT, VEC, COMPUTE,
            )
            for i in tl.static_range(PARTIALS):
                # The columns too, as numbers: float32 holds them exactly below 2^24.
                tl.store(partials_ptr + (i * rows + row) * SPLITS + split, sums[i])
    elif SPLITS == 1:
        finish_uncounted(row, rows, values_ptr, saved_ptr)


@triton.jit
def _load_parts(partials_ptr, index, row, rows, SPLITS: tl.constexpr):
    return tl.load(partials_ptr + (index * rows + row) * SPLITS + tl.arange(0, SPLITS))


@triton.jit
def _merge_parts(
    partials_ptr, row, rows, temperature, DIVERGENCE: tl.constexpr, HAS_TARGETS: tl.constexpr, METRICS: tl.constexpr,
    POWER: tl.constexpr, SPLITS: tl.constexpr,
):
    """The `PARTIALS` sums of a row from those of its parts."""
    m_s, Z_s = _load_parts(partials_ptr, 0, row, rows, SPLITS), _load_parts(partials_ptr, 1, row, rows, SPLITS)
    m_t, Z_t = _load_parts(partials_ptr, 2, row, rows, SPLITS), _load_parts(partials_ptr, 3, row, rows, SPLITS)
    a, b = _load_parts(partials_ptr, 4, row, rows, SPLITS), _load_parts(partials_ptr, 5, row, rows, SPLITS)
    U_s, U_t = _load_parts(partials_ptr, 6, row, rows, SPLITS), _load_parts(partials_ptr, 7, row, rows, SPLITS)
    h_s, h_t = _load_parts(partials_ptr, 8, row, rows, SPLITS), _load_parts(partials_ptr, 9, row, rows, SPLITS)
    sums = merge_pairs(
        m_s, Z_s, m_t, Z_t, a, b, U_s, U_t, h_s, h_t, temperature, DIVERGENCE, HAS_TARGETS or METRICS, METRICS, POWER,
    )
    column_s = _load_parts(partials_ptr, 10, row, rows, SPLITS)
    column_t = _load_parts(partials_ptr, 11, row, rows, SPLITS)
    column_s = tl.min(tl.where(m_s == sums[0], column_s, float("inf")), 0)
    column_t = tl.min(tl.where(m_t == sums[2], column_t, float("inf")), 0)
    m, U = _load_parts(partials_ptr, 12, row, rows, SPLITS), _load_parts(partials_ptr, 13, row, rows, SPLITS)
    return sums + (column_s, column_t) + merge_student(m, U, temperature)


@triton.jit(do_not_specialize=_SIZES + _PLACES[:6])
def _softmax_kl_jsd_kernel(
    student_ptr, teacher_ptr, weights_ptr, scalars_ptr, partials_ptr, jsd_ptr, rows, positions, shared_vocab,
    student_start, stride_sb, stride_ss, teacher_start, stride_tb, stride_ts, ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, NT: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
):
    """The two sums of the Jensen-Shannon divergence over one part of a row, [2, rows, SPLITS]."""
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    if tl.load(weights_ptr + row) != 0:
        s_row, t_row, lead = row_pointers(
            row, positions, student_ptr, student_start, stride_sb, stride_ss, teacher_ptr, teacher_start, stride_tb,
            stride_ts, True, ALIGNED, VEC,
        )
        temperature, beta = tl.load(scalars_ptr), tl.load(scalars_ptr + 3)
        m_s, Z_s = _load_parts(partials_ptr, 0, row, rows, SPLITS), _load_parts(partials_ptr, 1, row, rows, SPLITS)
        m_t, Z_t = _load_parts(partials_ptr, 2, row, rows, SPLITS), _load_parts(partials_ptr, 3, row, rows, SPLITS)
        m_s, Z_s = merge_student(m_s, Z_s, 1)
        m_t, Z_t = merge_student(m_t, Z_t, 1)
        student, teacher = jsd_sums(
            s_row, t_row, lead, lead + shared_vocab, split, m_s, Z_s, m_t, Z_t, LOG2E / temperature, beta, SPLITS, NT,
            VEC, COMPUTE,
        )
        tl.store(jsd_ptr + row * SPLITS + split, student)
        tl.store(jsd_ptr + (rows + row) * SPLITS + split, teacher)


@triton.jit(do_not_specialize=_SIZES[:2] + _PLACES[:3])
def _softmax_kl_combine_kernel(
    student_ptr, targets_ptr, weights_ptr, scalars_ptr, values_ptr, saved_ptr, partials_ptr, jsd_ptr, rows, positions,
    student_start, stride_sb, stride_ss, DIVERGENCE: tl.constexpr, HAS_TARGETS: tl.constexpr, METRICS: tl.constexpr,
    POWER: tl.constexpr, SPLITS: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Values and saved numbers of a row from the sums of its parts."""
    row = tl.program_id(0)
    if tl.load(weights_ptr + row) != 0:
        s_row, _, lead = row_pointers(
            row, positions, student_ptr, student_start, stride_sb, stride_ss, student_ptr, 0, 0, 0, False, True, VEC
        )
        sums = _merge_parts(
            partials_ptr, row, rows, tl.load(scalars_ptr), DIVERGENCE, HAS_TARGETS, METRICS, POWER, SPLITS
        )
        if DIVERGENCE == "jsd":
            student = tl.sum(_load_parts(jsd_ptr, 0, row, rows, SPLITS), 0)
            teacher = tl.sum(_load_parts(jsd_ptr, 1, row, rows, SPLITS), 0)
            sums = sums[:4] + (student, teacher) + sums[6:]
        finish(
            row, rows, weights_ptr, s_row, lead, targets_ptr, scalars_ptr, values_ptr, saved_ptr, sums, DIVERGENCE,
            HAS_TARGETS, METRICS, COMPUTE,
        )
    else:
        finish_uncounted(row, rows, values_ptr, saved_ptr)


@triton.jit(do_not_specialize=_SIZES + _PLACES)
def _softmax_kl_grad_kernel(
    dloss_ptr, student_ptr, teacher_ptr, targets_ptr, weights_ptr, scalars_ptr, saved_ptr, grad_ptr, rows, positions,
    vocab, shared_vocab, student_start, stride_sb, stride_ss, teacher_start, stride_tb, stride_ts, grad_start,
    stride_gb, stride_gs, DIVERGENCE: tl.constexpr, CE: tl.constexpr, POWER: tl.constexpr, TAIL: tl.constexpr,
    ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr, SPLITS: tl.constexpr, NT: tl.constexpr, VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The gradient in a row, or in one of its SPLITS parts, times the row's weight and incoming gradient."""
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    s_row, t_row, lead = row_pointers(
        row, positions, student_ptr, student_start, stride_sb, stride_ss, teacher_ptr, teacher_start, stride_tb,
        stride_ts, DIVERGENCE != "none", ALIGNED, VEC,
    )
    g_row = grad_row(row, positions, lead, grad_ptr, grad_start, stride_gb, stride_gs, GRAD_ALIGNED, VEC)
    # In the compute dtype before the cast: 1 / num_tokens in float16 would flush most of the gradient to zero.
    c = tl.load(weights_ptr + row) * tl.load(dloss_ptr + row)
    saved_ptr += row
    saved = (
        tl.load(saved_ptr), tl.load(saved_ptr + rows), tl.load(saved_ptr + 2 * rows), tl.load(saved_ptr + 3 * rows),
        tl.load(saved_ptr + 4 * rows), tl.load(saved_ptr + 5 * rows), tl.load(saved_ptr + 6 * rows),
    )
    row_gradient(
        s_row, t_row, g_row, lead, vocab, shared_vocab, split, c, targets_ptr + row, scalars_ptr, saved, DIVERGENCE, CE,
        POWER, TAIL, False, SPLITS, NT, VEC, COMPUTE,
    )


@triton.jit(do_not_specialize=_SIZES + _PLACES)
def _softmax_kl_one_launch_kernel(
    dloss_ptr, student_ptr, teacher_ptr, targets_ptr, weights_ptr, scalars_ptr, values_ptr, saved_ptr, grad_ptr, rows,
    positions, vocab, shared_vocab, student_start, stride_sb, stride_ss, teacher_start, stride_tb, stride_ts,
    grad_start, stride_gb, stride_gs, DIVERGENCE: tl.constexpr, HAS_TARGETS: tl.constexpr, METRICS: tl.constexpr,
    KL: tl.constexpr, CE: tl.constexpr, POWER: tl.constexpr, TAIL: tl.constexpr, ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr, NT: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Statistics and gradient of a row, its incoming gradient known beforehand."""
    row = tl.program_id(0)
    s_row, t_row, lead = row_pointers(
        row, positions, student_ptr, student_start, stride_sb, stride_ss, teacher_ptr, teacher_start, stride_tb,
        stride_ts, DIVERGENCE != "none", ALIGNED, VEC,
    )
    g_row = grad_row(row, positions, lead, grad_ptr, grad_start, stride_gb, stride_gs, GRAD_ALIGNED, VEC)
    if tl.load(weights_ptr + row) != 0:
        saved = whole_row(
            row, rows, weights_ptr, s_row, t_row, lead, targets_ptr, scalars_ptr, values_ptr, saved_ptr, vocab,
            shared_vocab,
            DIVERGENCE, HAS_TARGETS, METRICS, POWER, TAIL, NT, VEC, COMPUTE,
        )
        tl.debug_barrier()  # the row may be written in place: every thread has its target's logit by now
        # From the row's end: what was read last is likeliest still in the cache.
        row_gradient(
            s_row, t_row, g_row, lead, vocab, shared_vocab, 0, tl.load(weights_ptr + row) * tl.load(dloss_ptr + row),
            targets_ptr + row,
            scalars_ptr, saved, DIVERGENCE if KL else "none", CE, POWER, TAIL, True, 1, NT, VEC, COMPUTE,
        )
    else:
        finish_uncounted(row, rows, values_ptr, saved_ptr)
        store_zeros(g_row, lead, lead + vocab, 0, 1, NT, VEC, COMPUTE)


# Launchers ------------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The rows of a `[B, S, V]` or `[N, V]` tensor with unit stride over V."""

    base: Tensor
    """Its memory, from a 16-byte boundary on where there is one."""
    start: int
    """The element of `base` that is the tensor's first."""
    stride_b: int
    stride_s: int

    @staticmethod
    def of(tensor: Tensor) -> _Rows:
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"logits must have unit stride over V, got strides {tensor.stride()}")
        base, start = tensor, tensor.data_ptr() % VECTOR_BYTES // tensor.itemsize
        if 0 < start <= tensor.storage_offset():
            base = tensor.as_strided((1,), (1,), tensor.storage_offset() - start)
        else:
            start = 0
        return _Rows(base, start, tensor.stride(0) if tensor.ndim == 3 else 0, tensor.stride(-2))

    def aligned_with(self, other: _Rows, vec: int) -> bool:
        """Whether each row begins as many elements beyond a vector's boundary as the same row of `other`."""
        return all((mine - its) % vec == 0 for mine, its in zip(self[1:], other[1:], strict=True))


class _Call(NamedTuple):
    """What every launcher makes of its arguments; two-dimensional logits are a batch of one."""

    student: _Rows
    teacher: _Rows
    rows: int
    sizes: tuple[int, int, int, int]
    places: tuple[int, ...]
    form: dict[str, Any]
    row_bytes: int

    @staticmethod
    def of(student: Tensor, teacher: Tensor | None, weights: Tensor, shared_vocab: int, power: int) -> _Call:
        vocab = student.shape[-1]
        student_rows = _Rows.of(student)
        teacher_rows = student_rows if teacher is None else _Rows.of(teacher)
        vec = vector_length(student.itemsize, student.itemsize if teacher is None else teacher.itemsize)
        form = {
            "POWER": power, "TAIL": teacher is not None and shared_vocab < vocab,
            "ALIGNED": student_rows.aligned_with(teacher_rows, vec), "VEC": vec,
            "COMPUTE": tl.float64 if student.dtype == torch.float64 else tl.float32,
        }
        rows = weights.numel()
        return _Call(
            student_rows, teacher_rows, rows, (rows, weights.shape[-1], vocab, shared_vocab),
            (*student_rows[1:], *teacher_rows[1:]), form, vocab * student.itemsize,
        )


@on_its_device
def softmax_kl_stats(
    student: Tensor, teacher: Tensor | None, targets: Tensor | None, weights: Tensor, scalars: Tensor, *,
    divergence: str, shared_vocab: int, metrics: bool, power: int,
) -> tuple[Tensor, Tensor]:
    """Values `[VALUES, N]` and saved numbers `[SAVED, N]` of the N tokens of `weights`, `[B, S]` or `[N]`.

    Logits are `[B, >= S, V]` or `[N, V]` with unit stride over V; `targets` (within the vocabulary, or of weight 0)
    and `weights` are contiguous. `scalars` holds the temperature, the weight of the divergence with its T^2, that of
    the cross-entropy, and beta. `power` is the temperature where it is known and 1, 2 or 4, otherwise 0; without a
    teacher the temperature must be 1.
    """
    call = _Call.of(student, teacher, weights, shared_vocab, power)
    rows = call.rows
    values, saved = weights.new_empty(VALUES.value, rows), weights.new_empty(SAVED.value, rows)
    if rows == 0:
        return values, saved
    plan = row_plan(rows, call.row_bytes)
    splits, launch = plan.splits, {"num_warps": plan.warps, "enable_fp_fusion": True}
    form = {"DIVERGENCE": "none" if teacher is None else divergence, "HAS_TARGETS": targets is not None}
    form |= {"METRICS": metrics and teacher is not None, "SPLITS": splits}
    targets = weights if targets is None else targets
    partials = weights.new_empty(PARTIALS.value, rows, splits) if splits > 1 else values
    _softmax_kl_stats_kernel[(rows * splits,)](
        call.student.base, call.teacher.base, targets, weights, scalars, values, saved, partials, *call.sizes,
        *call.places, **form, **call.form, NT=plan.lanes, **launch,
    )
    if splits > 1:
        jsd = values
        vec, compute = call.form["VEC"], call.form["COMPUTE"]
        if form["DIVERGENCE"] == "jsd":
            jsd = weights.new_empty(2, rows, splits)
            _softmax_kl_jsd_kernel[(rows * splits,)](
                call.student.base, call.teacher.base, weights, scalars, partials, jsd, rows, weights.shape[-1],
                shared_vocab, *call.places, ALIGNED=call.form["ALIGNED"], SPLITS=splits, NT=plan.lanes, VEC=vec,
                COMPUTE=compute, **launch,
            )
        _softmax_kl_combine_kernel[(rows,)](
            call.student.base, targets, weights, scalars, values, saved, partials, jsd, rows, weights.shape[-1],
            *call.places[:3], **form, POWER=call.form["POWER"], VEC=vec, COMPUTE=compute, num_warps=1,
            enable_fp_fusion=True,
        )
    return values, saved


@on_its_device
def softmax_kl_grad(
    dloss: Tensor, student: Tensor, teacher: Tensor | None, targets: Tensor | None, weights: Tensor, scalars: Tensor,
    saved: Tensor, grad: Tensor, *, divergence: str, shared_vocab: int, power: int,
) -> None:
    """Write into `grad`, shaped like `student`, the gradient of each token's loss times `dloss`, like `weights`.

    Without `teacher` or `targets` that term of the loss is left out. `grad` may be `student` itself. Positions beyond
    those of `weights` are not written.
    """
    call = _Call.of(student, teacher, weights, shared_vocab, power)
    if call.rows == 0:
        return
    grad_rows = _Rows.of(grad)
    plan = row_plan(call.rows, call.row_bytes)
    _softmax_kl_grad_kernel[(call.rows * plan.splits,)](
        dloss, call.student.base, call.teacher.base, weights if targets is None else targets, weights, scalars, saved,
        grad_rows.base, *call.sizes, *call.places, *grad_rows[1:], DIVERGENCE="none" if teacher is None else divergence,
        CE=targets is not None, **call.form, GRAD_ALIGNED=grad_rows.aligned_with(call.student, call.form["VEC"]),
        SPLITS=plan.splits, NT=plan.lanes, num_warps=plan.warps, enable_fp_fusion=True,
    )


@on_its_device
def softmax_kl_one_launch(
    dloss: Tensor, student: Tensor, teacher: Tensor | None, targets: Tensor | None, weights: Tensor, scalars: Tensor,
    grad: Tensor, *, divergence: str, shared_vocab: int, metrics: bool, power: int, kl_in_loss: bool, ce_in_loss: bool,
) -> tuple[Tensor, Tensor]:
    """`softmax_kl_stats` and `softmax_kl_grad` row by row in one launch, where `dloss` is known forward."""
    call = _Call.of(student, teacher, weights, shared_vocab, power)
    rows = call.rows
    values, saved = weights.new_empty(VALUES.value, rows), weights.new_empty(SAVED.value, rows)
    if rows == 0:
        return values, saved
    grad_rows = _Rows.of(grad)
    plan = row_plan(rows, call.row_bytes, reads_twice=True)
    _softmax_kl_one_launch_kernel[(rows,)](
        dloss, call.student.base, call.teacher.base, weights if targets is None else targets, weights, scalars, values,
        saved, grad_rows.base, *call.sizes, *call.places, *grad_rows[1:],
        DIVERGENCE="none" if teacher is None else divergence, HAS_TARGETS=targets is not None,
        METRICS=metrics and teacher is not None, KL=kl_in_loss and teacher is not None,
        CE=ce_in_loss and targets is not None, **call.form,
        GRAD_ALIGNED=grad_rows.aligned_with(call.student, call.form["VEC"]), NT=plan.lanes, num_warps=plan.warps,
        enable_fp_fusion=True,
    )
    return values, saved


# Compile cases --------------------------------------------------------------------------------------------------------


def _launch_on_meta(
    dtype: torch.dtype, divergence: str | None, *, targets: bool, metrics: bool, power: int, rows: int, vocab: int,
    shared_vocab: int, one_launch: bool, logits_dtype: torch.dtype | None,
) -> None:
    student = torch.empty(rows, vocab, dtype=logits_dtype or dtype, device="meta")
    teacher = None if divergence is None else torch.empty(rows, shared_vocab, dtype=student.dtype, device="meta")
    grad = student if logits_dtype is None else torch.empty(rows, vocab, dtype=dtype, device="meta")
    labels = torch.empty(rows, dtype=torch.int64, device="meta") if targets else None
    weights, scalars = torch.empty(rows, device="meta"), torch.empty(4, device="meta")
    form = {"divergence": divergence or "forward_kl", "shared_vocab": shared_vocab, "power": power}
    if one_launch:
        softmax_kl_one_launch(
            weights, student, teacher, labels, weights, scalars, grad, **form, metrics=metrics, kl_in_loss=True,
            ce_in_loss=True,
        )
    else:
        _, saved = softmax_kl_stats(student, teacher, labels, weights, scalars, **form, metrics=metrics)
        softmax_kl_grad(weights, student, teacher, labels, weights, scalars, saved, grad, **form)


def _case(
    name: str, divergence: str | None, *, targets: bool = False, metrics: bool = False, power: int = 1,
    rows: int = 8192, vocab: int = 50257, shared_vocab: int = 50257, one_launch: bool = False,
    logits_dtype: torch.dtype | None = None, budget: dict[str, float | dict[str, float]] | None = None,
) -> CompileCase:
    launch = partial(
        _launch_on_meta, divergence=divergence, targets=targets, metrics=metrics, power=power, rows=rows, vocab=vocab,
        shared_vocab=shared_vocab, one_launch=one_launch, logits_dtype=logits_dtype,
    )
    streams = 1 if divergence is None else 2
    return CompileCase(name, launch, streams=streams, stream_dtype=logits_dtype, budget=budget or {})


def _budget(stats: float, grad: float) -> dict[str, float | dict[str, float]]:
    """Counts of PTX, for architectures whose machine code cannot be read; machine code has less, by up to a quarter.

    bfloat16 before sm_80, where the cast is emulated, costs the gradient 7 more.
    """
    by_dtype = {"float32": grad, "float16": grad, "bfloat16": grad + 7}
    return {"_softmax_kl_stats_kernel": stats, "_softmax_kl_grad_kernel": by_dtype}


COMPILE_CASES = [
    _case("forward_kl", "forward_kl", budget=_budget(19, 14.5)),
    _case("forward_kl + ce", "forward_kl", targets=True, budget=_budget(19, 14.5)),
    _case("forward_kl + ce, T = 2", "forward_kl", targets=True, power=2, budget=_budget(20, 16.5)),
    _case("forward_kl + ce, any T", "forward_kl", targets=True, power=0, budget=_budget(23, 17.5)),
    _case("forward_kl + ce + metrics", "forward_kl", targets=True, metrics=True, budget=_budget(25, 14.5)),
    _case(
        "forward_kl + ce + metrics, any T", "forward_kl", targets=True, metrics=True, power=0, budget=_budget(33, 17.5)
    ),
    _case("reverse_kl", "reverse_kl", budget=_budget(19, 18.5)),
    _case("reverse_kl + ce, any T", "reverse_kl", targets=True, power=0, budget=_budget(23, 21.5)),
    _case("jsd", "jsd", budget=_budget(100, 90)),
    _case("jsd + ce + metrics, any T", "jsd", targets=True, metrics=True, power=0),
    _case("ce", None, targets=True),
    _case("forward_kl + ce, student padded", "forward_kl", targets=True, vocab=50304),
    _case("forward_kl + ce + metrics, few rows", "forward_kl", targets=True, metrics=True, rows=4),
    _case("jsd, few rows", "jsd", rows=4),
    _case("forward_kl + ce, one launch", "forward_kl", targets=True, one_launch=True),
    _case("jsd + ce + metrics, any T, one launch", "jsd", targets=True, metrics=True, power=0, one_launch=True),
    _case(
        "forward_kl + ce, one launch, float32 logits", "forward_kl", targets=True, vocab=50304, shared_vocab=50304,
        one_launch=True, logits_dtype=torch.float32,
    ),
    _case(
        "jsd + ce + metrics, any T, one launch, float32 logits", "jsd", targets=True, metrics=True, power=0,
        one_launch=True, logits_dtype=torch.float32,
    ),
]
