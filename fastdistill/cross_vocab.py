"""linear_cross_vocab_kl: the output heads and the loss between two vocabularies, a chunk of tokens at a time.

Both methods make the student's gradient in closed form, in the buffer that held its logits.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import checks
from fastdistill.align import mean
from fastdistill.backend import choose_impl
from fastdistill.differentiation import first_derivative_only, full_precision, spend
from fastdistill.heads import MAX_CHUNK_BYTES, Gradients, Head, scaled
from fastdistill.losses import count_tokens, softmax_kl
from fastdistill.outputs import CrossVocabOutput
from fastdistill.products import Precision
from fastdistill.reference import compute_dtype
from fastdistill.rows import token_rows

METHODS = ("shared", "sorted")

SHARED_BUFFERS, SORTED_BUFFERS = 3, 6
"""How many buffers of `[tokens, V + Vt]` are alive at most, measured. The scratch of `softmax_kl`'s PyTorch path, whose
chunks are its own, is beside the first."""


def linear_cross_vocab_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    shared_ids: tuple[Tensor, Tensor] | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    max_chunk_bytes: int | None = None,
    mask: Tensor | None = None,
    method: str = "shared",
    temperature: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    temperature_squared: bool = True,
    num_tokens: float | Tensor | None = None,
    reduction: str = "mean",
    metrics: bool = False,
    impl: str | None = None,
) -> CrossVocabOutput:
    """Distance between the next-token distributions of two models whose vocabularies differ, token by token.

    Token i of the student is compared with token i of the teacher: two positions at which the same text has been read.
    `logits = hidden @ weight.T + bias` and `p = softmax(logits / T)`, each over its model's whole vocabulary.

    method "shared" compares K + 1 events: each string that both vocabularies hold, and all others together. So both
    distributions are made coarser, and the divergence is never more than it would be if more strings were told apart.
    Where either vocabulary holds nothing but shared strings there are no others to compare: both distributions are
    then over the shared strings alone, renormalised. The loss is `sum_i w_i T^2 div_i / num_tokens`.

    method "sorted" needs no shared string (Universal Logit Distillation, Boizard et al. 2024, arXiv:2402.12030): it
    compares the probabilities by rank, `sum_k |sort(p_s)_k - sort(p_t)_k|`, the shorter padded with zeros, within
    [0, 2]. The loss is `sum_i w_i distance_i / num_tokens`, without T^2.

    Neither sees that one vocabulary spells in two tokens what the other holds as one: for "shared" the first of the
    two is another string, or among the others.

    Memory beyond inputs and gradients is O(chunk x (V + Vt)), whatever N is. Gradients are made in the forward pass,
    chunk by chunk, and scaled in backward, which therefore runs once. Inside all is float32 (float64 for float64
    `student_hidden`), under autocast too.

    Args:
        student_hidden: `[N, D]`: what the student's output head takes.
        student_weight: `[V, D]`, the head. `student_hidden`, `student_weight` and `student_bias` get gradients, each
            in its own dtype, and only where it requires one.
        teacher_hidden: `[N, Dt]`; the width is free.
        teacher_weight: `[Vt, Dt]`.
        shared_ids: two int64 `[K]`, K >= 1: the student's and the teacher's id of each string that both vocabularies
            hold, in one order, each id once. May be None for "sorted".
        student_bias, teacher_bias: `[V]` and `[Vt]`.
        max_chunk_bytes: bound of the memory that one chunk's logits and what is made of them take, all buffers
            together; default 256 MiB. At least one token is taken.
        mask: `[N]`; bool, or a weight >= 0 a token. Tokens of weight 0 give exactly 0 to loss and gradient, even if
            their hidden states are NaN.
        method: "shared" or "sorted".
        temperature: T > 0, of both softmaxes.
        divergence, jsd_beta: as in `softmax_kl`; of "shared" alone.
        temperature_squared: whether T^2 multiplies the divergence of "shared" in the loss.
        num_tokens: divisor of the mean; default the sum of the weights. A divisor of 0 gives loss 0 and gradient 0.
        reduction: "mean" or "sum".
        metrics: also fill `top1_agreement`, which needs `shared_ids`.
        impl: "torch" or "triton", as in `softmax_kl`, whose kernel compares the events of "shared".

    Raises:
        ValueError: for a wrong argument, with its name. What ids and mask hold is not read on a GPU.
        RuntimeError: for an `impl` asked for that cannot be had, and for a second backward.
    """
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        checks.check_float_tensor(name, hidden, (2,), "[N, D]")
    student_vocab = checks.check_head("student", student_hidden, student_weight, student_bias)
    teacher_vocab = checks.check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    checks.check_pair("student_hidden", student_hidden, "teacher_hidden", teacher_hidden)
    for name, tensor in (("hidden", teacher_hidden), ("weight", teacher_weight), ("bias", teacher_bias)):
        checks.check_teacher_is_constant(f"teacher_{name}", tensor)
    checks.check_choice("method", method, METHODS)
    checks.check_choice("reduction", reduction, ("mean", "sum"))
    if shared_ids is not None:
        checks.check_shared_ids(shared_ids, (student_vocab, teacher_vocab), student_hidden)
    elif method == "shared" or metrics:
        raise ValueError("shared_ids must be given unless method='sorted' without metrics, got None")
    if max_chunk_bytes is not None:
        checks.whole_number("max_chunk_bytes", max_chunk_bytes, at_least=1)
    if mask is not None:
        checks.check_mask(mask, tuple(student_hidden.shape[:1]), student_hidden)
    temperature = checks.scalar("temperature", temperature, above=0)
    if method == "shared":
        assert shared_ids is not None
        compare = partial(
            _shared_kl,
            shared_ids=shared_ids,
            temperature=temperature,
            divergence=divergence,
            jsd_beta=jsd_beta,
            kl_weight=temperature**2 if temperature_squared else 1.0,
            impl=impl,
        )
        buffers = SHARED_BUFFERS
    else:
        if divergence != "forward_kl":
            raise ValueError(f"divergence must be left out for method='sorted', got {divergence!r}")
        choose_impl("sorted-probability matching", impl, student_hidden.device)
        compare = partial(_sorted_distance, temperature=temperature)
        buffers = SORTED_BUFFERS

    dtype = compute_dtype(student_hidden)
    weights = student_hidden.new_ones(len(student_hidden), dtype=dtype) if mask is None else mask.detach().to(dtype)
    divisor = count_tokens(num_tokens, weights)
    token_bytes = buffers * (student_vocab + teacher_vocab) * dtype.itemsize
    loss, kl, agreement = _CrossVocabSum.apply(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        token_rows(weights, None, drop_uncounted=False),
        compare,
        shared_ids if metrics else None,
        max(1, (max_chunk_bytes or MAX_CHUNK_BYTES) // token_bytes),
        torch.is_grad_enabled(),
    )

    def reduce(total: Tensor) -> Tensor:
        return mean(total, divisor) if reduction == "mean" else total

    return CrossVocabOutput(reduce(loss), reduce(kl), reduce(agreement) if metrics else None, divisor)


# What a method makes of n tokens: weighted sums of their loss and divergence, and, if asked for, the gradient of the
# loss with respect to the student's logits. Both logits are overwritten, the student's by the gradient.
_Compared = tuple[Tensor, Tensor, Tensor | None]


def _shared_kl(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    *,
    gradient: bool,
    shared_ids: tuple[Tensor, Tensor],
    temperature: float | Tensor,
    divergence: str,
    jsd_beta: float,
    kl_weight: float | Tensor,
    impl: str | None,
) -> _Compared:
    """`softmax_kl` of the events of logits `[n, V]` and `[n, Vt]`."""
    student_ids, teacher_ids = shared_ids
    has_others = len(student_ids) < min(student.shape[1], teacher.shape[1])
    teacher_events = events_(teacher, teacher_ids, temperature, has_others)
    student_events = events_(student, student_ids, temperature, has_others).requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        output = softmax_kl(
            student_events,
            teacher_events,
            mask=weights,
            divergence=divergence,
            jsd_beta=jsd_beta,
            kl_weight=kl_weight,
            reduction="sum",
            impl=impl,
        )
    assert output.kl is not None
    if not gradient:
        return output.loss, output.kl, None
    (devents,) = torch.autograd.grad(output.loss, student_events)
    shared = len(student_ids)
    if has_others:
        # The gradient of a logsumexp is the softmax; where all are -inf, so is their sum, and 0 in its place gives 0.
        total = student_events.detach()[:, shared:]
        dlogits = student.sub_(total.masked_fill(torch.isneginf(total), 0)).exp_().mul_(devents[:, shared:])
    else:
        dlogits = student.zero_()
    dlogits.index_copy_(1, student_ids, devents[:, :shared]).div_(temperature)
    return output.loss.detach(), output.kl, dlogits


def events_(logits: Tensor, ids: Tensor, temperature: float | Tensor, has_others: bool) -> Tensor:
    """Logits `[n, K + 1]`, at T = 1, of the shared strings and of all others together; without others `[n, K]`.

    An event's logit is the log of its probability but for a constant of the row, so a softmax gives it back: z/T for an
    id, and for several logsumexp(z/T). What is left in `logits` `[n, V]` is z/T of the others, -inf for the shared.
    """
    if not has_others:
        return logits.index_select(1, ids).div_(temperature)
    # From the row's maximum on, or a sum at 1e4 would keep no more than 3 decimals of its logarithm.
    scaled = logits.sub_(logits.amax(1, keepdim=True)).div_(temperature)
    shared = scaled.index_select(1, ids)
    others = scaled.index_fill_(1, ids, -torch.inf)
    return torch.cat([shared, others.logsumexp(1, keepdim=True)], 1)


def _sorted_distance(
    student: Tensor, teacher: Tensor, weights: Tensor, *, gradient: bool, temperature: float | Tensor
) -> _Compared:
    """Sum over ranks of the difference of probability, of logits `[n, V]` and `[n, Vt]`."""
    vocab, longer = student.shape[1], max(student.shape[1], teacher.shape[1])
    p_t = torch.softmax(teacher.div_(temperature), 1, out=teacher).sort(descending=True).values
    p_s, order = torch.softmax(student.div_(temperature), 1, out=student).sort(descending=True)
    difference = F.pad(p_s, (0, longer - vocab)) - F.pad(p_t, (0, longer - p_t.shape[1]))
    distance = torch.dot(torch.linalg.vector_norm(difference, 1, 1), weights)
    if not gradient:
        return distance, distance, None
    sign = difference.sign_()[:, :vocab]
    dsorted = sign.sub_(torch.linalg.vecdot(p_s, sign)[:, None]).mul_(p_s).mul_(weights[:, None] / temperature)
    return distance, distance, student.scatter_(1, order, dsorted)


def _top1_agreement(student: Tensor, teacher: Tensor, shared_ids: tuple[Tensor, Tensor]) -> Tensor:
    """Whether the most probable string of both is one and the same; logits `[n, V]` and `[n, Vt]` to bool `[n]`."""
    student_ids, teacher_ids = shared_ids
    same_string = teacher_ids.new_full((student.shape[1],), -1).index_copy_(0, student_ids, teacher_ids)
    return same_string[student.argmax(1)] == teacher.argmax(1)


class _CrossVocabSum(torch.autograd.Function):
    """Summed loss, divergence and agreement; gradients are made in forward, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, rows, compare, agreement_ids, chunk_size, grad_mode = arguments
        needs = tuple(grad_mode and needed for needed in ctx.needs_input_grad[:3])
        dtype = compute_dtype(inputs[0])
        with full_precision(inputs[0]):
            student = Head(*inputs[:3], vocab=len(inputs[1]), precision=Precision(dtype, dtype))
            teacher = Head(*inputs[3:], vocab=len(inputs[4]), precision=Precision(dtype, dtype))
            gradients = Gradients(student, needs, dtype)
            student_buffer, teacher_buffer = (
                head.weight.new_empty(min(len(rows), chunk_size), len(head.weight)) for head in (student, teacher)
            )
            parts = []
            for chunk in rows.chunks(chunk_size):
                # A row that does not count may hold NaN, and 0 * NaN would reach every sum.
                hidden = chunk.zero_uncounted_(student.rows(chunk))
                student_logits = student.logits(hidden, student_buffer)
                teacher_logits = teacher.logits(chunk.zero_uncounted_(teacher.rows(chunk)), teacher_buffer)
                agreement = chunk.weights.new_zeros(())
                if agreement_ids is not None:
                    agrees = _top1_agreement(student_logits, teacher_logits, agreement_ids)
                    agreement = torch.dot(agrees.to(dtype), chunk.weights)
                loss, kl, dlogits = compare(student_logits, teacher_logits, chunk.weights, gradient=any(needs))
                parts.append(torch.stack([loss, kl, agreement]))
                if dlogits is not None:
                    gradients.add(chunk, hidden, dlogits)
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        loss, kl, agreement = torch.stack(parts).sum(0).unbind()
        ctx.mark_non_differentiable(kl, agreement)
        return loss, kl, agreement

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss, *_):
        spend(ctx, "linear_cross_vocab_kl")
        gradients, ctx.gradients = ctx.gradients, None
        made = (gradients.hidden, gradients.weight, gradients.bias)
        made = (None if x is None else scaled(x, dloss, dtype) for x, dtype in zip(made, ctx.dtypes, strict=True))
        return *made, *(None,) * 8
