"""attention_kl, the loss between two models' attention: check, choose the implementation, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill import attention_torch, checks
from fastdistill.align import mean
from fastdistill.attention_torch import Model, Sight
from fastdistill.backend import choose_impl
from fastdistill.losses import count_tokens, number_on_device, with_unit_stride
from fastdistill.outputs import AttentionKLOutput
from fastdistill.reference import attention_scales, compute_dtype


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = True,
    itself: bool = True,
    documents: Tensor | None = None,
    scale: float | tuple[float, float] | None = None,
    num_tokens: float | Tensor | None = None,
    impl: str | None = None,
) -> AttentionKLOutput:
    """KL(teacher || student) between rows of attention, from queries and keys: no map `[B, H, S, S]` is ever held.

    `loss = sum_i w_i mean_h KL_hi / num_tokens` over queries i and heads h, each the divergence of two softmaxes over
    the keys that the query sees (MiniLM, Wang et al. 2020, arXiv:2002.10957, equation 5), natural logarithms, float32
    inside (float64 for float64 input). Memory grows with S. Gradients go to `student_q` and `student_k` alone.

    The relations of MiniLMv2 (arXiv:2012.15828) are this of queries with queries, keys with keys and values with
    values: `attention_kl(values, values, teacher_values, teacher_values)`, split into as many heads.

    Args:
        student_q: `[B, H, S, d]`, after any rotary embedding.
        student_k: `[B, Hkv, S, d]` with H a multiple of Hkv: each key serves H / Hkv heads that follow each other.
        teacher_q, teacher_k: the same B, H and S; the teacher's own d and Hkv.
        mask: `[B, S]`; bool, or a weight >= 0 a token. A token of weight 0 is neither a query that counts nor a key
            that is seen; whatever it holds, NaN too, it has gradient 0.
        causal: whether a query sees no later key.
        itself: whether a query sees the key of its own position. One that sees no key at all has divergence 0.
        documents: integers `[B, S]`; a query sees the keys of its own number alone. Default one document a row.
        scale: what products of queries and keys are multiplied by, a number > 0, or the student's and the teacher's;
            default 1 / sqrt(d), each model's own.
        num_tokens: divisor; default the sum of the weights. A divisor of 0 gives loss 0 and gradient 0.
        impl: "torch" or "triton"; default FASTDISTILL_IMPL, else the kernels in half precision from sm_80 on, where
            they use tensor cores, and PyTorch, in blocks of queries, elsewhere.

    Raises:
        ValueError: for a wrong argument, with its name.
        RuntimeError: for an `impl` asked for that cannot be had.
    """
    _check_model("student", student_q, student_k, student_q)
    _check_model("teacher", teacher_q, teacher_k, student_q)
    for name, tensor in (("teacher_q", teacher_q), ("teacher_k", teacher_k)):
        checks.check_teacher_is_constant(name, tensor)
    leading = (student_q.shape[0], student_q.shape[2])
    if mask is not None:
        checks.check_mask(mask, leading, student_q)
    if documents is not None:
        _check_documents(documents, leading, student_q)
    student_scale, teacher_scale = attention_scales(_check_scale(scale), student_q, teacher_q)
    weights = student_q.new_ones(leading) if mask is None else mask.detach()
    weights = weights.to(compute_dtype(student_q))
    sight = Sight(weights, documents, bool(causal), bool(itself))
    student = Model(student_q, student_k, student_scale)
    teacher = Model(teacher_q, teacher_k, teacher_scale)
    use_triton = choose_impl("attention_kl", impl, student_q.device, multiplies=(student_q, teacher_q)) == "triton"
    compute = _attention_kl_triton if use_triton else attention_torch.attention_kl
    total, per_head = compute(student, teacher, sight)
    num_tokens = count_tokens(num_tokens, weights)
    return AttentionKLOutput(mean(total, num_tokens) / len(per_head), mean(per_head, num_tokens))


def _attention_kl_triton(student: Model, teacher: Model, sight: Sight) -> tuple[Tensor, Tensor]:
    from fastdistill import ops

    weights = sight.weights.contiguous()
    largest = weights.amax() if weights.numel() > 0 else weights.new_zeros(())
    scales = [number_on_device(model.scale, weights) for model in (student, teacher)]
    vectors = [with_unit_stride(x) for x in (student.query, student.key, teacher.query, teacher.key)]
    documents = None if sight.documents is None else sight.documents.contiguous()
    scalars = torch.stack([*scales, largest])
    total, per_head, _ = ops.attention_kl(*vectors, weights, documents, scalars, sight.causal, sight.itself)
    return total, per_head


def _check_model(model: str, query: Any, key: Any, student_q: Tensor) -> None:
    for name, tensor, layout in (("q", query, "[B, H, S, d]"), ("k", key, "[B, Hkv, S, d]")):
        checks.check_float_tensor(f"{model}_{name}", tensor, (4,), layout)
        checks.check_device(f"{model}_{name}", tensor, student_q)
    if query.shape[:3] != student_q.shape[:3]:
        raise ValueError(
            f"{model}_q must have the B, H, S = {tuple(student_q.shape[:3])} of student_q, got {tuple(query.shape)}"
        )
    batch, heads, positions, width = query.shape
    if key.shape[0] != batch or tuple(key.shape[2:]) != (positions, width) or not _divides(key.shape[1], heads):
        raise ValueError(
            f"{model}_k must be [B, Hkv, S, d] = ({batch}, a divisor of {heads}, {positions}, {width}) beside "
            f"{model}_q {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if key.dtype != query.dtype:
        raise ValueError(f"{model}_k must have the dtype {query.dtype} of {model}_q, got {key.dtype}")


def _divides(part: int, whole: int) -> bool:
    return part > 0 and whole % part == 0


def _check_documents(documents: Any, leading: tuple[int, int], beside: Tensor) -> None:
    if not isinstance(documents, Tensor) or documents.dtype not in (torch.int64, torch.int32):
        came = documents.dtype if isinstance(documents, Tensor) else type(documents).__name__
        raise ValueError(f"documents must be an int64 or int32 tensor [B, S], got {came}")
    if tuple(documents.shape) != leading:
        raise ValueError(f"documents must be [B, S] = {leading}, got {tuple(documents.shape)}")
    checks.check_device("documents", documents, beside)


def _check_scale(scale: Any) -> float | tuple[float, float] | None:
    if scale is None:
        return None
    each = scale if isinstance(scale, tuple) else (scale, scale)
    if len(each) != 2:
        raise ValueError(f"scale must be a number, or the student's and the teacher's, got {len(each)} of them")
    if any(isinstance(number, Tensor) for number in each):
        raise ValueError(f"scale must be a number > 0, or a pair of such, got {scale!r}")
    student, teacher = (float(checks.scalar("scale", number, above=0)) for number in each)
    return student, teacher
