"""A row of softmax_kl, or one of SPLITS parts of it, as one program goes along it: its sums, its values, its gradient.

softmax_kl_tile.py has the arithmetic of a tile and the names of the sums, online_softmax.py the counting of columns.
"""

# Arguments stand in rows: one a line, they would be most of the file.
# fmt: off
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

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

VALUES = tl.constexpr(6)
"""loss, kl, ce, student entropy, teacher entropy, top-1 agreement: a row's terms times its weight."""

SAVED = tl.constexpr(7)
"""m_s, Z_s, m_t, Z_t; m and U of the whole student row; the mean in the gradient. See softmax_kl_tile.py."""

PARTIALS = tl.constexpr(14)
"""What a part of a row leaves for the merging: the sums of `_pair_sums`, and m and U of the ids beyond."""


# A range of columns ---------------------------------------------------------------------------------------------------


@triton.jit
def _pair_sums(
    s_row, t_row, begin, end, split, k, temperature, DIVERGENCE: tl.constexpr, NEEDS_1: tl.constexpr,
    METRICS: tl.constexpr, POWER: tl.constexpr, SPLITS: tl.constexpr, NT: tl.constexpr, VEC: tl.constexpr,
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
        m_s, Z_s, m_t, Z_t, a, zero, U_s, U_t, h_s, h_t, temperature, DIVERGENCE, NEEDS_1, METRICS, POWER,
    )
    if DIVERGENCE != "jsd" or METRICS:
        total = a + h_s + h_t
        if total - total != 0:  # inf or NaN: logits of -inf, on one side or on both
            a, b, h_s, h_t = _careful_sums(
                s_row, t_row, begin, end, split, m_s, m_t, k, temperature, DIVERGENCE, METRICS, POWER, SPLITS, NT, VEC,
                COMPUTE,
            )
    column_s, column_t = 0, 0
    if METRICS:
        column_s = first_column_of(peak_s, tile_s, s_row, ragged, is_ragged, last, NT, VEC, COMPUTE)
        column_t = first_column_of(peak_t, tile_t, t_row, ragged, is_ragged, last, NT, VEC, COMPUTE)
    return m_s, Z_s, m_t, Z_t, a, b, U_s, U_t, h_s, h_t, column_s, column_t


@triton.jit
def _careful_sums(
    s_row, t_row, begin, end, split, m_s, m_t, k, temperature, DIVERGENCE: tl.constexpr, METRICS: tl.constexpr,
    POWER: tl.constexpr, SPLITS: tl.constexpr, NT: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
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
def jsd_sums(
    s_row, t_row, begin, end, split, m_s, Z_s, m_t, Z_t, k, beta, SPLITS: tl.constexpr, NT: tl.constexpr,
    VEC: tl.constexpr, COMPUTE: tl.constexpr,
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
    s_row, begin, end, split, k, temperature, POWER: tl.constexpr, SPLITS: tl.constexpr, NT: tl.constexpr,
    VEC: tl.constexpr, COMPUTE: tl.constexpr,
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
    s_row, t_row, g_row, begin, end, split, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t, A_1,
    DIVERGENCE: tl.constexpr, CE: tl.constexpr, POWER: tl.constexpr, DESCENDING: tl.constexpr, SPLITS: tl.constexpr,
    NT: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
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
            next_s, next_t, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t, A_1, DIVERGENCE, CE, POWER,
        )
        tl.store(g_row + i + tile, g.to(g_row.dtype.element_ty))
        tl.store(g_row + j + tile, next_g.to(g_row.dtype.element_ty))
    ragged, is_ragged = ragged_columns(begin, end, split, NT, VEC)
    s, t = load_columns(s_row, ragged, is_ragged, COMPUTE), load_columns(t_row, ragged, is_ragged, COMPUTE)
    g = gradient(s, t, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t, A_1, DIVERGENCE, CE, POWER)
    store_columns(g_row, ragged, is_ragged, g)


@triton.jit
def _store_student_gradient(
    s_row, g_row, begin, end, split, m, k, temperature, A, POWER: tl.constexpr, SPLITS: tl.constexpr, NT: tl.constexpr,
    VEC: tl.constexpr, COMPUTE: tl.constexpr,
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
def store_zeros(
    g_row, begin, end, split, SPLITS: tl.constexpr, NT: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
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
def row_pointers(
    row, positions, student_ptr, student_start, stride_sb, stride_ss, teacher_ptr, teacher_start, stride_tb, stride_ts,
    HAS_TEACHER: tl.constexpr, ALIGNED: tl.constexpr, VEC: tl.constexpr,
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
def grad_row(
    row, positions, lead, grad_ptr, grad_start, stride_gb, stride_gs, GRAD_ALIGNED: tl.constexpr, VEC: tl.constexpr,
):
    """Pointer to column 0 of the gradient's row, whose first element is in column `lead` as the student's is."""
    start = row_start(row, positions, grad_start, stride_gb, stride_gs)
    if GRAD_ALIGNED:
        return grad_ptr + start // VEC * VEC
    else:
        return grad_ptr + (start - lead)


@triton.jit
def row_sums(
    s_row, t_row, lead, vocab, shared_vocab, split, k, temperature, DIVERGENCE: tl.constexpr, HAS_TARGETS: tl.constexpr,
    METRICS: tl.constexpr, POWER: tl.constexpr, TAIL: tl.constexpr, SPLITS: tl.constexpr, NT: tl.constexpr,
    VEC: tl.constexpr, COMPUTE: tl.constexpr,
):
    """The `PARTIALS` sums of a part of a row: of the ids that both models share, and m and U of those beyond."""
    none = tl.full((), 0.0, COMPUTE)
    m, U = tl.full((), LOWEST, COMPUTE), none
    if DIVERGENCE == "none":
        m, U = _student_sums(s_row, lead, lead + vocab, split, k, temperature, POWER, SPLITS, NT, VEC, COMPUTE)
        return m, none, m, none, none, none, none, none, none, none, 0, 0, m, U
    else:
        sums = _pair_sums(
            s_row, t_row, lead, lead + shared_vocab, split, k, temperature, DIVERGENCE, HAS_TARGETS or METRICS, METRICS,
            POWER, SPLITS, NT, VEC, COMPUTE,
        )
        if HAS_TARGETS and TAIL:
            m, U = _student_sums(
                s_row, lead + shared_vocab, lead + vocab, split, k, temperature, POWER, SPLITS, NT, VEC, COMPUTE,
            )
        return sums + (m, U)


@triton.jit
def finish(
    row, rows, weights_ptr, s_row, lead, targets_ptr, scalars_ptr, values_ptr, saved_ptr, sums,
    DIVERGENCE: tl.constexpr,
    HAS_TARGETS: tl.constexpr, METRICS: tl.constexpr, COMPUTE: tl.constexpr,
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
    weight = tl.load(weights_ptr + row)
    values = (loss, kl, ce, entropy_s, entropy_t, agreement)
    for i in tl.static_range(VALUES):
        tl.store(values_ptr + i * rows + row, values[i] * weight)
    saved = (m_s, Z_s, m_t, Z_t, m, U, mean)
    for i in tl.static_range(SAVED):
        tl.store(saved_ptr + i * rows + row, saved[i])
    return saved


@triton.jit
def finish_uncounted(row, rows, values_ptr, saved_ptr):
    for i in tl.static_range(VALUES):
        tl.store(values_ptr + i * rows + row, 0.0)
    for i in tl.static_range(SAVED):
        tl.store(saved_ptr + i * rows + row, 0.0)


@triton.jit
def whole_row(
    row, rows, weights_ptr, s_row, t_row, lead, targets_ptr, scalars_ptr, values_ptr, saved_ptr, vocab, shared_vocab,
    DIVERGENCE: tl.constexpr, HAS_TARGETS: tl.constexpr, METRICS: tl.constexpr, POWER: tl.constexpr, TAIL: tl.constexpr,
    NT: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
):
    """Statistics of a row that one program has to itself, written and, as far as its gradient needs them, returned."""
    temperature, beta = tl.load(scalars_ptr), tl.load(scalars_ptr + 3)
    k = LOG2E / temperature
    sums = row_sums(
        s_row, t_row, lead, vocab, shared_vocab, 0, k, temperature, DIVERGENCE, HAS_TARGETS, METRICS, POWER, TAIL, 1,
        NT, VEC, COMPUTE,
    )
    if DIVERGENCE == "jsd":
        jsd = jsd_sums(
            s_row, t_row, lead, lead + shared_vocab, 0, sums[0], sums[1], sums[2], sums[3], k, beta, 1, NT, VEC,
            COMPUTE,
        )
        sums = sums[:4] + jsd + sums[6:]
    return finish(
        row, rows, weights_ptr, s_row, lead, targets_ptr, scalars_ptr, values_ptr, saved_ptr, sums, DIVERGENCE,
        HAS_TARGETS,
        METRICS, COMPUTE,
    )


@triton.jit
def row_gradient(
    s_row, t_row, g_row, lead, vocab, shared_vocab, split, c, target_ptr, scalars_ptr, saved, DIVERGENCE: tl.constexpr,
    CE: tl.constexpr, POWER: tl.constexpr, TAIL: tl.constexpr, DESCENDING: tl.constexpr, SPLITS: tl.constexpr,
    NT: tl.constexpr, VEC: tl.constexpr, COMPUTE: tl.constexpr,
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
        store_zeros(g_row, lead, end, split, SPLITS, NT, VEC, COMPUTE)
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
                    at_target, t, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t, A_1, DIVERGENCE, CE, POWER,
                )
                g_target = tl.where(is_shared, g, g_target)
                tl.debug_barrier()  # the row may be written in place: its target has been read by now
            _store_pair_gradient(
                s_row, t_row, g_row, lead, shared_end, split, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t,
                A_1, DIVERGENCE, CE, POWER, DESCENDING, SPLITS, NT, VEC, COMPUTE,
            )
            if TAIL and CE:
                _store_student_gradient(
                    s_row, g_row, shared_end, end, split, m, k, temperature, A, POWER, SPLITS, NT, VEC, COMPUTE,
                )
            elif TAIL:
                store_zeros(g_row, shared_end, end, split, SPLITS, NT, VEC, COMPUTE)
        else:
            tl.debug_barrier()
            _store_student_gradient(
                s_row, g_row, lead, end, split, m, k, temperature, A, POWER, SPLITS, NT, VEC, COMPUTE,
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
