"""linear_softmax_kl as operations of PyTorch, with fake tensors and autograd, for fused_linear.py to call.

They are opaque calls like those of ops.py, but registered without `torch.library.custom_op`, which loads all of
torch.compile at its first call: a second and 140 MB, also for those on a CPU who compile nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from fastdistill.differentiation import first_derivative_only, spend
from fastdistill.heads import scaled
from fastdistill.linear_chunks import TERMS, LinearInputs, LossForm, loss_sums, loss_terms, loss_terms_backward

_TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? targets, Tensor weights, Tensor scalars"
)
"""The fields of `LinearInputs`."""

_FORM = (
    "str divergence, SymInt shared_vocab, bool metrics, int power, bool kl_in_loss, bool ce_in_loss, "
    "ScalarType? autocast, bool drop_uncounted, int? max_chunk_bytes, str impl"
)
"""The fields of `LossForm`."""

_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
"""Which of the student's tensors need a gradient."""


def _parsed(arguments: tuple) -> tuple[LinearInputs, LossForm, tuple[bool, ...]]:
    tensors = len(LinearInputs._fields)
    end = tensors + len(LossForm._fields)
    return LinearInputs(*arguments[:tensors]), LossForm(*arguments[tensors:end]), arguments[end:]


# The sum over tokens --------------------------------------------------------------------------------------------------

_SUMS = "fastdistill::linear_softmax_kl_sums"
define(_SUMS, f"({_TENSORS}, {_FORM}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


@impl(_SUMS, "default")
def _sums(*arguments: Any) -> tuple[Tensor, ...]:
    """Summed terms `[6]`, in the order of `LossOutput`, the loss alone differentiable; and what backward needs.

    That is the gradients of hidden states, weight and bias, made while a chunk's logits are there (`[0]` where they are
    not needed), and the power of two by which they are too large.
    """
    inputs, form, needs = _parsed(arguments)
    sums, *gradients, scale = loss_sums(inputs, form, needs)
    hidden, weight, bias = (inputs.weights.new_empty(0) if x is None else x for x in gradients)
    return sums, hidden, weight, bias, scale


@register_fake(_SUMS)
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


register_autograd(_SUMS, _scale_gradients, setup_context=_keep_gradients)
linear_softmax_kl_sums = torch.ops.fastdistill.linear_softmax_kl_sums.default


# A value a token ------------------------------------------------------------------------------------------------------

_TERMS = "fastdistill::linear_softmax_kl_terms"
define(_TERMS, f"({_TENSORS}, {_FORM}) -> Tensor")


@impl(_TERMS, "default")
def _terms(*arguments: Any) -> Tensor:
    """Each token's terms, `[6, B, S]` or `[6, N]`, in the order of `LossOutput`; the loss alone is differentiable.

    Its incoming gradient differs by token, so backward computes the logits anew.
    """
    inputs, form, _ = _parsed(arguments)
    return loss_terms(inputs, form)


@register_fake(_TERMS)
def _(*arguments):
    weights = _parsed(arguments)[0].weights
    return weights.new_empty(TERMS, *weights.shape)


_TERMS_BACKWARD = "fastdistill::linear_softmax_kl_terms_backward"
define(_TERMS_BACKWARD, f"(Tensor dloss, {_TENSORS}, {_FORM}, {_NEEDS}) -> (Tensor, Tensor, Tensor)")


@impl(_TERMS_BACKWARD, "default")
def _terms_backward(dloss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden states, weight and bias, each in its own dtype, `[0]` where not needed."""
    gradients = loss_terms_backward(dloss, *_parsed(arguments))
    return tuple(dloss.new_empty(0) if x is None else x for x in gradients)


@register_fake(_TERMS_BACKWARD)
def _(dloss, *arguments):
    inputs, _, needs = _parsed(arguments)
    return tuple(
        dloss.new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(inputs[:3], needs, strict=True)
    )


linear_softmax_kl_terms_backward = torch.ops.fastdistill.linear_softmax_kl_terms_backward.default


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


register_autograd(_TERMS, _differentiate_terms, setup_context=_keep_inputs)
linear_softmax_kl_terms = torch.ops.fastdistill.linear_softmax_kl_terms.default
