"""linear_softmax_kl: the output head and the softmax-KL together, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill import checks, linear_ops
from fastdistill.backend import choose_impl
from fastdistill.losses import kernel_scalars, prepare
from fastdistill.outputs import LossOutput
from fastdistill.products import autocast_dtype
from fastdistill.softmax_kl_torch import is_on


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

    Memory beyond inputs and gradients is O(chunk x V + V x D), whatever N is. With reduction "mean" or "sum" the
    gradients are made in the forward pass, chunk by chunk, and scaled in backward, which therefore runs once; with
    "none" backward computes the logits anew.

    Matrices are multiplied in the dtype to which hidden states and weight promote, or autocast's, to which both are
    then cast once a call. Logits and gradients are float32 all the same (float64 for float64) until they are returned:
    in half precisions the products are asked for in float32, and a float16 gradient of the logits is scaled by a power
    of two. A GPU without such products gives logits in the half precision; a CPU takes half precisions to float32
    first, and autocast changes nothing there. What lies between the products is the kernel of `softmax_kl`, in one
    launch a chunk, where it runs, else PyTorch.

    Args:
        student_hidden: `[B, S, D]` or `[N, D]`: what the student's output head takes.
        student_weight: `[V, D]`, the head. `student_hidden`, `student_weight` and `student_bias` get gradients, each
            in its own dtype, and only where it requires one.
        teacher_hidden: `[B, St, Dt]` or `[N, Dt]`; the width is free. None for the cross-entropy alone.
        teacher_weight: `[Vt, Dt]`, or None with `teacher_hidden`.
        student_bias, teacher_bias: `[V]` and `[Vt]`.
        max_chunk_bytes: bound of the memory that one chunk's logits and gradient take, all buffers together. At least
            one token is taken. Default 256 MiB, and on a GPU what its architecture needs to be fast: 256 tokens before
            sm_80, 1024 before sm_90, then 2048.
        drop_masked: leave tokens that do not count out of the matrix products. Their number must be read from the
            device, a wait on a GPU; False computes all rows and never waits, and so does a CUDA graph's capture.

    `targets` and the other keywords are those of `softmax_kl`.

    Raises:
        ValueError: for a wrong argument, with its name, before any work is done.
        RuntimeError: for an `impl` asked for that cannot be had, and for a second backward.
    """
    student_vocab = checks.check_head("student", student_hidden, student_weight, student_bias)
    teacher_vocab = None
    if (teacher_hidden is None) != (teacher_weight is None):
        given, missing = ("weight", "hidden") if teacher_hidden is None else ("hidden", "weight")
        raise ValueError(f"teacher_{missing} must be given with teacher_{given}, got None")
    if teacher_bias is not None and teacher_hidden is None:
        raise ValueError("teacher_bias must be None without teacher_hidden, got a tensor")
    if teacher_hidden is not None and teacher_weight is not None:
        teacher_vocab = checks.check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
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
    options, weights = prepared.options, prepared.weights.contiguous()
    has_teacher = teacher_hidden is not None
    scalars, power = kernel_scalars(options, weights, has_teacher=has_teacher)
    arguments = (
        student_hidden,
        student_weight,
        student_bias,
        *(None if x is None else x.detach() for x in (teacher_hidden, teacher_weight, teacher_bias)),
        prepared.targets,
        weights,
        scalars,
        options.divergence,
        options.shared_vocab,
        options.metrics,
        power,
        has_teacher and is_on(options.kl_weight),
        targets is not None and is_on(options.ce_weight),
        autocast_dtype(student_hidden.device),
        bool(drop_masked),
        max_chunk_bytes,
        choose_impl("linear_softmax_kl", impl, student_hidden.device),
    )
    if reduction == "none":
        terms = linear_ops.linear_softmax_kl_terms(*arguments)
    else:
        head = (student_hidden, student_weight, student_bias)
        needs = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in head)
        terms, *_ = linear_ops.linear_softmax_kl_sums(*arguments, *needs)
    return prepared.output_of(terms, has_teacher=has_teacher)
