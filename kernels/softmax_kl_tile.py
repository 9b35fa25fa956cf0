"""The arithmetic of softmax_kl on one tile of student and teacher logits: what is summed, and the gradient.

With k = log2(e) / T and m the largest k z seen so far, y = k z - m, so that exp((z - max) / T) = 2^y. A lane, and then
a row, keeps of student and teacher (s, t), by name:

    m           the largest k z, which all else is relative to
    Z           sum 2^y, over the ids that both models share
    a           sum 2^y_t (y_t - y_s), for the reverse divergence sum 2^y_s (y_s - y_t)
    b           the mass of the ids that a leaves out, because the other side has them at -inf
    U, h        sum u and sum u y with u = 2^(T y), the exponential at T = 1
    peak, tile  the largest logit as it stands, and the column where the tile begins that it came from first

so that with ln 2 = 1 / log2(e)

    forward_kl = ln 2 a / Z_t + log(Z_s / Z_t),    entropy = log U - T ln 2 h / U.
"""

# Arguments stand in rows: one a line, they would be most of the file.
# fmt: off
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

from .online_softmax import LN2, LOG2E, LOWEST, scaled

MAX_LOG_RATIO = tl.constexpr(80.0)
"""log p_s - log p_t where the teacher has no mass, as in reference.py."""


@triton.jit
def at_temperature_1(e, y, temperature, POWER: tl.constexpr):
    """2^(T y) from e = 2^y: a power of it where T is 1, 2 or 4 (POWER), else (0) an exponential of its own."""
    if POWER == 1:
        return e
    elif POWER == 2:
        return e * e
    elif POWER == 4:
        e = e * e
        return e * e
    else:
        return tl.exp2(y * temperature)


@triton.jit
def add_pairs(
    sums, s, t, begin, k, temperature, DIVERGENCE: tl.constexpr, NEEDS_1: tl.constexpr, METRICS: tl.constexpr,
    POWER: tl.constexpr, MASKED: tl.constexpr,
):
    """Each lane's `sums` with a tile of logits [NT, VEC] that begins at column `begin`; masked elements are -inf.

    Rows that hold -inf elsewhere come out with a or h infinite or NaN: `add_careful` is for them.
    """
    m_s, Z_s, m_t, Z_t, a, U_s, U_t, h_s, h_t, peak_s, peak_t, tile_s, tile_t = sums
    top_s, top_t = tl.max(s, 1), tl.max(t, 1)
    if METRICS:
        tile_s = tl.where((top_s > peak_s) | ((top_s == peak_s) & (tile_s < 0)), begin, tile_s)
        tile_t = tl.where((top_t > peak_t) | ((top_t == peak_t) & (tile_t < 0)), begin, tile_t)
        peak_s, peak_t = tl.maximum(peak_s, top_s), tl.maximum(peak_t, top_t)
    new_s, new_t = tl.maximum(m_s, top_s * k), tl.maximum(m_t, top_t * k)
    fall_s, fall_t = m_s - new_s, m_t - new_t
    c_s, c_t = tl.exp2(fall_s), tl.exp2(fall_t)
    y_s, y_t = scaled(s, k, new_s[:, None]), scaled(t, k, new_t[:, None])
    e_s, e_t = tl.exp2(y_s), tl.exp2(y_t)
    if DIVERGENCE == "forward_kl":
        term = e_t * (y_t - y_s)
        if MASKED:
            term = tl.where(e_t == 0, 0.0, term)
        a = c_t * (a + Z_t * (fall_t - fall_s)) + tl.sum(term, 1)
    elif DIVERGENCE == "reverse_kl":
        term = e_s * (y_s - y_t)
        if MASKED:
            term = tl.where(e_s == 0, 0.0, term)
        a = c_s * (a + Z_s * (fall_s - fall_t)) + tl.sum(term, 1)
    if NEEDS_1:
        u_s, r_s = at_temperature_1(e_s, y_s, temperature, POWER), at_temperature_1(c_s, fall_s, temperature, POWER)
        if METRICS:
            u_t, r_t = at_temperature_1(e_t, y_t, temperature, POWER), at_temperature_1(c_t, fall_t, temperature, POWER)
            term_s, term_t = u_s * y_s, u_t * y_t
            if MASKED:
                term_s, term_t = tl.where(u_s == 0, 0.0, term_s), tl.where(u_t == 0, 0.0, term_t)
            h_s = r_s * (h_s + U_s * fall_s) + tl.sum(term_s, 1)
            h_t = r_t * (h_t + U_t * fall_t) + tl.sum(term_t, 1)
            U_t = U_t * r_t + tl.sum(u_t, 1)
        U_s = U_s * r_s + tl.sum(u_s, 1)
    Z_s = Z_s * c_s + tl.sum(e_s, 1)
    Z_t = Z_t * c_t + tl.sum(e_t, 1)
    return new_s, Z_s, new_t, Z_t, a, U_s, U_t, h_s, h_t, peak_s, peak_t, tile_s, tile_t


@triton.jit
def add_careful(
    sums, s, t, m_s, m_t, k, temperature, DIVERGENCE: tl.constexpr, METRICS: tl.constexpr, POWER: tl.constexpr,
):
    """Each lane's a, b, h_s and h_t with a tile of a row whose maxima are known and which may hold -inf."""
    a, b, h_s, h_t = sums
    y_s, y_t = scaled(s, k, m_s), scaled(t, k, m_t)
    e_s, e_t = tl.exp2(y_s), tl.exp2(y_t)
    if DIVERGENCE == "forward_kl":
        absent = y_s == float("-inf")
        a += tl.sum(tl.where(absent | (e_t == 0), 0.0, e_t * (y_t - y_s)), 1)
        b += tl.sum(tl.where(absent, e_t, 0.0), 1)
    elif DIVERGENCE == "reverse_kl":
        absent = y_t == float("-inf")
        a += tl.sum(tl.where(absent | (e_s == 0), 0.0, e_s * (y_s - y_t)), 1)
        b += tl.sum(tl.where(absent, e_s, 0.0), 1)
    if METRICS:
        u_s, u_t = at_temperature_1(e_s, y_s, temperature, POWER), at_temperature_1(e_t, y_t, temperature, POWER)
        h_s += tl.sum(tl.where(u_s == 0, 0.0, u_s * y_s), 1)
        h_t += tl.sum(tl.where(u_t == 0, 0.0, u_t * y_t), 1)
    return a, b, h_s, h_t


@triton.jit
def merge_pairs(
    m_s, Z_s, m_t, Z_t, a, b, U_s, U_t, h_s, h_t, temperature, DIVERGENCE: tl.constexpr, NEEDS_1: tl.constexpr,
    METRICS: tl.constexpr, POWER: tl.constexpr,
):
    """The sums of lanes, or of the parts of a row, [n], as those of all; 0 for those that are not kept."""
    top_s, top_t = tl.max(m_s, 0), tl.max(m_t, 0)
    fall_s, fall_t = m_s - top_s, m_t - top_t
    c_s, c_t = tl.exp2(fall_s), tl.exp2(fall_t)
    # Where one side has no logit above -inf, a has no term to shift, and the fall is no number to shift by.
    shift = tl.where((m_s == LOWEST) | (m_t == LOWEST), 0.0, fall_t - fall_s)
    none = tl.full((), 0.0, top_s.dtype)
    sum_a, sum_b, sum_U_s, sum_U_t, sum_h_s, sum_h_t = none, none, none, none, none, none
    if DIVERGENCE == "forward_kl":
        sum_a = tl.sum(c_t * (a + (Z_t - b) * shift), 0)
        sum_b = tl.sum(c_t * b, 0)
    elif DIVERGENCE == "reverse_kl":
        sum_a = tl.sum(c_s * (a - (Z_s - b) * shift), 0)
        sum_b = tl.sum(c_s * b, 0)
    if NEEDS_1:
        r_s = at_temperature_1(c_s, fall_s, temperature, POWER)
        sum_U_s = tl.sum(r_s * U_s, 0)
        if METRICS:
            r_t = at_temperature_1(c_t, fall_t, temperature, POWER)
            sum_U_t = tl.sum(r_t * U_t, 0)
            sum_h_s = tl.sum(r_s * (h_s + U_s * fall_s), 0)
            sum_h_t = tl.sum(r_t * (h_t + U_t * fall_t), 0)
    Z_s, Z_t = tl.sum(Z_s * c_s, 0), tl.sum(Z_t * c_t, 0)
    return top_s, Z_s, top_t, Z_t, sum_a, sum_b, sum_U_s, sum_U_t, sum_h_s, sum_h_t


@triton.jit
def add_student(m, U, s, k, temperature, POWER: tl.constexpr):
    """Each lane's m and U with a tile of student logits."""
    new = tl.maximum(m, tl.max(s, 1) * k)
    y = scaled(s, k, new[:, None])
    fall = m - new
    r = at_temperature_1(tl.exp2(fall), fall, temperature, POWER)
    return new, U * r + tl.sum(at_temperature_1(tl.exp2(y), y, temperature, POWER), 1)


@triton.jit
def merge_student(m, U, temperature):
    """m and U of lanes, or of the parts of a row, [n], as those of all."""
    top = tl.max(m, 0)
    return top, tl.sum(U * tl.exp2((m - top) * temperature), 0)


@triton.jit
def jsd_terms(s, t, m_s, m_t, k, log_z, beta):
    """Each lane's sum of 2^y_s log(p_s / m) and of 2^y_t log(p_t / m) over a tile, m = beta p_t + (1 - beta) p_s."""
    y_s, y_t = scaled(s, k, m_s), scaled(t, k, m_t)
    r_s, r_t = _log_ratios_to_mixture(y_s, y_t, log_z, beta)
    return tl.sum(tl.exp2(y_s) * r_s, 1), tl.sum(tl.exp2(y_t) * r_t, 1)


@triton.jit
def gradient(
    s, t, m_s, m_t, k, temperature, log_z, mean, beta, A_s, A_t, A_1, DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    POWER: tl.constexpr,
):
    """The gradient at logits s and t, but for the target's -1 in the cross-entropy's.

    A_s = c / Z_s and A_t = c / Z_t turn 2^y into c p for the divergence, A_1 2^(T y) into c p for the cross-entropy;
    log_z is log(Z_s / Z_t) and `mean` the divergence's mean of what p_s is multiplied by.
    """
    y_s, y_t = scaled(s, k, m_s), scaled(t, k, m_t)
    e_s = tl.exp2(y_s)
    if DIVERGENCE == "forward_kl":
        factor = A_s
    elif DIVERGENCE == "reverse_kl":
        log_ratio = tl.where(y_t == float("-inf"), MAX_LOG_RATIO, (y_s - y_t) * LN2 - log_z)
        factor = A_s * tl.maximum(log_ratio - mean, LOWEST)  # a number to multiply e_s = 0 by where s is -inf
    else:
        factor = A_s * (_log_ratios_to_mixture(y_s, y_t, log_z, beta)[0] - mean)
    if CE and POWER == 1:
        factor += A_1
    g = e_s * factor
    if DIVERGENCE == "forward_kl":
        g -= tl.exp2(y_t) * A_t
    if CE and POWER != 1:
        g += at_temperature_1(e_s, y_s, temperature, POWER) * A_1
    return g


@triton.jit
def _log_ratios_to_mixture(y_s, y_t, log_z, beta):
    """r = log(p_s / m) = -log1p(beta expm1(d)) and log(p_t / m) = r + d, where d = log p_t - log p_s."""
    d = (y_t - y_s) * LN2 + log_z
    d = tl.where(d == d, tl.minimum(tl.maximum(d, -MAX_LOG_RATIO), MAX_LOG_RATIO), 0.0)  # NaN: absent on both sides
    r = -_log1p(beta * _expm1(d))
    return r, r + d


@triton.jit
def _expm1(d):
    """exp(d) - 1; by its series where the difference would lose digits that float32 has."""
    far = tl.exp2(d * LOG2E) - 1.0
    if d.dtype == tl.float64:
        return far
    near = d * (1 + d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040)))))))
    return tl.where(tl.abs(d) < 0.5, near, far)


@triton.jit
def _log1p(y):
    """log(1 + y), y > -1; as 2 artanh(y / (2 + y)) near 0, where the hardware's logarithm has but 22 absolute bits."""
    w = 1.0 + y
    if y.dtype == tl.float64:
        return tl.where(w == 1.0, y, tl.log2(w) * LN2 * (y / tl.where(w == 1.0, 1.0, w - 1.0)))
    z = y / (2.0 + y)
    q = z * z
    near = 2 * z * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
    return tl.where((y > -0.5) & (y < 1.0), near, tl.log2(w) * LN2)
