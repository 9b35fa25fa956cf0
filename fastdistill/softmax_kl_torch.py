"""The PyTorch path of softmax_kl: tokens in chunks, gradient in closed form, scratch that does not grow with N.

`chunk_terms` is the heart: values and gradient for a chunk of tokens, mostly inside the buffers that hold its logits.
The logits-level operation below and the fused-linear one both walk over it. `reference.py` defines what it computes;
the gradients, with respect to the scaled logits z/T, are

    forward_kl   p_s - p_t
    reverse_kl   p_s (log p_s - log p_t - reverse_kl)
    jsd          (1 - beta) p_s (r - sum p_s r),  r = log(p_s / m)
    ce           p_s - onehot(target)
"""

from __future__ import annotations

from dataclasses import dataclass
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
        """In the dtype and on the device of `like`; with memory for a copy of the logits, or without."""
        return Scratch(like.new_empty(len(BUFFERS) if logits else RESULTS, tokens * vocab))

    def buffer(self, name: str, tokens: int, vocab: int) -> Tensor:
        return self.memory[BUFFERS.index(name), : tokens * vocab].view(tokens, vocab)


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

    `student` `[n, V]` and `teacher` `[n, Vc]` hold logits in float32 or float64; both are overwritten. The gradient
    `[n, V]`, which lies in `scratch` or in `student`, and the terms are not yet weighted by the tokens' weights.
    Without `values` the terms are not to be used.
    """
    loss = student.new_zeros(len(student))
    kl = ce = student_entropy = teacher_entropy = top1_agreement = grad = None
    shared = slice(options.shared_vocab)

    def softmax(name: str, logits: Tensor) -> Tensor:
        return torch.softmax(logits, -1, out=scratch.buffer(name, *logits.shape))

    if values and options.metrics and teacher is not None:
        top1_agreement = (student[:, shared].argmax(-1) == teacher.argmax(-1)).to(student.dtype)
        student_entropy = torch.special.entr(softmax("student", student[:, shared])).sum(-1)
        teacher_entropy = torch.special.entr(softmax("teacher", teacher)).sum(-1)

    if targets is not None and (values or is_on(options.ce_weight)):
        p = softmax("gradient", student)
        label = targets.clamp(0, student.shape[1] - 1)[:, None]
        ce = (student.amax(-1) - student.gather(1, label).squeeze(1)) - p.amax(-1).log()
        if is_on(options.ce_weight):
            loss += _weigh_(ce.clone(), options.ce_weight)
            if gradient:
                grad = p.scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))
                _weigh_(grad, options.ce_weight)

    if teacher is not None and (values or is_on(options.kl_weight)):
        z_s, z_t = _over_(student[:, shared], options.temperature), _over_(teacher, options.temperature)
        p_s, p_t = softmax("student", z_s), softmax("teacher", z_t)
        if values or options.divergence != "forward_kl":
            kl, kl_grad = _DIVERGENCES[options.divergence](z_s, p_s, z_t, p_t, options.jsd_beta)
        else:
            kl_grad = p_s.sub_(p_t)
        if is_on(options.kl_weight):
            square = options.temperature**2 if options.temperature_squared else 1.0
            if kl is not None:
                loss += _weigh_(kl * square, options.kl_weight)
            if gradient:
                _weigh_(kl_grad.mul_(square / options.temperature), options.kl_weight)
                if grad is not None:
                    grad[:, shared] += kl_grad
                elif kl_grad.shape == student.shape:
                    grad = kl_grad
                else:
                    grad = student
                    grad[:, options.shared_vocab :] = 0
                    grad[:, shared] = kl_grad
    if gradient and grad is None:
        grad = student.zero_()
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


def _over_(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return logits.div_(temperature) if isinstance(temperature, Tensor) or temperature != 1 else logits


def _weigh_(term: Tensor, weight: float | Tensor) -> Tensor:
    """term * weight in place; a weight of 0 leaves the term out, even where it is infinite."""
    term.mul_(weight)
    return term.masked_fill_(weight == 0, 0) if isinstance(weight, Tensor) else term


# Each divergence takes scaled logits [n, Vc] of student and teacher with their softmaxes, overwrites them, and returns
# its value [n] and the gradient [n, Vc] with respect to the student's.


def _forward_kl(z_s: Tensor, p_s: Tensor, z_t: Tensor, p_t: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    log_s, log_t = _log_softmax_(z_s, p_s), _log_softmax_(z_t, p_t)
    needs_care = _may_hold_neg_inf(log_s, log_t)
    log_ratio = log_t.sub_(log_s)
    if needs_care:
        log_ratio.masked_fill_(p_t == 0, 0)
    return torch.linalg.vecdot(log_ratio, p_t), p_s.sub_(p_t)


def _reverse_kl(z_s: Tensor, p_s: Tensor, z_t: Tensor, p_t: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    log_s, log_t = _log_softmax_(z_s, p_s), _log_softmax_(z_t, p_t)
    infinite = None
    if _may_hold_neg_inf(log_s, log_t):
        no_teacher = torch.isneginf(log_t)
        infinite = (no_teacher & (p_s > 0)).any(-1)
        log_ratio = log_s.sub_(log_t).masked_fill_(no_teacher, MAX_LOG_RATIO).masked_fill_(p_s == 0, 0)
    else:
        log_ratio = log_s.sub_(log_t)
    mean = torch.linalg.vecdot(p_s, log_ratio)
    gradient = p_s.mul_(log_ratio.sub_(mean[:, None]))
    return mean if infinite is None else mean.masked_fill(infinite, torch.inf), gradient


def _jsd(z_s: Tensor, p_s: Tensor, z_t: Tensor, p_t: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    log_s, log_t = _log_softmax_(z_s, p_s), _log_softmax_(z_t, p_t)
    absent = torch.isneginf(log_s) & torch.isneginf(log_t) if _may_hold_neg_inf(log_s, log_t) else None
    d = log_t.sub_(log_s).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if absent is not None:
        d.masked_fill_(absent, 0)
    teacher_side = torch.neg(d, out=log_s).expm1_().mul_(1 - beta).log1p_()
    r = d.expm1_().mul_(beta).log1p_().neg_()
    mean = torch.linalg.vecdot(p_s, r)
    value = (1 - beta) * mean - beta * torch.linalg.vecdot(p_t, teacher_side)
    return value, p_s.mul_(r.sub_(mean[:, None])).mul_(1 - beta)


_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def _log_softmax_(logits: Tensor, p: Tensor) -> Tensor:
    """The log of their softmax `p`, in their place. The largest probability is 1 / Z, so that an element takes one
    exponential: they are most of the time on a CPU.
    """
    return logits.sub_(logits.amax(-1, keepdim=True)).add_(p.amax(-1, keepdim=True).log_())


def _may_hold_neg_inf(*logs: Tensor) -> bool:
    """Whether to handle -inf, which costs a CPU as much as all the rest. NaN may hide it; a device is not asked."""
    return any(log.device.type != "cpu" or (log.numel() > 0 and not log.amin() > -1e30) for log in logs)


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
            # In the compute dtype before the cast: 1 / num_tokens in float16 would flush most of it to zero.
            grad.mul_((dloss[start : start + len(chunk)] * chunk.weights)[:, None])
            chunk.put(output, chunk.zero_uncounted_(grad))
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
    for chunk in rows.chunks(size):
        student = chunk.take_into(scratch.buffer("student_logits", len(chunk), vocab), student_logits.detach())
        teacher = None
        if teacher_logits is not None:
            teacher = scratch.buffer("teacher_logits", len(chunk), options.shared_vocab)
            chunk.take_into(teacher, teacher_logits.detach()[..., : options.shared_vocab])
        with full_precision(student):
            how = {"values": values, "gradient": not values}
            terms, grad = chunk_terms(student, teacher, chunk.targets, options, scratch, **how)
        yield chunk, terms, grad
