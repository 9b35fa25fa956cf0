"""KL(teacher || student) between rows of attention, from queries and keys, in tiles that never leave the chip.

A query's row of scores is its products with the keys that it sees, times the model's scale. The forward pass goes over
both models' rows once, online (Milakov and Gimelshein 2018, arXiv:1805.02867; in tiles, Dao et al. 2022,
arXiv:2205.14135): with y = score - max, Z = sum e^y and a = sum e^(y_t) (y_t - y_s),

    KL = a / Z_t + log(Z_s / Z_t)

and keeps max and Z of both models, apart: 4 numbers a query and head. The gradient in the student's scores,
g = e^(y_s) / Z_s - e^(y_t) / Z_t, is made anew in tiles, and multiplied by keys for the queries' gradient, by queries
for the keys': a kernel each, none of which adds to what another program writes. Results repeat bit for bit.

Products of half precision are exact in tensor cores, which add them up in float32; g, at most 1, is rounded to the
keys' dtype for its product, and what may be tiny (1 / num_tokens, the incoming gradient) comes after it, in float32.
Elsewhere operands and products are float32.

Flops for each query and key that it sees: 2 d_s + 2 d_t forward and 8 d_s + 4 d_t backward, where each kernel makes
both scores anew and multiplies by the gradient. Bytes: the vectors are read once for each block of the other side;
nothing of size S^2 is stored.

The compiled code has been run by an interpreter of PTX on a CPU (sm_60), never yet on a GPU.
"""

# Arguments stand in rows: one a line, they would be most of the file.
# fmt: off
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .launch import attention_plan, on_its_device
from .online_softmax import LN2, LOG2E, LOWEST, scaled

# Tiles ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _tokens(weights_ptr, documents_ptr, places, positions, HAS_DOCUMENTS: tl.constexpr):
    """Weights of a row's tokens, 0 beyond its end, and their documents."""
    inside = places < positions
    weights = tl.load(weights_ptr + places, mask=inside, other=0.0)
    documents = places
    if HAS_DOCUMENTS:
        documents = tl.load(documents_ptr + places, mask=inside, other=0)
    return weights, documents


@triton.jit
def _visible(
    queries, keys, query_counts, key_counts, query_documents, key_documents, CAUSAL: tl.constexpr,
    ITSELF: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):
    """Whether a query sees a key; what is of queries stands along one axis, what is of keys along the other."""
    visible = query_counts & key_counts
    if CAUSAL:
        visible &= keys <= queries
    if not ITSELF:
        visible &= keys != queries
    if HAS_DOCUMENTS:
        visible &= query_documents == key_documents
    return visible


@triton.jit
def _vectors(ptr, stride, places, counts, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, OPERAND: tl.constexpr):
    """Vectors [places, BLOCK_D] as operands of a product; 0 beyond their width and where they do not count."""
    channels = tl.arange(0, BLOCK_D)
    mask = counts[:, None] & (channels < WIDTH)[None, :]
    return tl.load(ptr + places.to(tl.int64)[:, None] * stride + channels[None, :], mask=mask, other=0.0).to(OPERAND)


@triton.jit
def _products(rows, columns, COMPUTE: tl.constexpr):
    return tl.dot(rows, tl.trans(columns), input_precision="ieee", out_dtype=COMPUTE)


@triton.jit
def _of_head(ptr, head, heads, GROUP: tl.constexpr, stride_b, stride_h):
    """Where a head's vectors begin; `head` counts over the batch, and GROUP heads share theirs."""
    return ptr + (head // heads).to(tl.int64) * stride_b + (head % heads // GROUP).to(tl.int64) * stride_h


@triton.jit
def _last_key(last_query, positions, counts, CAUSAL: tl.constexpr):
    """Where the keys end that a block of queries sees; none if none of the queries counts."""
    end = positions
    if CAUSAL:
        end = tl.minimum(last_query, positions)
    return tl.where(tl.max(counts.to(tl.int32), 0) > 0, end, 0)


@triton.jit
def _gradient(z_s, z_t, k_s, k_t, statistics_ptr, saved, queries, counts, visible):
    """The gradient of each query's divergence in the student's scores, from its statistics.

    `queries` and `counts` stand along the scores' axis of queries.
    """
    m_s = tl.load(statistics_ptr + queries, mask=counts, other=0.0)
    Z_s = tl.load(statistics_ptr + saved + queries, mask=counts, other=1.0)
    m_t = tl.load(statistics_ptr + 2 * saved + queries, mask=counts, other=0.0)
    Z_t = tl.load(statistics_ptr + 3 * saved + queries, mask=counts, other=1.0)
    return tl.where(visible, tl.exp2(scaled(z_s, k_s, m_s)) / Z_s - tl.exp2(scaled(z_t, k_t, m_t)) / Z_t, 0.0)


# Kernels --------------------------------------------------------------------------------------------------------------

_SIZES = ["heads", "positions", "saved"]


@triton.jit(do_not_specialize=_SIZES)
def _attention_kl_stats_kernel(
    student_q_ptr, student_k_ptr, teacher_q_ptr, teacher_k_ptr, weights_ptr, documents_ptr, scalars_ptr, terms_ptr,
    statistics_ptr, heads, positions, saved, stride_sqb, stride_sqh, stride_sqs, stride_skb, stride_skh, stride_sks,
    stride_tqb, stride_tqh, stride_tqs, stride_tkb, stride_tkh, stride_tks, GROUP_S: tl.constexpr,
    GROUP_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, ITSELF: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, OPERAND_S: tl.constexpr, OPERAND_T: tl.constexpr, COMPUTE: tl.constexpr,
):
    """A block of queries of a head: their weighted divergences, and the statistics of their rows."""
    blocks = tl.cdiv(positions, QUERIES)
    head = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # those with the most keys begin first
    row = (head // heads).to(tl.int64) * positions
    weights_ptr, documents_ptr = weights_ptr + row, documents_ptr + row
    queries = first + tl.arange(0, QUERIES)
    weights, query_documents = _tokens(weights_ptr, documents_ptr, queries, positions, HAS_DOCUMENTS)
    counts = weights != 0
    student_q_ptr = _of_head(student_q_ptr, head, heads, 1, stride_sqb, stride_sqh)
    teacher_q_ptr = _of_head(teacher_q_ptr, head, heads, 1, stride_tqb, stride_tqh)
    student_k_ptr = _of_head(student_k_ptr, head, heads, GROUP_S, stride_skb, stride_skh)
    teacher_k_ptr = _of_head(teacher_k_ptr, head, heads, GROUP_T, stride_tkb, stride_tkh)
    q_s = _vectors(student_q_ptr, stride_sqs, queries, counts, WIDTH_S, BLOCK_S, OPERAND_S)
    q_t = _vectors(teacher_q_ptr, stride_tqs, queries, counts, WIDTH_T, BLOCK_T, OPERAND_T)
    k_s, k_t = tl.load(scalars_ptr) * LOG2E, tl.load(scalars_ptr + 1) * LOG2E
    m_s, m_t = tl.full([QUERIES], LOWEST, COMPUTE), tl.full([QUERIES], LOWEST, COMPUTE)
    Z_s, Z_t, a = tl.zeros([QUERIES], COMPUTE), tl.zeros([QUERIES], COMPUTE), tl.zeros([QUERIES], COMPUTE)
    end = _last_key(first + QUERIES, positions, counts, CAUSAL)
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_weights, key_documents = _tokens(weights_ptr, documents_ptr, keys, positions, HAS_DOCUMENTS)
        key_counts = key_weights != 0
        visible = _visible(
            queries[:, None], keys[None, :], counts[:, None], key_counts[None, :], query_documents[:, None],
            key_documents[None, :], CAUSAL, ITSELF, HAS_DOCUMENTS,
        )
        key_s = _vectors(student_k_ptr, stride_sks, keys, key_counts, WIDTH_S, BLOCK_S, OPERAND_S)
        key_t = _vectors(teacher_k_ptr, stride_tks, keys, key_counts, WIDTH_T, BLOCK_T, OPERAND_T)
        z_s, z_t = _products(q_s, key_s, COMPUTE), _products(q_t, key_t, COMPUTE)
        new_s = tl.maximum(m_s, tl.max(tl.where(visible, z_s * k_s, LOWEST), 1))
        new_t = tl.maximum(m_t, tl.max(tl.where(visible, z_t * k_t, LOWEST), 1))
        y_s, y_t = scaled(z_s, k_s, new_s[:, None]), scaled(z_t, k_t, new_t[:, None])
        e_t = tl.where(visible, tl.exp2(y_t), 0.0)
        shrink_s, shrink_t = tl.exp2(m_s - new_s), tl.exp2(m_t - new_t)
        moved = (a + Z_t * ((m_t - new_t) - (m_s - new_s))) * shrink_t
        a = moved + tl.sum(tl.where(visible, e_t * (y_t - y_s), 0.0), 1)
        Z_s = Z_s * shrink_s + tl.sum(tl.where(visible, tl.exp2(y_s), 0.0), 1)
        Z_t = Z_t * shrink_t + tl.sum(e_t, 1)
        m_s, m_t = new_s, new_t
    Z_s, Z_t = tl.where(Z_s > 0, Z_s, 1.0), tl.where(Z_t > 0, Z_t, 1.0)  # of a query that sees no key
    kl = a / Z_t * LN2 + tl.log2(Z_s / Z_t) * LN2
    place = head.to(tl.int64) * positions + queries
    inside = queries < positions
    tl.store(terms_ptr + place, tl.where(counts, weights * kl, 0.0), mask=inside)
    tl.store(statistics_ptr + place, m_s, mask=inside)
    tl.store(statistics_ptr + saved + place, Z_s, mask=inside)
    tl.store(statistics_ptr + 2 * saved + place, m_t, mask=inside)
    tl.store(statistics_ptr + 3 * saved + place, Z_t, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _attention_kl_query_grad_kernel(
    student_q_ptr, student_k_ptr, teacher_q_ptr, teacher_k_ptr, weights_ptr, documents_ptr, scalars_ptr, dtotal_ptr,
    statistics_ptr, grad_ptr, heads, positions, saved, stride_sqb, stride_sqh, stride_sqs, stride_skb, stride_skh,
    stride_sks, stride_tqb, stride_tqh, stride_tqs, stride_tkb, stride_tkh, stride_tks, GROUP_S: tl.constexpr,
    GROUP_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, ITSELF: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, OPERAND_S: tl.constexpr, OPERAND_T: tl.constexpr, COMPUTE: tl.constexpr,
):
    """The gradient in a block of queries of a head."""
    blocks = tl.cdiv(positions, QUERIES)
    head = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    row = (head // heads).to(tl.int64) * positions
    weights_ptr, documents_ptr = weights_ptr + row, documents_ptr + row
    statistics_ptr += head.to(tl.int64) * positions
    queries = first + tl.arange(0, QUERIES)
    weights, query_documents = _tokens(weights_ptr, documents_ptr, queries, positions, HAS_DOCUMENTS)
    counts = weights != 0
    student_q_ptr = _of_head(student_q_ptr, head, heads, 1, stride_sqb, stride_sqh)
    teacher_q_ptr = _of_head(teacher_q_ptr, head, heads, 1, stride_tqb, stride_tqh)
    student_k_ptr = _of_head(student_k_ptr, head, heads, GROUP_S, stride_skb, stride_skh)
    teacher_k_ptr = _of_head(teacher_k_ptr, head, heads, GROUP_T, stride_tkb, stride_tkh)
    q_s = _vectors(student_q_ptr, stride_sqs, queries, counts, WIDTH_S, BLOCK_S, OPERAND_S)
    q_t = _vectors(teacher_q_ptr, stride_tqs, queries, counts, WIDTH_T, BLOCK_T, OPERAND_T)
    scale = tl.load(scalars_ptr)
    k_s, k_t = scale * LOG2E, tl.load(scalars_ptr + 1) * LOG2E
    grad = tl.zeros([QUERIES, BLOCK_S], COMPUTE)
    end = _last_key(first + QUERIES, positions, counts, CAUSAL)
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_weights, key_documents = _tokens(weights_ptr, documents_ptr, keys, positions, HAS_DOCUMENTS)
        key_counts = key_weights != 0
        visible = _visible(
            queries[:, None], keys[None, :], counts[:, None], key_counts[None, :], query_documents[:, None],
            key_documents[None, :], CAUSAL, ITSELF, HAS_DOCUMENTS,
        )
        key_s = _vectors(student_k_ptr, stride_sks, keys, key_counts, WIDTH_S, BLOCK_S, OPERAND_S)
        key_t = _vectors(teacher_k_ptr, stride_tks, keys, key_counts, WIDTH_T, BLOCK_T, OPERAND_T)
        z_s, z_t = _products(q_s, key_s, COMPUTE), _products(q_t, key_t, COMPUTE)
        g = _gradient(z_s, z_t, k_s, k_t, statistics_ptr, saved, queries[:, None], counts[:, None], visible)
        grad = tl.dot(g.to(OPERAND_S), key_s, grad, input_precision="ieee", out_dtype=COMPUTE)
    grad *= (weights * scale * tl.load(dtotal_ptr))[:, None]
    channels = tl.arange(0, BLOCK_S)
    place = grad_ptr + (head.to(tl.int64) * positions + queries)[:, None] * WIDTH_S + channels[None, :]
    mask = (queries < positions)[:, None] & (channels < WIDTH_S)[None, :]
    tl.store(place, tl.where(counts[:, None], grad, 0.0).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _attention_kl_key_grad_kernel(
    student_q_ptr, student_k_ptr, teacher_q_ptr, teacher_k_ptr, weights_ptr, documents_ptr, scalars_ptr, dtotal_ptr,
    statistics_ptr, grad_ptr, heads, positions, saved, stride_sqb, stride_sqh, stride_sqs, stride_skb, stride_skh,
    stride_sks, stride_tqb, stride_tqh, stride_tqs, stride_tkb, stride_tkh, stride_tks, GROUP_S: tl.constexpr,
    GROUP_T: tl.constexpr, WIDTH_S: tl.constexpr, WIDTH_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, ITSELF: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, OPERAND_S: tl.constexpr, OPERAND_T: tl.constexpr, COMPUTE: tl.constexpr,
):
    """The gradient in a block of keys that GROUP_S heads share."""
    blocks = tl.cdiv(positions, KEYS)
    key_head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * KEYS
    row = (key_head * GROUP_S // heads).to(tl.int64) * positions
    weights_ptr, documents_ptr = weights_ptr + row, documents_ptr + row
    keys = first + tl.arange(0, KEYS)
    key_weights, key_documents = _tokens(weights_ptr, documents_ptr, keys, positions, HAS_DOCUMENTS)
    key_counts = key_weights != 0
    student_k_ptr = _of_head(student_k_ptr, key_head * GROUP_S, heads, GROUP_S, stride_skb, stride_skh)
    key_s = _vectors(student_k_ptr, stride_sks, keys, key_counts, WIDTH_S, BLOCK_S, OPERAND_S)
    # Weights beside the largest, which comes after the product: float16 holds them.
    scale, largest = tl.load(scalars_ptr), tl.load(scalars_ptr + 2)
    k_s, k_t = scale * LOG2E, tl.load(scalars_ptr + 1) * LOG2E
    share = tl.where(largest > 0, 1 / tl.where(largest > 0, largest, 1.0), 0.0)
    grad = tl.zeros([KEYS, BLOCK_S], COMPUTE)
    begin = 0
    if CAUSAL:
        begin = first // QUERIES * QUERIES
    members = tl.where(tl.max(key_counts.to(tl.int32), 0) > 0, GROUP_S, 0)  # none if none of the keys counts
    for member in range(members):
        head = key_head * GROUP_S + member
        head_q_ptr = _of_head(student_q_ptr, head, heads, 1, stride_sqb, stride_sqh)
        head_t_ptr = _of_head(teacher_q_ptr, head, heads, 1, stride_tqb, stride_tqh)
        head_k_ptr = _of_head(teacher_k_ptr, head, heads, GROUP_T, stride_tkb, stride_tkh)
        key_t = _vectors(head_k_ptr, stride_tks, keys, key_counts, WIDTH_T, BLOCK_T, OPERAND_T)
        for start in range(begin, positions, QUERIES):
            queries = start + tl.arange(0, QUERIES)
            weights, query_documents = _tokens(weights_ptr, documents_ptr, queries, positions, HAS_DOCUMENTS)
            counts = weights != 0
            visible = _visible(
                queries[None, :], keys[:, None], counts[None, :], key_counts[:, None], query_documents[None, :],
                key_documents[:, None], CAUSAL, ITSELF, HAS_DOCUMENTS,
            )
            q_s = _vectors(head_q_ptr, stride_sqs, queries, counts, WIDTH_S, BLOCK_S, OPERAND_S)
            z_s = _products(key_s, q_s, COMPUTE)
            q_t = _vectors(head_t_ptr, stride_tqs, queries, counts, WIDTH_T, BLOCK_T, OPERAND_T)
            if OPERAND_T == COMPUTE:  # without tensor cores both models' keys would fill a thread's registers
                key_t = _vectors(head_k_ptr, stride_tks, keys, key_counts, WIDTH_T, BLOCK_T, OPERAND_T)
            z_t = _products(key_t, q_t, COMPUTE)
            of_head = statistics_ptr + head.to(tl.int64) * positions
            g = _gradient(z_s, z_t, k_s, k_t, of_head, saved, queries[None, :], counts[None, :], visible)
            g *= (weights * share)[None, :]
            grad = tl.dot(g.to(OPERAND_S), q_s, grad, input_precision="ieee", out_dtype=COMPUTE)
    grad *= scale * largest * tl.load(dtotal_ptr)
    channels = tl.arange(0, BLOCK_S)
    place = grad_ptr + (key_head.to(tl.int64) * positions + keys)[:, None] * WIDTH_S + channels[None, :]
    mask = (keys < positions)[:, None] & (channels < WIDTH_S)[None, :]
    tl.store(place, tl.where(key_counts[:, None], grad, 0.0).to(grad_ptr.dtype.element_ty), mask=mask)


# Launchers ------------------------------------------------------------------------------------------------------------


def _sizes_and_constants(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], weights: Tensor, documents: Tensor | None, causal: bool,
    itself: bool,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """What every kernel is told after its pointers, and its constants."""
    student_q, student_k, teacher_q, teacher_k = tensors
    batch, heads, positions, width = student_q.shape
    strides = [tensor.stride(axis) for tensor in tensors for axis in range(3)]
    for tensor in tensors:
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ValueError(f"queries and keys must have unit stride over d, got strides {tensor.stride()}")
    blocks = [max(16, triton.next_power_of_2(tensor.shape[3])) for tensor in (student_q, teacher_q)]
    plan = attention_plan(student_q.dtype, teacher_q.dtype, weights.dtype, max(blocks))
    constants = {
        "GROUP_S": heads // student_k.shape[1], "GROUP_T": heads // teacher_k.shape[1], "WIDTH_S": width,
        "WIDTH_T": teacher_q.shape[3], "BLOCK_S": blocks[0], "BLOCK_T": blocks[1], "QUERIES": plan.queries,
        "KEYS": plan.keys, "CAUSAL": causal, "ITSELF": itself, "HAS_DOCUMENTS": documents is not None,
        "OPERAND_S": _TYPES[student_q.dtype if plan.as_they_are else weights.dtype],
        "OPERAND_T": _TYPES[teacher_q.dtype if plan.as_they_are else weights.dtype],
        "COMPUTE": _TYPES[weights.dtype], "num_warps": plan.warps, "enable_fp_fusion": True,
    }
    return (heads, positions, batch * heads * positions, *strides), constants


_TYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64,
}


@on_its_device
def attention_kl_stats(
    student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, weights: Tensor,
    documents: Tensor | None, scalars: Tensor, *, causal: bool, itself: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted divergences `[B, H, S]`, and what the gradients need, `[4, B, H, S]`.

    Args:
        student_q, student_k, teacher_q, teacher_k: `[B, H, S, d]` and `[B, Hkv, S, d]`, unit stride over d.
        weights: `[B, S]`, contiguous, in the compute dtype.
        documents: `[B, S]`, contiguous; None for one a row.
        scalars: the student's scale, the teacher's, and the largest of the weights, in the compute dtype.
    """
    tensors = student_q, student_k, teacher_q, teacher_k
    sizes, constants = _sizes_and_constants(tensors, weights, documents, causal, itself)
    terms, statistics = weights.new_empty(student_q.shape[:3]), weights.new_empty(4, *student_q.shape[:3])
    if terms.numel() > 0:
        programs = terms.shape[0] * terms.shape[1] * triton.cdiv(terms.shape[2], constants["QUERIES"])
        _attention_kl_stats_kernel[(programs,)](
            *tensors, weights, weights if documents is None else documents, scalars, terms, statistics, *sizes,
            **constants,
        )
    return terms, statistics


@on_its_device
def attention_kl_grad(
    dtotal: Tensor, student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, weights: Tensor,
    documents: Tensor | None, scalars: Tensor, statistics: Tensor, *, causal: bool, itself: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients in queries and keys of the sum of weighted divergences times `dtotal`, 0-d in the compute dtype.

    Both are contiguous and in the student's dtype.
    """
    tensors = student_q, student_k, teacher_q, teacher_k
    sizes, constants = _sizes_and_constants(tensors, weights, documents, causal, itself)
    both = []
    for like, kernel, block in (
        (student_q, _attention_kl_query_grad_kernel, "QUERIES"), (student_k, _attention_kl_key_grad_kernel, "KEYS"),
    ):
        grad = torch.empty_like(like, memory_format=torch.contiguous_format)
        if grad.numel() > 0:
            kernel[(like.shape[0] * like.shape[1] * triton.cdiv(like.shape[2], constants[block]),)](
                *tensors, weights, weights if documents is None else documents, scalars, dtotal, statistics, grad,
                *sizes, **constants,
            )
        both.append(grad)
    return both[0], both[1]


# Compile cases --------------------------------------------------------------------------------------------------------


def _launch_on_meta(
    dtype: torch.dtype, *, width: int, teacher_width: int, group: int, documents: bool, causal: bool
) -> None:
    def empty(heads: int, d: int) -> Tensor:
        return torch.empty(8, 2048, heads, d, dtype=dtype, device="meta").transpose(1, 2)

    tensors = empty(12, width), empty(12 // group, width), empty(12, teacher_width), empty(12, teacher_width)
    weights, scalars, dtotal = (torch.empty(shape, device="meta") for shape in ((8, 2048), (3,), ()))
    numbers = torch.empty(8, 2048, dtype=torch.int64, device="meta") if documents else None
    form = {"causal": causal, "itself": True}
    _, statistics = attention_kl_stats(*tensors, weights, numbers, scalars, **form)
    attention_kl_grad(dtotal, *tensors, weights, numbers, scalars, statistics, **form)


def _case(
    width: int, teacher_width: int, *, group: int = 1, documents: bool = False, causal: bool = True
) -> CompileCase:
    name = f"{width} and {teacher_width}" + (f", {group} heads a key" if group > 1 else "")
    name += (", documents" if documents else "") + ("" if causal else ", not causal")
    form = {"width": width, "teacher_width": teacher_width, "group": group, "documents": documents, "causal": causal}
    return CompileCase(name, partial(_launch_on_meta, **form))


COMPILE_CASES = [
    _case(64, 64, group=3, documents=True),
    _case(64, 128, group=3, documents=True),
    _case(128, 128, group=4),
    _case(16, 80, causal=False),
]
