"""The losses as operations of PyTorch, with fake tensors, autograd and torch.compile; the public functions call them.

Each operation is a `torch.library.custom_op`: an opaque call with a schema, which works the same when it is compiled,
exported or run by Triton's interpreter. Numbers that a schedule changes come in one small tensor, so that a change of
them compiles nothing anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.differentiation import first_derivative_only, spend
from fastdistill.heads import scaled
from fastdistill.linear_chunks import TERMS, LinearInputs, LossForm, loss_sums, loss_terms, loss_terms_backward

STATISTICS = 7
"""Numbers that softmax_kl keeps for the gradient of a token."""


@torch.library.custom_op("fastdistill::softmax_kl", mutates_args=())
def softmax_kl(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weights: Tensor,
    scalars: Tensor,
    divergence: str,
    shared_vocab: int,
    metrics: bool,
    power: int,
    kl_in_loss: bool,
    ce_in_loss: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted terms `[6, N]` of N tokens, in the order of `LossOutput`, and the statistics `[7, N]` for backward.

    Only the first term, the loss, is differentiable, and in `student` alone. Arguments are those of
    `kernels.softmax_kl.softmax_kl_stats`; `kl_in_loss` and `ce_in_loss` say which terms may have a weight other
    than 0, and with `inplace_backward` the gradient is written over `student`.
    """
    from fastdistill.kernels.softmax_kl import softmax_kl_stats

    return softmax_kl_stats(
        student,
        teacher,
        targets,
        weights,
        scalars,
        divergence=divergence,
        shared_vocab=shared_vocab,
        metrics=metrics,
        power=power,
    )


@softmax_kl.register_fake
def _(student, teacher, targets, weights, *_):
    return weights.new_empty(6, weights.numel()), weights.new_empty(STATISTICS, weights.numel())


@torch.library.custom_op("fastdistill::softmax_kl_backward", mutates_args=())
def softmax_kl_backward(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weights: Tensor,
    scalars: Tensor,
    statistics: Tensor,
    divergence: str,
    shared_vocab: int,
    power: int,
) -> Tensor:
    """The gradient in `student` of each token's loss times `dloss` `[N]`; a term without its tensor is left out."""
    grad = torch.empty_like(student)
    tensors = teacher, targets, weights, scalars, statistics
    _write_gradient(grad, dloss, student, *tensors, divergence, shared_vocab, power)
    return grad


@softmax_kl_backward.register_fake
def _(dloss, student, *_):
    return torch.empty_like(student)


@torch.library.custom_op("fastdistill::softmax_kl_backward_", mutates_args=("student",))
def softmax_kl_backward_(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    weights: Tensor,
    scalars: Tensor,
    statistics: Tensor,
    divergence: str,
    shared_vocab: int,
    power: int,
) -> None:
    """`softmax_kl_backward`, the gradient in the place of `student`."""
    tensors = teacher, targets, weights, scalars, statistics
    _write_gradient(student, dloss, student, *tensors, divergence, shared_vocab, power)


def _write_gradient(grad: Tensor, dloss: Tensor, student: Tensor, *rest: Any) -> None:
    """Into `grad`, which may be `student`; the arguments are those of `softmax_kl_backward`."""
    from fastdistill.kernels.softmax_kl import softmax_kl_grad

    teacher, targets, weights, scalars, statistics, divergence, shared_vocab, power = rest
    tensors = dloss, student, teacher, targets, weights, scalars, statistics, grad
    softmax_kl_grad(*tensors, divergence=divergence, shared_vocab=shared_vocab, power=power)
    positions = weights.shape[-1]
    if positions < grad.shape[-2]:  # those that alignment cut off
        grad[:, positions:].zero_()


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    student, teacher, targets, weights, scalars, divergence, shared_vocab, _, power, kl, ce, inplace = inputs
    ctx.save_for_backward(student, teacher if kl else None, targets if ce else None, weights, scalars, output[1])
    ctx.form = divergence, shared_vocab, power
    ctx.inplace_backward = inplace


@first_derivative_only
def _backward(ctx: Any, dterms: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    student, *rest = ctx.saved_tensors
    dloss = dterms[0].contiguous()
    if ctx.inplace_backward:
        softmax_kl_backward_(dloss, student, *rest, *ctx.form)
        grad = student.detach()
    else:
        grad = softmax_kl_backward(dloss, student, *rest, *ctx.form)
    return grad, *(None,) * 11


softmax_kl.register_autograd(_backward, setup_context=_keep_for_backward)


_LINEAR = """
    Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight,
    Tensor? teacher_bias, Tensor? targets, Tensor weights, Tensor scalars, str divergence, SymInt shared_vocab,
    bool metrics, int power, bool kl_in_loss, bool ce_in_loss, ScalarType? autocast, bool drop_uncounted,
    int? max_chunk_bytes, str impl
"""
"""The fields of `LinearInputs`, then those of `LossForm`."""

_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
"""Which of the student's tensors need a gradient."""


def _parsed(arguments: tuple) -> tuple[LinearInputs, LossForm, tuple[bool, ...]]:
    tensors = len(LinearInputs._fields)
    end = tensors + len(LossForm._fields)
    return LinearInputs(*arguments[:tensors]), LossForm(*arguments[tensors:end]), arguments[end:]


@torch.library.custom_op(
    "fastdistill::linear_softmax_kl_sums",
    mutates_args=(),
    schema=f"({_LINEAR}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_softmax_kl_sums(*arguments: Any) -> tuple[Tensor, ...]:
    """Summed terms `[6]`, in the order of `LossOutput`, the loss alone differentiable; and what backward needs.

    That is the gradients of hidden states, weight and bias, made while a chunk's logits are there (`[0]` where they are
    not needed), and the power of two by which they are too large.
    """
    inputs, form, needs = _parsed(arguments)
    sums, *gradients, scale = loss_sums(inputs, form, needs)
    hidden, weight, bias = (inputs.weights.new_empty(0) if x is None else x for x in gradients)
    return sums, hidden, weight, bias, scale


@linear_softmax_kl_sums.register_fake
def _(*arguments):
    inputs, _, needs = _parsed(arguments)
    new_empty = inputs.weights.new_empty
    needed = (x.shape if x is not None and need else (0,) for x, need in zip(inputs[:3], needs, strict=True))
    return new_empty(TERMS), *[new_empty(shape) for shape in needed], new_empty(())


def _keep_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or zeros as large as the gradients would come for outputs that nobody uses
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [x.dtype if needed else None for x, needed in zip(inputs[:3], inputs[-3:], strict=True)]
    ctx.others = len(inputs) - 3


@first_derivative_only
def _scale_gradients(ctx: Any, dsums: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    spend(ctx, "linear_softmax_kl")
    *gradients, scale = ctx.saved_tensors
    factor = dsums[0] / scale
    made = (None if dtype is None else scaled(x, factor, dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))
    return *made, *(None,) * ctx.others


linear_softmax_kl_sums.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("fastdistill::linear_softmax_kl_terms", mutates_args=(), schema=f"({_LINEAR}) -> Tensor")
def linear_softmax_kl_terms(*arguments: Any) -> Tensor:
    """Each token's terms, `[6, B, S]` or `[6, N]`, in the order of `LossOutput`; the loss alone is differentiable.

    Its incoming gradient differs by token, so backward computes the logits anew.
    """
    inputs, form, _ = _parsed(arguments)
    return loss_terms(inputs, form)


@linear_softmax_kl_terms.register_fake
def _(*arguments):
    weights = _parsed(arguments)[0].weights
    return weights.new_empty(TERMS, *weights.shape)


@torch.library.custom_op(
    "fastdistill::linear_softmax_kl_terms_backward",
    mutates_args=(),
    schema=f"(Tensor dloss, {_LINEAR}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
)
def linear_softmax_kl_terms_backward(dloss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden states, weight and bias, each in its own dtype, `[0]` where not needed."""
    gradients = loss_terms_backward(dloss, *_parsed(arguments))
    return tuple(dloss.new_empty(0) if x is None else x for x in gradients)


@linear_softmax_kl_terms_backward.register_fake
def _(dloss, *arguments):
    inputs, _, needs = _parsed(arguments)
    return tuple(
        dloss.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(inputs[:3], needs, strict=True)
    )


def _keep_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tensors = len(LinearInputs._fields)
    ctx.save_for_backward(*inputs[:tensors])
    ctx.form = inputs[tensors:]


@first_derivative_only
def _differentiate_terms(ctx: Any, dterms: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    gradients = linear_softmax_kl_terms_backward(dterms[0], *ctx.saved_tensors, *ctx.form, *needs)
    made = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return *made, *(None,) * (len(ctx.needs_input_grad) - 3)


linear_softmax_kl_terms.register_autograd(_differentiate_terms, setup_context=_keep_inputs)
