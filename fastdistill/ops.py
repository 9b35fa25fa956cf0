"""The Triton kernels as operations of PyTorch, with fake tensors, autograd and torch.compile; losses.py calls them.

Each operation is a `torch.library.custom_op`: an opaque call with a schema, which works the same when it is compiled,
exported or run by Triton's interpreter. Numbers that a schedule changes come in one small tensor, so that a change of
them compiles nothing anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.differentiation import first_derivative_only

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


@torch.library.custom_op("fastdistill::layer_loss", mutates_args=())
def layer_loss(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: Tensor,
    num_tokens: Tensor,
    factors: Tensor,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, each layer's own, and the statistics for backward, of layers that one launch can take.

    Only the loss is differentiable, and in `students` alone. The arguments are those of
    `kernels.layer_loss.layer_loss_stats`.
    """
    from fastdistill.kernels.layer_loss import layer_loss_stats

    return layer_loss_stats(weights, students, teachers, num_tokens, factors, form=form)


@layer_loss.register_fake
def _(students, teachers, weights, num_tokens, factors, form):
    from fastdistill.kernels.layer_loss import SAVED

    saved = SAVED[form], len(students), weights.numel()
    return weights.new_empty(()), weights.new_empty(len(students)), weights.new_empty(saved)


@torch.library.custom_op("fastdistill::layer_loss_backward", mutates_args=())
def layer_loss_backward(
    dloss: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    weights: Tensor,
    num_tokens: Tensor,
    factors: Tensor,
    statistics: Tensor,
    form: str,
) -> list[Tensor]:
    """The gradient in each of `students` of the loss times `dloss`."""
    from fastdistill.kernels.layer_loss import layer_loss_grad

    return layer_loss_grad(dloss, students, teachers, weights, num_tokens, factors, statistics, form=form)


@layer_loss_backward.register_fake
def _(dloss, students, *_):
    return [torch.empty_like(student, memory_format=torch.contiguous_format) for student in students]


def _keep_layers(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    students, teachers, weights, num_tokens, factors, form = inputs
    ctx.set_materialize_grads(False)  # or zeros as large as the statistics would come for them
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*students, *teachers, weights, num_tokens, factors, output[2])
    ctx.layers, ctx.form = len(students), form


@first_derivative_only
def _differentiate_layers(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[list[Tensor] | list[None] | None, ...]:
    if dloss is None:
        return [None] * ctx.layers, [None] * ctx.layers, *(None,) * 4
    students, teachers = ctx.saved_tensors[: ctx.layers], ctx.saved_tensors[ctx.layers : 2 * ctx.layers]
    rest = ctx.saved_tensors[2 * ctx.layers :]
    grads = layer_loss_backward(dloss, list(students), list(teachers), *rest, ctx.form)
    return grads, [None] * ctx.layers, *(None,) * 4


layer_loss.register_autograd(_differentiate_layers, setup_context=_keep_layers)


@torch.library.custom_op("fastdistill::attention_kl", mutates_args=())
def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    weights: Tensor,
    documents: Tensor | None,
    scalars: Tensor,
    causal: bool,
    itself: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of weighted divergences, 0-d, that of each head, `[H]`, and the statistics `[4, B, H, S]` for backward.

    Only the first is differentiable, and in `student_q` and `student_k` alone. The arguments are those of
    `kernels.attention_kl.attention_kl_stats`.
    """
    from fastdistill.kernels.attention_kl import attention_kl_stats

    tensors = student_q, student_k, teacher_q, teacher_k, weights, documents, scalars
    terms, statistics = attention_kl_stats(*tensors, causal=causal, itself=itself)
    per_head = terms.sum((0, 2))
    return per_head.sum(), per_head, statistics


@attention_kl.register_fake
def _(student_q, student_k, teacher_q, teacher_k, weights, *_):
    batch, heads, positions, _ = student_q.shape
    return weights.new_empty(()), weights.new_empty(heads), weights.new_empty(4, batch, heads, positions)


@torch.library.custom_op("fastdistill::attention_kl_backward", mutates_args=())
def attention_kl_backward(
    dtotal: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    weights: Tensor,
    documents: Tensor | None,
    scalars: Tensor,
    statistics: Tensor,
    causal: bool,
    itself: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients in `student_q` and `student_k` of the sum times `dtotal`."""
    from fastdistill.kernels.attention_kl import attention_kl_grad

    tensors = dtotal, student_q, student_k, teacher_q, teacher_k, weights, documents, scalars, statistics
    return attention_kl_grad(*tensors, causal=causal, itself=itself)


@attention_kl_backward.register_fake
def _(dtotal, student_q, student_k, *_):
    grad_q, grad_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (student_q, student_k))
    return grad_q, grad_k


def _keep_attention(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, causal, itself = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, output[2])
    ctx.form = causal, itself


@first_derivative_only
def _differentiate_attention(ctx: Any, dtotal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dtotal is None:
        return (None,) * 9
    return *attention_kl_backward(dtotal, *ctx.saved_tensors, *ctx.form), *(None,) * 7


attention_kl.register_autograd(_differentiate_attention, setup_context=_keep_attention)
