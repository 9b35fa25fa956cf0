"""linear_softmax_kl: the output head and the softmax-KL together, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill import checks
from fastdistill.backend import choose_impl
from fastdistill.differentiation import first_derivative_only, full_precision
from fastdistill.losses import kernel_scalars, prepare
from fastdistill.outputs import LossOutput
from fastdistill.reference import compute_dtype
from fastdistill.rows import TokenRows
from fastdistill.softmax_kl_torch import BUFFERS, SoftmaxKLOptions, TokenTerms, chunk_terms, is_on

MAX_CHUNK_BYTES = 256 << 20


def linear_softmax_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    max_chunk_bytes: int | None = None,
    drop_masked: bool = True,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    temperature_squared: bool = True,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_tokens: float | Tensor | None = None,
    reduction: str = "mean",
    metrics: bool = False,
    impl: str | None = None,
) -> LossOutput:
    """`softmax_kl` of `logits = hidden @ weight.T + bias`, without ever holding the logits of all tokens.

    Memory beyond inputs and gradients is O(chunk x V), whatever N is. With reduction "mean" or "sum" the gradients are
    made in the forward pass, chunk by chunk, and scaled in backward, which therefore runs once; with "none" backward
    computes the logits anew.

    Matrix products are in float32 (float64 for float64), under autocast too: half-precision weights are cast once a
    call. What lies between them is the kernel of `softmax_kl`, in one launch a chunk, where it runs, else PyTorch.

    Args:
        student_hidden: `[B, S, D]` or `[N, D]`: what the student's output head takes.
        student_weight: `[V, D]`, the head. `student_hidden`, `student_weight` and `student_bias` get gradients, each
            in its own dtype, and only where it requires one.
        teacher_hidden: `[B, St, Dt]` or `[N, Dt]`; the width is free. None for the cross-entropy alone.
        teacher_weight: `[Vt, Dt]`, or None with `teacher_hidden`.
        student_bias, teacher_bias: `[V]` and `[Vt]`.
        max_chunk_bytes: bound of the memory that one chunk's logits and gradient take, all buffers together; default
            256 MiB. At least one token is taken.
        drop_masked: leave tokens that do not count out of the matrix products. Their number must be read from the
            device, a wait on a GPU; False computes all rows and never waits.

    `targets` and the other keywords are those of `softmax_kl`.

    Raises:
        ValueError: for a wrong argument, with its name, before any work is done.
        RuntimeError: for an `impl` asked for that cannot be had, and for a second backward.
    """
    student_vocab = check_head("student", student_hidden, student_weight, student_bias)
    teacher_vocab = None
    if (teacher_hidden is None) != (teacher_weight is None):
        given, missing = ("weight", "hidden") if teacher_hidden is None else ("hidden", "weight")
        raise ValueError(f"teacher_{missing} must be given with teacher_{given}, got None")
    if teacher_bias is not None and teacher_hidden is None:
        raise ValueError("teacher_bias must be None without teacher_hidden, got a tensor")
    if teacher_hidden is not None and teacher_weight is not None:
        teacher_vocab = check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
        checks.check_pair("student_hidden", student_hidden, "teacher_hidden", teacher_hidden)
    for name, tensor in (("hidden", teacher_hidden), ("weight", teacher_weight), ("bias", teacher_bias)):
        checks.check_teacher_is_constant(f"teacher_{name}", tensor)
    if max_chunk_bytes is not None:
        checks.whole_number("max_chunk_bytes", max_chunk_bytes, at_least=1)
    prepared = prepare(
        student_hidden,
        teacher_hidden,
        targets,
        student_vocab=student_vocab,
        teacher_vocab=teacher_vocab,
        mask=mask,
        temperature=temperature,
        divergence=divergence,
        jsd_beta=jsd_beta,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature_squared=temperature_squared,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        reduction=reduction,
        metrics=metrics,
    )
    impl = choose_impl("linear_softmax_kl", impl, student_hidden.device)
    rows = prepared.rows(drop_uncounted=drop_masked)
    form = _LinearSum if reduction != "none" else _LinearTokens
    terms = form.apply(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        _Plan(rows, prepared.options, max_chunk_bytes or MAX_CHUNK_BYTES, impl),
        torch.is_grad_enabled(),
    )
    return prepared.output(TokenTerms(*terms), rows)


def check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """Check one model's hidden states and head; return its vocabulary size."""
    layout = "[B, S, D] or [N, D]"
    checks.check_float_tensor(f"{model}_hidden", hidden, (2, 3), layout)
    checks.check_float_tensor(f"{model}_weight", weight, (2,), "[V, D]")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{model}_weight must be [V, D] with the D = {hidden.shape[-1]} of {model}_hidden, "
            f"got {tuple(weight.shape)}"
        )
    checks.check_device(f"{model}_weight", weight, hidden)
    if bias is not None:
        checks.check_float_tensor(f"{model}_bias", bias, (1,), "[V]")
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{model}_bias must be [V] with V = {weight.shape[0]}, got {tuple(bias.shape)}")
        checks.check_device(f"{model}_bias", bias, hidden)
    return weight.shape[0]


class _Plan(NamedTuple):
    rows: TokenRows
    options: SoftmaxKLOptions
    max_chunk_bytes: int
    impl: str


class Head:
    """One model's hidden states and output head, in the compute dtype."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int, dtype: torch.dtype):
        self.hidden, self.dtype = hidden.detach(), dtype
        self.weight = weight.detach()[:vocab].to(dtype)
        self.bias = None if bias is None else bias.detach()[:vocab].to(dtype)

    def rows(self, chunk: TokenRows) -> Tensor:
        return chunk.take(self.hidden, self.dtype)

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Logits `[n, V]` of hidden states `[n, D]`, in the first rows of `buffer`."""
        out = buffer[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


class Gradients:
    """Gradients of the student's hidden states and head, summed over chunks; only those that are needed."""

    def __init__(self, hidden: Tensor, student: Head, needs: tuple[bool, ...]):
        self.student = student
        self.hidden = torch.zeros_like(hidden, dtype=student.dtype) if needs[0] else None
        self.weight = torch.zeros_like(student.weight) if needs[1] else None
        self.bias = student.weight.new_zeros(len(student.weight)) if needs[2] else None

    def add(self, chunk: TokenRows, hidden: Tensor, dlogits: Tensor) -> None:
        """Add the share of one chunk: `hidden` `[n, D]` and the gradient of its logits `[n, V]`."""
        if self.hidden is not None:
            chunk.put(self.hidden, dlogits @ self.student.weight)
        if self.weight is not None:
            self.weight.addmm_(dlogits.t(), hidden)
        if self.bias is not None:
            self.bias += dlogits.sum(0)


def _walk(
    student: Head, teacher: Head | None, plan: _Plan, *, gradient: bool
) -> Iterator[tuple[TokenRows, Tensor, TokenTerms, Tensor | None]]:
    """(chunk of rows, its student hidden states, its terms, its unweighted dlogits) for every chunk."""
    vocab = len(student.weight)
    # The kernel needs the two logits alone: it writes the gradient over the student's.
    buffers = BUFFERS if plan.impl == "torch" else 2
    size = max(1, min(len(plan.rows), plan.max_chunk_bytes // (buffers * vocab * student.dtype.itemsize)))
    student_buffer = student.weight.new_empty(size, vocab)
    teacher_buffer = None if teacher is None else teacher.weight.new_empty(size, len(teacher.weight))
    for chunk in plan.rows.chunks(size):
        # A row that does not count may hold NaN, and 0 * NaN would reach the weight's gradient.
        hidden = chunk.zero_uncounted_(student.rows(chunk))
        logits = student.logits(hidden, student_buffer)
        teacher_logits = None
        if teacher is not None and teacher_buffer is not None:
            teacher_logits = teacher.logits(teacher.rows(chunk), teacher_buffer)
        if plan.impl == "torch":
            terms, dlogits = chunk_terms(logits, teacher_logits, chunk.targets, plan.options, gradient=gradient)
        else:
            terms, dlogits = _chunk_terms_triton(logits, teacher_logits, chunk, plan.options, gradient)
        yield chunk, hidden, terms, dlogits


def _chunk_terms_triton(
    student: Tensor, teacher: Tensor | None, chunk: TokenRows, options: SoftmaxKLOptions, gradient: bool
) -> tuple[TokenTerms, Tensor | None]:
    """`chunk_terms` by the kernel, in one launch; the gradient is written over `student`."""
    from fastdistill.kernels.softmax_kl import softmax_kl_one_launch, softmax_kl_stats

    counted = (chunk.weights != 0).to(student.dtype)
    scalars, power = kernel_scalars(options, counted, has_teacher=teacher is not None)
    form = {"divergence": options.divergence, "shared_vocab": options.shared_vocab, "power": power}
    if gradient:
        values, _ = softmax_kl_one_launch(
            torch.ones_like(counted),
            student,
            teacher,
            chunk.targets,
            counted,
            scalars,
            student,
            **form,
            metrics=options.metrics,
            kl_in_loss=is_on(options.kl_weight),
            ce_in_loss=is_on(options.ce_weight),
        )
    else:
        values, _ = softmax_kl_stats(student, teacher, chunk.targets, counted, scalars, **form, metrics=options.metrics)
    has_metrics = teacher is not None and options.metrics
    has = (True, teacher is not None, chunk.targets is not None, has_metrics, has_metrics, has_metrics)
    terms = (value if has_it else None for value, has_it in zip(values, has, strict=True))
    return TokenTerms(*terms), student if gradient else None  # type: ignore[arg-type]


def _heads(inputs: tuple, options: SoftmaxKLOptions) -> tuple[Head, Head | None]:
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = inputs
    dtype = compute_dtype(student_hidden)
    student = Head(student_hidden, student_weight, student_bias, len(student_weight), dtype)
    if teacher_hidden is None:
        return student, None
    return student, Head(teacher_hidden, teacher_weight, teacher_bias, options.shared_vocab, dtype)


class _LinearSum(torch.autograd.Function):
    """The summed loss; gradients are made in forward, while a chunk's logits are there, and scaled in backward."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, plan, grad_mode = arguments
        needs = tuple(grad_mode and needed for needed in ctx.needs_input_grad[:3])
        with full_precision(inputs[0]):
            student, teacher = _heads(tuple(inputs), plan.options)
            gradients = Gradients(inputs[0], student, needs)
            parts = []
            for chunk, hidden, terms, dlogits in _walk(student, teacher, plan, gradient=any(needs)):
                parts.append(terms.weighted(chunk))
                if dlogits is not None:
                    dlogits.mul_(chunk.weights[:, None])
                    gradients.add(chunk, hidden, chunk.zero_uncounted_(dlogits))
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        terms = TokenTerms.join(parts)
        ctx.mark_non_differentiable(*(term for term in terms[1:] if term is not None))
        return terms.loss.sum(), *terms[1:]

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss, *_):
        return *scaled_gradients(ctx, "linear_softmax_kl", dloss), *(None,) * 5


def scaled_gradients(ctx: Any, operation: str, dloss: Tensor) -> list[Tensor | None]:
    """The gradients that a forward pass left in `ctx`, times the incoming one: in place, so once."""
    if ctx.gradients is None:
        raise RuntimeError(
            f"{operation} can be differentiated once: its gradients were made in forward and scaled in place by the "
            "first backward. Call it again for a second one"
        )
    gradients, ctx.gradients = ctx.gradients, None
    made = (gradients.hidden, gradients.weight, gradients.bias)
    return [None if x is None else x.mul_(dloss).to(dtype) for x, dtype in zip(made, ctx.dtypes, strict=True)]


class _LinearTokens(torch.autograd.Function):
    """The loss a token; its incoming gradient differs by token, so backward computes the logits anew."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, plan, _ = arguments
        ctx.save_for_backward(*inputs)
        ctx.plan = plan
        with full_precision(inputs[0]):
            student, teacher = _heads(tuple(inputs), plan.options)
            walk = _walk(student, teacher, plan, gradient=False)
            terms = TokenTerms.join([terms.weighted(chunk) for chunk, _, terms, _ in walk])
        ctx.mark_non_differentiable(*(term for term in terms[1:] if term is not None))
        return tuple(terms)

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss, *_):
        inputs = ctx.saved_tensors
        with full_precision(inputs[0]):
            student, teacher = _heads(inputs, ctx.plan.options)
            gradients = Gradients(inputs[0], student, ctx.needs_input_grad[:3])
            start = 0
            for chunk, hidden, _, dlogits in _walk(student, teacher, ctx.plan, gradient=True):
                assert dlogits is not None
                dlogits.mul_((dloss[start : start + len(chunk)] * chunk.weights)[:, None])
                gradients.add(chunk, hidden, chunk.zero_uncounted_(dlogits))
                start += len(chunk)
        made = (gradients.hidden, gradients.weight, gradients.bias)
        made = [None if x is None else x.to(source.dtype) for x, source in zip(made, inputs[:3], strict=True)]
        return *made, *(None,) * 5
