"""The PyTorch path of softmax_kl: tokens in chunks, gradient in closed form, scratch that does not grow with N.

`chunk_terms` is the heart: values and gradient for a chunk of tokens, in memory that every chunk uses again.
The logits-level operation below and the fused-linear one both walk over it. `reference.py` defines what it computes;
the gradients, with respect to the scaled logits z/T, are

    forward_kl   p_s - p_t
    reverse_kl   p_s (log p_s - log p_t - reverse_kl)
    jsd          (1 - beta) p_s (r - sum p_s r),  r = log(p_s / m)
    ce           p_s - onehot(target)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill.differentiation import first_derivative_only, full_precision
from fastdistill.reference import MAX_LOG_RATIO, compute_dtype
from fastdistill.rows import TokenRows

CHUNK_BYTES = 2 << 20
"""Bytes of one [tokens, V] buffer, so that the few in use stay in a CPU's last-level cache."""

GPU_CHUNK_BYTES = 128 << 20
"""The same on a GPU, where a chunk must be large beside the cost of launching its operations. Never measured on one."""

BUFFERS = ("gradient", "student", "teacher", "student_logits", "teacher_logits")
"""What `Scratch` has memory for, `[tokens, V]` each."""

RESULTS = 3
"""How many of these `chunk_terms` works in, beside the logits that it is given."""


@dataclass(frozen=True)
class SoftmaxKLOptions:
    """The checked keywords of `softmax_kl`. Numbers on the CPU are floats; on a device they may be 0-d tensors."""

    temperature: float | Tensor
    divergence: str
    jsd_beta: float | Tensor
    kl_weight: float | Tensor
    ce_weight: float | Tensor
    temperature_squared: bool
    shared_vocab: int
    metrics: bool


class Scratch(NamedTuple):
    """Memory of a block of tokens, used again for every block: to get it fresh costs a CPU more than to fill it."""

    memory: Tensor

    @staticmethod
    def of(tokens: int, vocab: int, like: Tensor, *, logits: bool) -> Scratch:
        """In the dtype and on the device of `like`; with memory for logits, or without."""
        return Scratch(like.new_empty(len(BUFFERS) if logits else RESULTS, tokens * vocab))

    def buffer(self, name: str, tokens: int, vocab: int) -> Tensor:
        return self.memory[BUFFERS.index(name), : tokens * vocab].view(tokens, vocab)

    def over(self, name: str, logits: Tensor) -> Tensor:
        """Where what is made of the logits `[n, V]` is written: over them, if there is no memory for it."""
        return self.buffer(name, *logits.shape) if len(self.memory) == len(BUFFERS) else logits


class TokenTerms(NamedTuple):
    """Each term of n tokens, `[n]`, or None where it is not asked for."""

    loss: Tensor
    kl: Tensor | None = None
    ce: Tensor | None = None
    student_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    top1_agreement: Tensor | None = None

    def weighted(self, rows: TokenRows) -> TokenTerms:
        """w_i x_i of each term of the tokens in `rows`, 0 for those that do not count."""
        values = [None if x is None else rows.zero_uncounted_(x * rows.weights) for x in self[1:]]
        return TokenTerms(rows.zero_uncounted_(self.loss * rows.weights), *values)

    @staticmethod
    def join(chunks: list[TokenTerms]) -> TokenTerms:
        """The terms of all chunks, one after the other."""
        columns = [
            None if parts[0] is None else torch.cat(parts) for parts in zip(*(c[1:] for c in chunks), strict=True)
        ]
        return TokenTerms(torch.cat([chunk.loss for chunk in chunks]), *columns)


def chunk_terms(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    options: SoftmaxKLOptions,
    scratch: Scratch,
    *,
    values: bool = True,
    gradient: bool,
) -> tuple[TokenTerms, Tensor | None]:
    """Terms of n tokens and, if asked for, the gradient of each token's loss with respect to its student logits.

    `student` `[n, V]` and `teacher` `[n, Vc]` hold logits in float32 or float64; they are overwritten where `scratch`
    has no memory for logits. The gradient `[n, V]`, which lies in `scratch`, and the terms are not yet weighted by the
    tokens' weights. Without `values` the terms are not to be used.
    """
    loss = student.new_zeros(len(student))
    kl = ce = student_entropy = teacher_entropy = top1_agreement = grad = None
    shared = slice(options.shared_vocab)

    def memory(name: str, logits: Tensor) -> Tensor:
        return scratch.buffer(name, *logits.shape)

    if values and options.metrics and teacher is not None:
        top1_agreement = (student[:, shared].argmax(-1) == teacher.argmax(-1)).to(student.dtype)
        student_entropy, teacher_entropy = (
            torch.special.entr(torch.softmax(logits, -1, out=memory(name, logits))).sum(-1)
            for name, logits in (("student", student[:, shared]), ("teacher", teacher))
        )

    if targets is not None and (values or is_on(options.ce_weight)):
        p = memory("gradient", student)
        all_ids = _Exponentials.of(student, 1, shifted=p, out=p)
        label = targets.clamp(0, student.shape[1] - 1)[:, None]
        if values:
            ce = (all_ids.largest - student.gather(1, label) + all_ids.total.log()).squeeze(1)
            if is_on(options.ce_weight):
                loss += _weigh_(ce.clone(), options.ce_weight)
        if gradient and is_on(options.ce_weight):
            grad = all_ids.softmax_().scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))
            _weigh_(grad, options.ce_weight)

    if teacher is not None and (values or is_on(options.kl_weight)):
        z_s, z_t = student[:, shared], teacher
        e_s, e_t = memory("student", z_s), memory("teacher", z_t)
        with_logs = values or options.divergence != "forward_kl"
        logs_s = scratch.over("student_logits", student)[:, shared] if with_logs else e_s
        logs_t = scratch.over("teacher_logits", teacher) if with_logs else e_t
        of_student = _Exponentials.of(z_s, options.temperature, shifted=logs_s, out=e_s)
        of_teacher = _Exponentials.of(z_t, options.temperature, shifted=logs_t, out=e_t)
        square = options.temperature**2 if options.temperature_squared else 1.0
        kl_gradient = partial(_difference, of_student, of_teacher)
        if with_logs:
            kl, kl_gradient = _DIVERGENCES[options.divergence](of_student, of_teacher, options.jsd_beta)
            if is_on(options.kl_weight):
                loss += _weigh_(kl * square, options.kl_weight)
        if gradient and is_on(options.kl_weight):
            kl_grad = _weigh_(kl_gradient(), options.kl_weight * square / options.temperature)
            if grad is not None:
                grad[:, shared] += kl_grad
            elif kl_grad.shape == student.shape:
                grad = kl_grad
            else:
                grad = memory("gradient", student).zero_()
                grad[:, shared] = kl_grad
    if gradient and grad is None:
        grad = memory("gradient", student).zero_()
    return TokenTerms(loss, kl, ce, student_entropy, teacher_entropy, top1_agreement), grad


def block_rows(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens `chunk_terms` is given at a time, at least one to each of a CPU's threads: as many to each."""
    if device.type != "cpu":
        return max(1, GPU_CHUNK_BYTES // (vocab * dtype.itemsize))
    threads = torch.get_num_threads()
    return threads * max(1, CHUNK_BYTES // (vocab * dtype.itemsize * threads))


def is_on(weight: float | Tensor) -> bool:
    """Whether a term of this weight is in the loss; a weight on a device is not read, it may be."""
    return isinstance(weight, Tensor) or weight != 0


def _weigh_(term: Tensor, weight: float | Tensor) -> Tensor:
    """term * weight in place; a weight of 0 leaves the term out, even where it is infinite."""
    if isinstance(weight, Tensor):
        return term.mul_(weight).masked_fill_(weight == 0, 0)
    return term if weight == 1 else term.mul_(weight)


class _Exponentials(NamedTuple):
    """Of scaled logits z/T less their largest, with which no exponential is taken twice: a CPU takes as long for one as
    for several passes over what lies in its cache.
    """

    largest: Tensor
    """Of the logits, `[n, 1]`."""
    shifted: Tensor
    """z/T less its largest, `[n, V]`."""
    e: Tensor
    """exp(shifted), `[n, V]`."""
    total: Tensor
    """The sum of e, `[n, 1]`."""

    @staticmethod
    def of(logits: Tensor, temperature: float | Tensor, *, shifted: Tensor, out: Tensor) -> _Exponentials:
        """In memory that may be the logits' own. Where both are to be in one, e is what is left."""
        largest = logits.amax(-1, keepdim=True)
        torch.sub(logits, largest, out=shifted)
        if isinstance(temperature, Tensor) or temperature != 1:
            shifted.div_(temperature)
        e = torch.exp(shifted, out=out)
        return _Exponentials(largest, shifted, e, e.sum(-1, keepdim=True))

    def softmax_(self) -> Tensor:
        """In the place of e."""
        return self.e.div_(self.total)

    def log_softmax_(self) -> Tensor:
        """In the place of what is shifted."""
        return self.shifted.sub_(self.total.log())


Make = Callable[[], Tensor]

# Each divergence takes the exponentials of student and teacher over Vc ids, and returns its value [n] and a function
# that makes the gradient [n, Vc] with respect to the student's scaled logits. Both overwrite what was given.


def _forward_kl(student: _Exponentials, teacher: _Exponentials, beta: float | Tensor) -> tuple[Tensor, Make]:
    log_ratio = teacher.shifted.sub_(student.shifted).sub_(teacher.total.log() - student.total.log())
    terms = log_ratio.mul_(teacher.e)
    total = terms.sum(-1)
    if _is_exceptional(total):
        total = terms.masked_fill_(teacher.e == 0, 0).sum(-1)
    return total / teacher.total[:, 0], partial(_difference, student, teacher)


def _difference(student: _Exponentials, teacher: _Exponentials) -> Tensor:
    return student.softmax_().sub_(teacher.softmax_())


def _reverse_kl(student: _Exponentials, teacher: _Exponentials, beta: float | Tensor) -> tuple[Tensor, Make]:
    p_s, log_t = student.softmax_(), teacher.log_softmax_()
    log_ratio = student.log_softmax_().sub_(log_t)
    value = mean = torch.mul(p_s, log_ratio, out=teacher.e).sum(-1)
    if _is_exceptional(value):
        no_teacher = torch.isneginf(log_t)
        log_ratio.masked_fill_(no_teacher, MAX_LOG_RATIO).masked_fill_(p_s == 0, 0)
        mean = torch.mul(p_s, log_ratio, out=teacher.e).sum(-1)
        value = mean.masked_fill((no_teacher & (p_s > 0)).any(-1), torch.inf)
    return value, lambda: p_s.mul_(log_ratio.sub_(mean[:, None]))


def _jsd(student: _Exponentials, teacher: _Exponentials, beta: float | Tensor) -> tuple[Tensor, Make]:
    p_s, p_t, other = student.softmax_(), teacher.softmax_(), student.shifted
    d = teacher.log_softmax_().sub_(student.log_softmax_()).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if _is_exceptional(d.sum(-1)):
        d.nan_to_num_()  # of -inf - -inf: neither has such a token
    teacher_side = torch.neg(d, out=other).expm1_().mul_(1 - beta).log1p_().mul_(p_t).sum(-1)
    r = d.expm1_().mul_(beta).log1p_().neg_()
    mean = torch.mul(p_s, r, out=other).sum(-1)
    return (1 - beta) * mean - beta * teacher_side, lambda: p_s.mul_(r.sub_(mean[:, None])).mul_(1 - beta)


_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def _is_exceptional(sums: Tensor) -> bool:
    """Whether -inf was among the logits that these `[n]` are made of, which must not cost those without it; or NaN.
    On a GPU, where it would have to be waited for, it may have been.
    """
    return sums.device.type != "cpu" or not bool(sums.isfinite().all())


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    rows: TokenRows,
    options: SoftmaxKLOptions,
    *,
    inplace_backward: bool,
) -> TokenTerms:
    """Weighted terms w_i x_i of the tokens in `rows`, `[n]` each; `loss` is differentiable in `student_logits`."""
    return TokenTerms(*_SoftmaxKL.apply(student_logits, teacher_logits, rows, options, inplace_backward))


class _SoftmaxKL(torch.autograd.Function):
    """Saves its inputs and nothing else; backward makes the softmaxes anew and writes the one gradient."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, rows, options, inplace_backward):
        ctx.save_for_backward(student_logits, teacher_logits)
        ctx.rows, ctx.options, ctx.inplace_backward = rows, options, inplace_backward
        walk = _walk(student_logits, teacher_logits, rows, options, values=True)
        terms = TokenTerms.join([terms.weighted(chunk) for chunk, terms, _ in walk])
        ctx.mark_non_differentiable(*(term for term in terms[1:] if term is not None))
        return tuple(terms)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss, *_):
        student_logits, teacher_logits = ctx.saved_tensors
        rows = ctx.rows
        output = student_logits.detach() if ctx.inplace_backward else torch.empty_like(student_logits)
        start = 0
        for chunk, _, grad in _walk(student_logits, teacher_logits, rows, ctx.options, values=False):
            assert grad is not None
            place = chunk.view(output)
            # In the compute dtype before the cast: 1 / num_tokens in float16 would flush most of it to zero.
            factors = (dloss[start : start + len(chunk)] * chunk.weights)[:, None]
            weighted = chunk.zero_uncounted_(torch.mul(grad, factors, out=grad if place is None else place))
            if place is None:
                chunk.put(output, weighted)
            start += len(chunk)
        if len(rows) < output.shape[:-1].numel():
            untouched = torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)
            rows.put(untouched, torch.zeros_like(rows.weights, dtype=torch.bool))
            output[untouched] = 0
        return output, None, None, None, None


def _walk(student_logits, teacher_logits, rows, options, *, values):
    """For every block of rows: it, and its terms, with `values`, or its gradient."""
    dtype, vocab = compute_dtype(student_logits), student_logits.shape[-1]
    size = min(max(1, len(rows)), block_rows(vocab, dtype, student_logits.device))
    scratch = Scratch.of(size, vocab, rows.weights, logits=True)

    def in_full(name: str, logits: Tensor, chunk: TokenRows) -> Tensor:
        """Where they are, if they can be computed with as they lie there."""
        view = chunk.view(logits)
        if view is not None and view.dtype == dtype and view.is_contiguous():
            return view
        buffer = scratch.buffer(name, len(chunk), logits.shape[-1])
        return buffer.copy_(chunk.take(logits, logits.dtype) if view is None else view)

    for chunk in rows.chunks(size):
        student, teacher = in_full("student_logits", student_logits.detach(), chunk), None
        if teacher_logits is not None:
            teacher = in_full("teacher_logits", teacher_logits.detach()[..., : options.shared_vocab], chunk)
        with full_precision(student):
            how = {"values": values, "gradient": not values}
            terms, grad = chunk_terms(student, teacher, chunk.targets, options, scratch, **how)
        yield chunk, terms, grad
