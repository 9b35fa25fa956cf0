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

# fmt: off  (arguments stand in rows, by kind: one a line, they would be most of the file)
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
from .launch import VECTOR_BYTES, row_plan, vector_length
from .online_softmax import (
    LN2,
    LOG2E,
    LOWEST,
    first_column_of,
    load_columns,
    ragged_columns,
    row_start,
    scaled,
    store_columns,
    tile_columns,
    whole_vectors,
)
from .softmax_kl_tile import (
    MAX_LOG_RATIO,
    add_careful,
    add_pairs,
    add_student,
    at_temperature_1,
    gradient,
    jsd_terms,
    merge_pairs,
    merge_student,
)

VALUES = 6
"""loss, kl, ce, student entropy, teacher entropy, top-1 agreement: a row's terms times its weight."""

SAVED = 7
"""m_s, Z_s, m_t, Z_t; m and U of the whole student row; the mean in the gradient. See softmax_kl_tile.py."""

PARTIALS = 14
"""What a part of a row leaves for `_merge_parts`: the sums of `_pair_sums`, and m and U of the ids beyond."""

_VALUES, _SAVED, _PARTIALS = tl.constexpr(VALUES), tl.constexpr(SAVED), tl.constexpr(PARTIALS)


# A range of columns ---------------------------------------------------------------------------------------------------


@triton.jit
def _pair_sums(
    s_row,
    t_row,
    begin,
    end,
    split,
    k,
    temperature,
    DIVERGENCE: tl.constexpr,
    NEEDS_1: tl.constexpr,
    METRICS: tl.constexpr,
    POWER: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The sums of a part of columns [begin, end): m_s, Z_s, m_t, Z_t, a, b, U_s, U_t, h_s, h_t, column_s, column_t.

    The last two are the columns of the largest logits.
    """
    BLOCK: tl.constexpr = NT * VEC
    first, last = whole_vectors(begin, end, split, SPLITS, BLOCK, VEC)
    tile = tile_columns(NT, VEC)
    lane = tl.arange(0, NT)[:, None] * VEC
    zero = tl.zeros([NT], COMPUTE)
    lowest = tl.full([NT], LOWEST, COMPUTE)
    none = tl.full([NT], -1, tl.int32)

    sums = (lowest, zero, lowest, zero, zero, zero, zero, zero, zero, lowest, lowest, none, none)
    ragged, is_ragged = ragged_columns(begin, end, split, NT, VEC)
    s, t = load_columns(s_row, ragged, is_ragged, COMPUTE), load_columns(t_row, ragged, is_ragged, COMPUTE)
    sums = add_pairs(sums, s, t, -1, k, temperature, DIVERGENCE, NEEDS_1, METRICS, POWER, True)
    main = first + (last - first) // (2 * BLOCK) * (2 * BLOCK)
    for i in range(first, main, 2 * BLOCK):
        # All four loads before the first use: bytes in flight are what a memory-bound loop is short of.
        j = i + BLOCK
        s, t = tl.load(s_row + i + tile).to(COMPUTE), tl.load(t_row + i + tile).to(COMPUTE)
        next_s, next_t = tl.load(s_row + j + tile).to(COMPUTE), tl.load(t_row + j + tile).to(COMPUTE)
        sums = add_pairs(sums, s, t, i, k, temperature, DIVERGENCE, NEEDS_1, METRICS, POWER, False)
        sums = add_pairs(sums, next_s, next_t, j, k, temperature, DIVERGENCE, NEEDS_1, METRICS, POWER, False)
    for i in range(main, last, BLOCK):
        mask = i + lane < last
        s, t = load_columns(s_row, i + tile, mask, COMPUTE), load_columns(t_row, i + tile, mask, COMPUTE)
        sums = add_pairs(sums, s, t, i, k, temperature, DIVERGENCE, NEEDS_1, METRICS, POWER, True)

    m_s, Z_s, m_t, Z_t, a, U_s, U_t, h_s, h_t, peak_s, peak_t, tile_s, tile_t = sums
    m_s, Z_s, m_t, Z_t, a, b, U_s, U_t, h_s, h_t = merge_pairs(
        m_s,
        Z_s,
        m_t,
        Z_t,
        a,
        zero,
        U_s,
        U_t,
        h_s,
        h_t,
        temperature,
        DIVERGENCE,
        NEEDS_1,
        METRICS,
        POWER,
    )
    if DIVERGENCE != "jsd" or METRICS:
        total = a + h_s + h_t
        if total - total != 0:  # inf or NaN: logits of -inf, on one side or on both
            a, b, h_s, h_t = _careful_sums(
                s_row,
                t_row,
                begin,
                end,
                split,
                m_s,
                m_t,
                k,
                temperature,
                DIVERGENCE,
                METRICS,
                POWER,
                SPLITS,
                NT,
                VEC,
                COMPUTE,
            )
    column_s, column_t = 0, 0
    if METRICS:
        column_s = first_column_of(peak_s, tile_s, s_row, ragged, is_ragged, last, NT, VEC, COMPUTE)
        column_t = first_column_of(peak_t, tile_t, t_row, ragged, is_ragged, last, NT, VEC, COMPUTE)
    return m_s, Z_s, m_t, Z_t, a, b, U_s, U_t, h_s, h_t, column_s, column_t


@triton.jit
def _careful_sums(
    s_row,
    t_row,
    begin,
    end,
    split,
    m_s,
    m_t,
    k,
    temperature,
    DIVERGENCE: tl.constexpr,
    METRICS: tl.constexpr,
    POWER: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """a, b, h_s and h_t of a part of columns [begin, end) that may hold -inf, and whose maxima are known."""
    first, last = whole_vectors(begin, end, split, SPLITS, NT * VEC, VEC)
    tile = tile_columns(NT, VEC)
    lane = tl.arange(0, NT)[:, None] * VEC
    zero = tl.zeros([NT], COMPUTE)
    ragged, is_ragged = ragged_columns(begin, end, split, NT, VEC)
    s, t = load_columns(s_row, ragged, is_ragged, COMPUTE), load_columns(t_row, ragged, is_ragged, COMPUTE)
    sums = add_careful((zero, zero, zero, zero), s, t, m_s, m_t, k, temperature, DIVERGENCE, METRICS, POWER)
    for i in range(first, last, NT * VEC):
        mask = i + lane < last
        s, t = load_columns(s_row, i + tile, mask, COMPUTE), load_columns(t_row, i + tile, mask, COMPUTE)
        sums = add_careful(sums, s, t, m_s, m_t, k, temperature, DIVERGENCE, METRICS, POWER)
    return tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0)


@triton.jit
def _jsd_sums(
    s_row,
    t_row,
    begin,
    end,
    split,
    m_s,
    Z_s,
    m_t,
    Z_t,
    k,
    beta,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """sum p_s log(p_s / m) and sum p_t log(p_t / m) over a part of columns [begin, end)."""
    first, last = whole_vectors(begin, end, split, SPLITS, NT * VEC, VEC)
    tile = tile_columns(NT, VEC)
    lane = tl.arange(0, NT)[:, None] * VEC
    log_z = tl.log2(Z_s / Z_t) * LN2
    ragged, is_ragged = ragged_columns(begin, end, split, NT, VEC)
    s, t = load_columns(s_row, ragged, is_ragged, COMPUTE), load_columns(t_row, ragged, is_ragged, COMPUTE)
    student, teacher = jsd_terms(s, t, m_s, m_t, k, log_z, beta)
    for i in range(first, last, NT * VEC):
        mask = i + lane < last
        s, t = load_columns(s_row, i + tile, mask, COMPUTE), load_columns(t_row, i + tile, mask, COMPUTE)
        more_student, more_teacher = jsd_terms(s, t, m_s, m_t, k, log_z, beta)
        student += more_student
        teacher += more_teacher
    return tl.sum(student, 0) / Z_s, tl.sum(teacher, 0) / Z_t


@triton.jit
def _student_sums(
    s_row,
    begin,
    end,
    split,
    k,
    temperature,
    POWER: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """m and U of a part of columns [begin, end) of the student's row."""
    BLOCK: tl.constexpr = NT * VEC
    first, last = whole_vectors(begin, end, split, SPLITS, BLOCK, VEC)
    tile = tile_columns(NT, VEC)
    lane = tl.arange(0, NT)[:, None] * VEC
    m, U = tl.full([NT], LOWEST, COMPUTE), tl.zeros([NT], COMPUTE)
    ragged, is_ragged = ragged_columns(begin, end, split, NT, VEC)
    m, U = add_student(m, U, load_columns(s_row, ragged, is_ragged, COMPUTE), k, temperature, POWER)
    main = first + (last - first) // (2 * BLOCK) * (2 * BLOCK)
    for i in range(first, main, 2 * BLOCK):
        s, next_s = tl.load(s_row + i + tile).to(COMPUTE), tl.load(s_row + i + BLOCK + tile).to(COMPUTE)
        m, U = add_student(m, U, s, k, temperature, POWER)
        m, U = add_student(m, U, next_s, k, temperature, POWER)
    for i in range(main, last, BLOCK):
        s = load_columns(s_row, i + tile, i + lane < last, COMPUTE)
        m, U = add_student(m, U, s, k, temperature, POWER)
    return merge_student(m, U, temperature)


@triton.jit
def _store_pair_gradient(
    s_row,
    t_row,
    g_row,
    begin,
    end,
    split,
    m_s,
    m_t,
    k,
    temperature,
    log_z,
    mean,
    beta,
    A_s,
    A_t,
    A_1,
    DIVERGENCE: tl.constexpr,
    CE: tl.constexpr,
    POWER: tl.constexpr,
    DESCENDING: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The gradient in a part of columns [begin, end)."""
    BLOCK: tl.constexpr = NT * VEC
    first, last = whole_vectors(begin, end, split, SPLITS, BLOCK, VEC)
    tile = tile_columns(NT, VEC)
    lane = tl.arange(0, NT)[:, None] * VEC
    main = first + (last - first) // (2 * BLOCK) * (2 * BLOCK)
    for i in range(main, last, BLOCK):
        mask = i + lane < last
        s, t = load_columns(s_row, i + tile, mask, COMPUTE), load_columns(t_row, i + tile, mask, COMPUTE)
        g = gradient(s, t, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t, A_1, DIVERGENCE, CE, POWER)
        store_columns(g_row, i + tile, mask, g)
    for step in range(first, main, 2 * BLOCK):
        i = first + main - 2 * BLOCK - step if DESCENDING else step
        j = i + BLOCK
        # Both tiles are read before one is written: no load can pass a store that it might depend on.
        s, t = tl.load(s_row + i + tile).to(COMPUTE), tl.load(t_row + i + tile).to(COMPUTE)
        next_s, next_t = tl.load(s_row + j + tile).to(COMPUTE), tl.load(t_row + j + tile).to(COMPUTE)
        g = gradient(s, t, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t, A_1, DIVERGENCE, CE, POWER)
        next_g = gradient(
            next_s,
            next_t,
            m_s,
            m_t,
            k,
            temperature,
            log_z,
            mean,
            beta,
            A_s,
            A_t,
            A_1,
            DIVERGENCE,
            CE,
            POWER,
        )
        tl.store(g_row + i + tile, g.to(g_row.dtype.element_ty))
        tl.store(g_row + j + tile, next_g.to(g_row.dtype.element_ty))
    ragged, is_ragged = ragged_columns(begin, end, split, NT, VEC)
    s, t = load_columns(s_row, ragged, is_ragged, COMPUTE), load_columns(t_row, ragged, is_ragged, COMPUTE)
    g = gradient(s, t, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t, A_1, DIVERGENCE, CE, POWER)
    store_columns(g_row, ragged, is_ragged, g)


@triton.jit
def _store_student_gradient(
    s_row,
    g_row,
    begin,
    end,
    split,
    m,
    k,
    temperature,
    A,
    POWER: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The cross-entropy's gradient, but for the target's -1, in a part of columns [begin, end)."""
    first, last = whole_vectors(begin, end, split, SPLITS, NT * VEC, VEC)
    tile = tile_columns(NT, VEC)
    lane = tl.arange(0, NT)[:, None] * VEC
    ragged, is_ragged = ragged_columns(begin, end, split, NT, VEC)
    y = scaled(load_columns(s_row, ragged, is_ragged, COMPUTE), k, m)
    store_columns(g_row, ragged, is_ragged, at_temperature_1(tl.exp2(y), y, temperature, POWER) * A)
    for i in range(first, last, NT * VEC):
        mask = i + lane < last
        y = scaled(load_columns(s_row, i + tile, mask, COMPUTE), k, m)
        store_columns(g_row, i + tile, mask, at_temperature_1(tl.exp2(y), y, temperature, POWER) * A)


@triton.jit
def _store_zeros(
    g_row,
    begin,
    end,
    split,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Zeros in a part of columns [begin, end)."""
    first, last = whole_vectors(begin, end, split, SPLITS, NT * VEC, VEC)
    tile = tile_columns(NT, VEC)
    lane = tl.arange(0, NT)[:, None] * VEC
    zeros = tl.zeros([NT, VEC], COMPUTE)
    ragged, is_ragged = ragged_columns(begin, end, split, NT, VEC)
    store_columns(g_row, ragged, is_ragged, zeros)
    for i in range(first, last, NT * VEC):
        store_columns(g_row, i + tile, i + lane < last, zeros)


# A row ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _row_pointers(
    row,
    positions,
    student_ptr,
    student_start,
    stride_sb,
    stride_ss,
    teacher_ptr,
    teacher_start,
    stride_tb,
    stride_ts,
    HAS_TEACHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
):
    """Pointers to column 0 of the student's and the teacher's row, and the column of their first element.

    Where the teacher's row is not as far beyond a boundary as the student's (not ALIGNED), the compiler cannot know
    its vectors aligned and reads them one element at a time.
    """
    start = row_start(row, positions, student_start, stride_sb, stride_ss)
    lead = (start % VEC).to(tl.int32)
    s_row = student_ptr + start // VEC * VEC
    t_row = s_row
    if HAS_TEACHER:
        start = row_start(row, positions, teacher_start, stride_tb, stride_ts)
        if ALIGNED:
            t_row = teacher_ptr + start // VEC * VEC
        else:
            t_row = teacher_ptr + (start - lead)
    return s_row, t_row, lead


@triton.jit
def _grad_row(
    row,
    positions,
    lead,
    grad_ptr,
    grad_start,
    stride_gb,
    stride_gs,
    GRAD_ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
):
    """Pointer to column 0 of the gradient's row, whose first element is in column `lead` as the student's is."""
    start = row_start(row, positions, grad_start, stride_gb, stride_gs)
    if GRAD_ALIGNED:
        return grad_ptr + start // VEC * VEC
    else:
        return grad_ptr + (start - lead)


@triton.jit
def _row_sums(
    s_row,
    t_row,
    lead,
    vocab,
    shared_vocab,
    split,
    k,
    temperature,
    DIVERGENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    METRICS: tl.constexpr,
    POWER: tl.constexpr,
    TAIL: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The `PARTIALS` sums of a part of a row: of the ids that both models share, and m and U of those beyond."""
    none = tl.full((), 0.0, COMPUTE)
    m, U = tl.full((), LOWEST, COMPUTE), none
    if DIVERGENCE == "none":
        m, U = _student_sums(s_row, lead, lead + vocab, split, k, temperature, POWER, SPLITS, NT, VEC, COMPUTE)
        return m, none, m, none, none, none, none, none, none, none, 0, 0, m, U
    else:
        sums = _pair_sums(
            s_row,
            t_row,
            lead,
            lead + shared_vocab,
            split,
            k,
            temperature,
            DIVERGENCE,
            HAS_TARGETS or METRICS,
            METRICS,
            POWER,
            SPLITS,
            NT,
            VEC,
            COMPUTE,
        )
        if HAS_TARGETS and TAIL:
            m, U = _student_sums(
                s_row,
                lead + shared_vocab,
                lead + vocab,
                split,
                k,
                temperature,
                POWER,
                SPLITS,
                NT,
                VEC,
                COMPUTE,
            )
        return sums + (m, U)


@triton.jit
def _finish(
    row,
    rows,
    weight,
    s_row,
    lead,
    targets_ptr,
    scalars_ptr,
    values_ptr,
    saved_ptr,
    sums,
    DIVERGENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    METRICS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """From the `PARTIALS` sums of a whole row, write its values and what its gradient needs; returns the latter.

    For the Jensen-Shannon divergence a and b are its two sums, as `_jsd_sums` returns them.
    """
    m_s, Z_s, m_t, Z_t, a, b, U_s, U_t, h_s, h_t, column_s, column_t, m, U = sums
    temperature, kl_scale = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
    ce_weight, beta = tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3)
    none = tl.full((), 0.0, COMPUTE)
    loss, kl, ce, entropy_s, entropy_t, agreement, mean = none, none, none, none, none, none, none
    if DIVERGENCE != "none":
        log_z = tl.log2(Z_s / Z_t) * LN2
        if DIVERGENCE == "forward_kl":
            kl = tl.where(b > 0, float("inf"), a / Z_t * LN2 + log_z)
        elif DIVERGENCE == "reverse_kl":
            share = b / Z_s
            mean = a / Z_s * LN2 - log_z * (1 - share) + MAX_LOG_RATIO * share
            kl = tl.where(b > 0, float("inf"), mean)
        else:
            mean = a + (Z_t - Z_t)  # a teacher of NaN shows in the gradient too
            kl = (1 - beta) * a + beta * b
        loss += tl.where(kl_scale == 0, 0.0, kl_scale * kl)
    if HAS_TARGETS:
        if DIVERGENCE != "none":
            top = tl.maximum(m_s, m)
            U = U_s * tl.exp2((m_s - top) * temperature) + U * tl.exp2((m - top) * temperature)
            m = top
        label = tl.load(targets_ptr + row).to(tl.int32)
        y = scaled(tl.load(s_row + lead + label).to(COMPUTE), LOG2E / temperature, m)
        ce = (tl.log2(U) - y * temperature) * LN2
        loss += tl.where(ce_weight == 0, 0.0, ce_weight * ce)
    if METRICS:
        entropy_s = (tl.log2(U_s) - temperature * h_s / U_s) * LN2
        entropy_t = (tl.log2(U_t) - temperature * h_t / U_t) * LN2
        agreement += tl.where(column_s == column_t, 1.0, 0.0)
    values = (loss, kl, ce, entropy_s, entropy_t, agreement)
    for i in tl.static_range(_VALUES):
        tl.store(values_ptr + i * rows + row, values[i] * weight)
    saved = (m_s, Z_s, m_t, Z_t, m, U, mean)
    for i in tl.static_range(_SAVED):
        tl.store(saved_ptr + i * rows + row, saved[i])
    return saved


@triton.jit
def _finish_uncounted(row, rows, values_ptr, saved_ptr):
    for i in tl.static_range(_VALUES):
        tl.store(values_ptr + i * rows + row, 0.0)
    for i in tl.static_range(_SAVED):
        tl.store(saved_ptr + i * rows + row, 0.0)


@triton.jit
def _whole_row(
    row,
    rows,
    weight,
    s_row,
    t_row,
    lead,
    targets_ptr,
    scalars_ptr,
    values_ptr,
    saved_ptr,
    vocab,
    shared_vocab,
    DIVERGENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    METRICS: tl.constexpr,
    POWER: tl.constexpr,
    TAIL: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Statistics of a row that one program has to itself, written and, as far as its gradient needs them, returned."""
    temperature, beta = tl.load(scalars_ptr), tl.load(scalars_ptr + 3)
    k = LOG2E / temperature
    sums = _row_sums(
        s_row,
        t_row,
        lead,
        vocab,
        shared_vocab,
        0,
        k,
        temperature,
        DIVERGENCE,
        HAS_TARGETS,
        METRICS,
        POWER,
        TAIL,
        1,
        NT,
        VEC,
        COMPUTE,
    )
    if DIVERGENCE == "jsd":
        jsd = _jsd_sums(
            s_row,
            t_row,
            lead,
            lead + shared_vocab,
            0,
            sums[0],
            sums[1],
            sums[2],
            sums[3],
            k,
            beta,
            1,
            NT,
            VEC,
            COMPUTE,
        )
        sums = sums[:4] + jsd + sums[6:]
    return _finish(
        row,
        rows,
        weight,
        s_row,
        lead,
        targets_ptr,
        scalars_ptr,
        values_ptr,
        saved_ptr,
        sums,
        DIVERGENCE,
        HAS_TARGETS,
        METRICS,
        COMPUTE,
    )


@triton.jit
def _row_gradient(
    s_row,
    t_row,
    g_row,
    lead,
    vocab,
    shared_vocab,
    split,
    c,
    target_ptr,
    scalars_ptr,
    saved,
    DIVERGENCE: tl.constexpr,
    CE: tl.constexpr,
    POWER: tl.constexpr,
    TAIL: tl.constexpr,
    DESCENDING: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write c times the gradient of a row's loss in a part of its columns; with c = 0 zeros, and nothing is read.

    DIVERGENCE is "none", and CE false, where that term is not in the loss.
    """
    temperature, kl_scale = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
    ce_weight, beta = tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3)
    k = LOG2E / temperature
    m_s, Z_s, m_t, Z_t, m, U, mean = saved
    end = lead + vocab
    shared_end = end
    if DIVERGENCE != "none":
        shared_end = lead + shared_vocab
    if c == 0:
        _store_zeros(g_row, lead, end, split, SPLITS, NT, VEC, COMPUTE)
    else:
        A, A_1 = tl.full((), 0.0, COMPUTE), tl.full((), 0.0, COMPUTE)
        if CE:
            A = c * ce_weight / U
            column = lead + tl.load(target_ptr).to(tl.int32)
            at_target = tl.load(s_row + column).to(COMPUTE)
            g_target = tl.exp2(scaled(at_target, k, m) * temperature) * A
        if DIVERGENCE != "none":
            c_z = c * kl_scale / temperature
            A_s, A_t, log_z = c_z / Z_s, c_z / Z_t, tl.log2(Z_s / Z_t) * LN2
            if DIVERGENCE == "jsd":
                A_s *= 1 - beta
            if CE:
                A_1 = A * tl.exp2((m_s - m) * temperature)
                is_shared = column < shared_end
                t = tl.load(t_row + column, mask=is_shared, other=0.0).to(COMPUTE)
                g = gradient(
                    at_target,
                    t,
                    m_s,
                    m_t,
                    k,
                    temperature,
                    log_z,
                    mean,
                    beta,
                    A_s,
                    A_t,
                    A_1,
                    DIVERGENCE,
                    CE,
                    POWER,
                )
                g_target = tl.where(is_shared, g, g_target)
                tl.debug_barrier()  # the row may be written in place: its target has been read by now
            _store_pair_gradient(
                s_row,
                t_row,
                g_row,
                lead,
                shared_end,
                split,
                m_s,
                m_t,
                k,
                temperature,
                log_z,
                mean,
                beta,
                A_s,
                A_t,
                A_1,
                DIVERGENCE,
                CE,
                POWER,
                DESCENDING,
                SPLITS,
                NT,
                VEC,
                COMPUTE,
            )
            if TAIL and CE:
                _store_student_gradient(
                    s_row,
                    g_row,
                    shared_end,
                    end,
                    split,
                    m,
                    k,
                    temperature,
                    A,
                    POWER,
                    SPLITS,
                    NT,
                    VEC,
                    COMPUTE,
                )
            elif TAIL:
                _store_zeros(g_row, shared_end, end, split, SPLITS, NT, VEC, COMPUTE)
        else:
            tl.debug_barrier()
            _store_student_gradient(
                s_row,
                g_row,
                lead,
                end,
                split,
                m,
                k,
                temperature,
                A,
                POWER,
                SPLITS,
                NT,
                VEC,
                COMPUTE,
            )
        if CE:
            # The target's element again, with its -1 and in the compute dtype, once its first writing is over.
            tl.debug_barrier()
            mine = _has_column(column, lead, shared_end, end, split, SPLITS, NT * VEC, VEC)
            tl.store(g_row + column, (g_target - c * ce_weight).to(g_row.dtype.element_ty), mask=mine)


@triton.jit
def _has_column(column, begin, shared_end, end, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Whether this part writes a column of [begin, shared_end) or [shared_end, end)."""
    is_shared = column < shared_end
    range_begin, range_end = tl.where(is_shared, begin, shared_end), tl.where(is_shared, shared_end, end)
    first, last = whole_vectors(range_begin, range_end, split, SPLITS, BLOCK, VEC)
    all_first, all_last = whole_vectors(range_begin, range_end, 0, 1, BLOCK, VEC)
    is_whole = (column >= all_first) & (column < all_last)
    return ((column >= first) & (column < last)) | ((is_whole == 0) & (split == 0))


# Kernels --------------------------------------------------------------------------------------------------------------

_SIZES = ["rows", "positions", "vocab", "shared_vocab"]
_PLACES = [
    "student_start",
    "stride_sb",
    "stride_ss",
    "teacher_start",
    "stride_tb",
    "stride_ts",
    "grad_start",
    "stride_gb",
    "stride_gs",
]
"""Not specialised: `_row_pointers` aligns vectors whatever divides these, and each value would compile anew."""


@triton.jit(do_not_specialize=_SIZES + _PLACES[:6])
def _softmax_kl_stats_kernel(
    student_ptr,
    teacher_ptr,
    targets_ptr,
    weights_ptr,
    scalars_ptr,
    values_ptr,
    saved_ptr,
    partials_ptr,
    rows,
    positions,
    vocab,
    shared_vocab,
    student_start,
    stride_sb,
    stride_ss,
    teacher_start,
    stride_tb,
    stride_ts,
    DIVERGENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    METRICS: tl.constexpr,
    POWER: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Values and saved numbers of a row, or the sums of one of its SPLITS parts."""
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    weight = tl.load(weights_ptr + row)
    if weight != 0:
        s_row, t_row, lead = _row_pointers(
            row,
            positions,
            student_ptr,
            student_start,
            stride_sb,
            stride_ss,
            teacher_ptr,
            teacher_start,
            stride_tb,
            stride_ts,
            DIVERGENCE != "none",
            ALIGNED,
            VEC,
        )
        if SPLITS == 1:
            _whole_row(
                row,
                rows,
                weight,
                s_row,
                t_row,
                lead,
                targets_ptr,
                scalars_ptr,
                values_ptr,
                saved_ptr,
                vocab,
                shared_vocab,
                DIVERGENCE,
                HAS_TARGETS,
                METRICS,
                POWER,
                TAIL,
                NT,
                VEC,
                COMPUTE,
            )
        else:
            temperature = tl.load(scalars_ptr)
            sums = _row_sums(
                s_row,
                t_row,
                lead,
                vocab,
                shared_vocab,
                split,
                LOG2E / temperature,
                temperature,
                DIVERGENCE,
                HAS_TARGETS,
                METRICS,
                POWER,
                TAIL,
                SPLITS,
                NT,
                VEC,
                COMPUTE,
            )
            for i in tl.static_range(_PARTIALS):
                # The columns too, as numbers: float32 holds them exactly below 2^24.
                tl.store(partials_ptr + (i * rows + row) * SPLITS + split, sums[i])
    elif SPLITS == 1:
        _finish_uncounted(row, rows, values_ptr, saved_ptr)


@triton.jit
def _load_parts(partials_ptr, index, row, rows, SPLITS: tl.constexpr):
    return tl.load(partials_ptr + (index * rows + row) * SPLITS + tl.arange(0, SPLITS))


@triton.jit
def _merge_parts(
    partials_ptr,
    row,
    rows,
    temperature,
    DIVERGENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    METRICS: tl.constexpr,
    POWER: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The `PARTIALS` sums of a row from those of its parts."""
    m_s, Z_s = _load_parts(partials_ptr, 0, row, rows, SPLITS), _load_parts(partials_ptr, 1, row, rows, SPLITS)
    m_t, Z_t = _load_parts(partials_ptr, 2, row, rows, SPLITS), _load_parts(partials_ptr, 3, row, rows, SPLITS)
    a, b = _load_parts(partials_ptr, 4, row, rows, SPLITS), _load_parts(partials_ptr, 5, row, rows, SPLITS)
    U_s, U_t = _load_parts(partials_ptr, 6, row, rows, SPLITS), _load_parts(partials_ptr, 7, row, rows, SPLITS)
    h_s, h_t = _load_parts(partials_ptr, 8, row, rows, SPLITS), _load_parts(partials_ptr, 9, row, rows, SPLITS)
    sums = merge_pairs(
        m_s,
        Z_s,
        m_t,
        Z_t,
        a,
        b,
        U_s,
        U_t,
        h_s,
        h_t,
        temperature,
        DIVERGENCE,
        HAS_TARGETS or METRICS,
        METRICS,
        POWER,
    )
    column_s = _load_parts(partials_ptr, 10, row, rows, SPLITS)
    column_t = _load_parts(partials_ptr, 11, row, rows, SPLITS)
    column_s = tl.min(tl.where(m_s == sums[0], column_s, float("inf")), 0)
    column_t = tl.min(tl.where(m_t == sums[2], column_t, float("inf")), 0)
    m, U = _load_parts(partials_ptr, 12, row, rows, SPLITS), _load_parts(partials_ptr, 13, row, rows, SPLITS)
    return sums + (column_s, column_t) + merge_student(m, U, temperature)


@triton.jit(do_not_specialize=_SIZES + _PLACES[:6])
def _softmax_kl_jsd_kernel(
    student_ptr,
    teacher_ptr,
    weights_ptr,
    scalars_ptr,
    partials_ptr,
    jsd_ptr,
    rows,
    positions,
    shared_vocab,
    student_start,
    stride_sb,
    stride_ss,
    teacher_start,
    stride_tb,
    stride_ts,
    ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The two sums of the Jensen-Shannon divergence over one part of a row, [2, rows, SPLITS]."""
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    if tl.load(weights_ptr + row) != 0:
        s_row, t_row, lead = _row_pointers(
            row,
            positions,
            student_ptr,
            student_start,
            stride_sb,
            stride_ss,
            teacher_ptr,
            teacher_start,
            stride_tb,
            stride_ts,
            True,
            ALIGNED,
            VEC,
        )
        temperature, beta = tl.load(scalars_ptr), tl.load(scalars_ptr + 3)
        m_s, Z_s = _load_parts(partials_ptr, 0, row, rows, SPLITS), _load_parts(partials_ptr, 1, row, rows, SPLITS)
        m_t, Z_t = _load_parts(partials_ptr, 2, row, rows, SPLITS), _load_parts(partials_ptr, 3, row, rows, SPLITS)
        m_s, Z_s = merge_student(m_s, Z_s, 1)
        m_t, Z_t = merge_student(m_t, Z_t, 1)
        student, teacher = _jsd_sums(
            s_row,
            t_row,
            lead,
            lead + shared_vocab,
            split,
            m_s,
            Z_s,
            m_t,
            Z_t,
            LOG2E / temperature,
            beta,
            SPLITS,
            NT,
            VEC,
            COMPUTE,
        )
        tl.store(jsd_ptr + row * SPLITS + split, student)
        tl.store(jsd_ptr + (rows + row) * SPLITS + split, teacher)


@triton.jit(do_not_specialize=_SIZES[:2] + _PLACES[:3])
def _softmax_kl_combine_kernel(
    student_ptr,
    targets_ptr,
    weights_ptr,
    scalars_ptr,
    values_ptr,
    saved_ptr,
    partials_ptr,
    jsd_ptr,
    rows,
    positions,
    student_start,
    stride_sb,
    stride_ss,
    DIVERGENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    METRICS: tl.constexpr,
    POWER: tl.constexpr,
    SPLITS: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Values and saved numbers of a row from the sums of its parts."""
    row = tl.program_id(0)
    weight = tl.load(weights_ptr + row)
    if weight != 0:
        s_row, _, lead = _row_pointers(
            row, positions, student_ptr, student_start, stride_sb, stride_ss, student_ptr, 0, 0, 0, False, True, VEC
        )
        sums = _merge_parts(
            partials_ptr, row, rows, tl.load(scalars_ptr), DIVERGENCE, HAS_TARGETS, METRICS, POWER, SPLITS
        )
        if DIVERGENCE == "jsd":
            student = tl.sum(_load_parts(jsd_ptr, 0, row, rows, SPLITS), 0)
            teacher = tl.sum(_load_parts(jsd_ptr, 1, row, rows, SPLITS), 0)
            sums = sums[:4] + (student, teacher) + sums[6:]
        _finish(
            row,
            rows,
            weight,
            s_row,
            lead,
            targets_ptr,
            scalars_ptr,
            values_ptr,
            saved_ptr,
            sums,
            DIVERGENCE,
            HAS_TARGETS,
            METRICS,
            COMPUTE,
        )
    else:
        _finish_uncounted(row, rows, values_ptr, saved_ptr)


@triton.jit(do_not_specialize=_SIZES + _PLACES)
def _softmax_kl_grad_kernel(
    dloss_ptr,
    student_ptr,
    teacher_ptr,
    targets_ptr,
    weights_ptr,
    scalars_ptr,
    saved_ptr,
    grad_ptr,
    rows,
    positions,
    vocab,
    shared_vocab,
    student_start,
    stride_sb,
    stride_ss,
    teacher_start,
    stride_tb,
    stride_ts,
    grad_start,
    stride_gb,
    stride_gs,
    DIVERGENCE: tl.constexpr,
    CE: tl.constexpr,
    POWER: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The gradient in a row, or in one of its SPLITS parts, times the row's weight and incoming gradient."""
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    s_row, t_row, lead = _row_pointers(
        row,
        positions,
        student_ptr,
        student_start,
        stride_sb,
        stride_ss,
        teacher_ptr,
        teacher_start,
        stride_tb,
        stride_ts,
        DIVERGENCE != "none",
        ALIGNED,
        VEC,
    )
    g_row = _grad_row(row, positions, lead, grad_ptr, grad_start, stride_gb, stride_gs, GRAD_ALIGNED, VEC)
    # In the compute dtype before the cast: 1 / num_tokens in float16 would flush most of the gradient to zero.
    c = tl.load(weights_ptr + row) * tl.load(dloss_ptr + row)
    saved_ptr += row
    saved = (
        tl.load(saved_ptr),
        tl.load(saved_ptr + rows),
        tl.load(saved_ptr + 2 * rows),
        tl.load(saved_ptr + 3 * rows),
        tl.load(saved_ptr + 4 * rows),
        tl.load(saved_ptr + 5 * rows),
        tl.load(saved_ptr + 6 * rows),
    )
    _row_gradient(
        s_row,
        t_row,
        g_row,
        lead,
        vocab,
        shared_vocab,
        split,
        c,
        targets_ptr + row,
        scalars_ptr,
        saved,
        DIVERGENCE,
        CE,
        POWER,
        TAIL,
        False,
        SPLITS,
        NT,
        VEC,
        COMPUTE,
    )


@triton.jit(do_not_specialize=_SIZES + _PLACES)
def _softmax_kl_one_launch_kernel(
    dloss_ptr,
    student_ptr,
    teacher_ptr,
    targets_ptr,
    weights_ptr,
    scalars_ptr,
    values_ptr,
    saved_ptr,
    grad_ptr,
    rows,
    positions,
    vocab,
    shared_vocab,
    student_start,
    stride_sb,
    stride_ss,
    teacher_start,
    stride_tb,
    stride_ts,
    grad_start,
    stride_gb,
    stride_gs,
    DIVERGENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    METRICS: tl.constexpr,
    KL: tl.constexpr,
    CE: tl.constexpr,
    POWER: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    NT: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Statistics and gradient of a row, its incoming gradient known beforehand."""
    row = tl.program_id(0)
    weight = tl.load(weights_ptr + row)
    s_row, t_row, lead = _row_pointers(
        row,
        positions,
        student_ptr,
        student_start,
        stride_sb,
        stride_ss,
        teacher_ptr,
        teacher_start,
        stride_tb,
        stride_ts,
        DIVERGENCE != "none",
        ALIGNED,
        VEC,
    )
    g_row = _grad_row(row, positions, lead, grad_ptr, grad_start, stride_gb, stride_gs, GRAD_ALIGNED, VEC)
    if weight != 0:
        saved = _whole_row(
            row,
            rows,
            weight,
            s_row,
            t_row,
            lead,
            targets_ptr,
            scalars_ptr,
            values_ptr,
            saved_ptr,
            vocab,
            shared_vocab,
            DIVERGENCE,
            HAS_TARGETS,
            METRICS,
            POWER,
            TAIL,
            NT,
            VEC,
            COMPUTE,
        )
        # From the row's end: what was read last is likeliest still in the cache.
        _row_gradient(
            s_row,
            t_row,
            g_row,
            lead,
            vocab,
            shared_vocab,
            0,
            weight * tl.load(dloss_ptr + row),
            targets_ptr + row,
            scalars_ptr,
            saved,
            DIVERGENCE if KL else "none",
            CE,
            POWER,
            TAIL,
            True,
            1,
            NT,
            VEC,
            COMPUTE,
        )
    else:
        _finish_uncounted(row, rows, values_ptr, saved_ptr)
        _store_zeros(g_row, lead, lead + vocab, 0, 1, NT, VEC, COMPUTE)


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
            "POWER": power,
            "TAIL": teacher is not None and shared_vocab < vocab,
            "ALIGNED": student_rows.aligned_with(teacher_rows, vec),
            "VEC": vec,
            "COMPUTE": tl.float64 if student.dtype == torch.float64 else tl.float32,
        }
        rows = weights.numel()
        return _Call(
            student_rows,
            teacher_rows,
            rows,
            (rows, weights.shape[-1], vocab, shared_vocab),
            (*student_rows[1:], *teacher_rows[1:]),
            form,
            vocab * student.itemsize,
        )


def softmax_kl_stats(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weights: Tensor,
    scalars: Tensor,
    *,
    divergence: str,
    shared_vocab: int,
    metrics: bool,
    power: int,
) -> tuple[Tensor, Tensor]:
    """Values `[VALUES, N]` and saved numbers `[SAVED, N]` of the N tokens of `weights`, `[B, S]` or `[N]`.

    Logits are `[B, >= S, V]` or `[N, V]` with unit stride over V; `targets` (within the vocabulary, or of weight 0)
    and `weights` are contiguous. `scalars` holds the temperature, the weight of the divergence with its T^2, that of
    the cross-entropy, and beta. `power` is the temperature where it is known and 1, 2 or 4, otherwise 0; without a
    teacher the temperature must be 1.
    """
    call = _Call.of(student, teacher, weights, shared_vocab, power)
    rows = call.rows
    values, saved = weights.new_empty(VALUES, rows), weights.new_empty(SAVED, rows)
    if rows == 0:
        return values, saved
    plan = row_plan(rows, call.row_bytes)
    splits, launch = plan.splits, {"num_warps": plan.warps, "enable_fp_fusion": True}
    form = {"DIVERGENCE": "none" if teacher is None else divergence, "HAS_TARGETS": targets is not None}
    form |= {"METRICS": metrics and teacher is not None, "SPLITS": splits}
    targets = weights if targets is None else targets
    partials = weights.new_empty(PARTIALS, rows, splits) if splits > 1 else values
    _softmax_kl_stats_kernel[(rows * splits,)](
        call.student.base,
        call.teacher.base,
        targets,
        weights,
        scalars,
        values,
        saved,
        partials,
        *call.sizes,
        *call.places,
        **form,
        **call.form,
        NT=plan.lanes,
        **launch,
    )
    if splits > 1:
        jsd = values
        vec, compute = call.form["VEC"], call.form["COMPUTE"]
        if form["DIVERGENCE"] == "jsd":
            jsd = weights.new_empty(2, rows, splits)
            _softmax_kl_jsd_kernel[(rows * splits,)](
                call.student.base,
                call.teacher.base,
                weights,
                scalars,
                partials,
                jsd,
                rows,
                weights.shape[-1],
                shared_vocab,
                *call.places,
                ALIGNED=call.form["ALIGNED"],
                SPLITS=splits,
                NT=plan.lanes,
                VEC=vec,
                COMPUTE=compute,
                **launch,
            )
        _softmax_kl_combine_kernel[(rows,)](
            call.student.base,
            targets,
            weights,
            scalars,
            values,
            saved,
            partials,
            jsd,
            rows,
            weights.shape[-1],
            *call.places[:3],
            **form,
            POWER=call.form["POWER"],
            VEC=vec,
            COMPUTE=compute,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return values, saved


def softmax_kl_grad(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weights: Tensor,
    scalars: Tensor,
    saved: Tensor,
    grad: Tensor,
    *,
    divergence: str,
    shared_vocab: int,
    power: int,
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
        dloss,
        call.student.base,
        call.teacher.base,
        weights if targets is None else targets,
        weights,
        scalars,
        saved,
        grad_rows.base,
        *call.sizes,
        *call.places,
        *grad_rows[1:],
        DIVERGENCE="none" if teacher is None else divergence,
        CE=targets is not None,
        **call.form,
        GRAD_ALIGNED=grad_rows.aligned_with(call.student, call.form["VEC"]),
        SPLITS=plan.splits,
        NT=plan.lanes,
        num_warps=plan.warps,
        enable_fp_fusion=True,
    )


def softmax_kl_one_launch(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weights: Tensor,
    scalars: Tensor,
    grad: Tensor,
    *,
    divergence: str,
    shared_vocab: int,
    metrics: bool,
    power: int,
    kl_in_loss: bool,
    ce_in_loss: bool,
) -> tuple[Tensor, Tensor]:
    """`softmax_kl_stats` and `softmax_kl_grad` row by row in one launch, where `dloss` is known forward."""
    call = _Call.of(student, teacher, weights, shared_vocab, power)
    rows = call.rows
    values, saved = weights.new_empty(VALUES, rows), weights.new_empty(SAVED, rows)
    if rows == 0:
        return values, saved
    grad_rows = _Rows.of(grad)
    plan = row_plan(rows, call.row_bytes, reads_twice=True)
    _softmax_kl_one_launch_kernel[(rows,)](
        dloss,
        call.student.base,
        call.teacher.base,
        weights if targets is None else targets,
        weights,
        scalars,
        values,
        saved,
        grad_rows.base,
        *call.sizes,
        *call.places,
        *grad_rows[1:],
        DIVERGENCE="none" if teacher is None else divergence,
        HAS_TARGETS=targets is not None,
        METRICS=metrics and teacher is not None,
        KL=kl_in_loss and teacher is not None,
        CE=ce_in_loss and targets is not None,
        **call.form,
        GRAD_ALIGNED=grad_rows.aligned_with(call.student, call.form["VEC"]),
        NT=plan.lanes,
        num_warps=plan.warps,
        enable_fp_fusion=True,
    )
    return values, saved


# Compile cases --------------------------------------------------------------------------------------------------------


def _launch_on_meta(
    dtype: torch.dtype,
    divergence: str | None,
    *,
    targets: bool,
    metrics: bool,
    power: int,
    rows: int,
    vocab: int,
    shared_vocab: int,
    one_launch: bool,
) -> None:
    student = torch.empty(rows, vocab, dtype=dtype, device="meta")
    teacher = None if divergence is None else torch.empty(rows, shared_vocab, dtype=dtype, device="meta")
    labels = torch.empty(rows, dtype=torch.int64, device="meta") if targets else None
    weights, scalars = torch.empty(rows, device="meta"), torch.empty(4, device="meta")
    form = {"divergence": divergence or "forward_kl", "shared_vocab": shared_vocab, "power": power}
    if one_launch:
        softmax_kl_one_launch(
            weights,
            student,
            teacher,
            labels,
            weights,
            scalars,
            student,
            **form,
            metrics=metrics,
            kl_in_loss=True,
            ce_in_loss=True,
        )
    else:
        _, saved = softmax_kl_stats(student, teacher, labels, weights, scalars, **form, metrics=metrics)
        softmax_kl_grad(weights, student, teacher, labels, weights, scalars, saved, student, **form)


def _case(
    name: str,
    divergence: str | None,
    *,
    targets: bool = False,
    metrics: bool = False,
    power: int = 1,
    rows: int = 8192,
    vocab: int = 50257,
    shared_vocab: int = 50257,
    one_launch: bool = False,
    budget: dict[str, float] | None = None,
) -> CompileCase:
    launch = partial(
        _launch_on_meta,
        divergence=divergence,
        targets=targets,
        metrics=metrics,
        power=power,
        rows=rows,
        vocab=vocab,
        shared_vocab=shared_vocab,
        one_launch=one_launch,
    )
    return CompileCase(name, launch, streams=1 if divergence is None else 2, budget=budget or {})


def _budget(stats: float, grad: float) -> dict[str, float]:
    return {"_softmax_kl_stats_kernel": stats, "_softmax_kl_grad_kernel": grad}


# Instructions a pair on any architecture in any dtype; bfloat16 before sm_80, where the cast is emulated, costs most.
COMPILE_CASES = [
    _case("forward_kl", "forward_kl", budget=_budget(18, 16)),
    _case("forward_kl + ce", "forward_kl", targets=True, budget=_budget(18, 16)),
    _case("forward_kl + ce, T = 2", "forward_kl", targets=True, power=2, budget=_budget(20, 19)),
    _case("forward_kl + ce, any T", "forward_kl", targets=True, power=0, budget=_budget(23, 21)),
    _case("forward_kl + ce + metrics", "forward_kl", targets=True, metrics=True, budget=_budget(25, 16)),
    _case(
        "forward_kl + ce + metrics, any T", "forward_kl", targets=True, metrics=True, power=0, budget=_budget(33, 21)
    ),
    _case("reverse_kl", "reverse_kl", budget=_budget(18, 22)),
    _case("reverse_kl + ce, any T", "reverse_kl", targets=True, power=0, budget=_budget(23, 25)),
    _case("jsd", "jsd", budget=_budget(100, 90)),
    _case("jsd + ce + metrics, any T", "jsd", targets=True, metrics=True, power=0),
    _case("ce", None, targets=True),
    _case("forward_kl + ce, student padded", "forward_kl", targets=True, vocab=50304),
    _case("forward_kl + ce + metrics, few rows", "forward_kl", targets=True, metrics=True, rows=4),
    _case("jsd, few rows", "jsd", rows=4),
    _case("forward_kl + ce, one launch", "forward_kl", targets=True, one_launch=True),
    _case("jsd + ce + metrics, any T, one launch", "jsd", targets=True, metrics=True, power=0, one_launch=True),
]
