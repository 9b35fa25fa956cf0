"""layer_loss, the loss on hidden states: check, align, choose the implementation, reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import checks
from fastdistill.align import common_positions, mean
from fastdistill.backend import choose_impl
from fastdistill.layer_loss_torch import layer_errors
from fastdistill.losses import count_tokens, number_on_device, with_unit_stride
from fastdistill.outputs import LayerLossOutput
from fastdistill.reference import compute_dtype, layer_token_weights
from fastdistill.rows import token_rows

MAX_LAUNCHED = 32
"""Layers in one launch of the kernels, `MAX_LAYERS` of kernels/layer_loss.py."""


def layer_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    metric: str = "mse",
    normalize: str = "none",
    layer_weights: Sequence[float] | Tensor | None = None,
    skip_first: int = 0,
    num_tokens: float | Tensor | None = None,
    impl: str | None = None,
) -> LayerLossOutput:
    """Distance between mapped hidden states, a mean per element over the tokens that count.

    A layer's loss is `sum_i w_i error_i / num_tokens`; `loss` is the mean over layers, weighted by `layer_weights`.
    Gradients go to the student's states alone.

    Args:
        student_states, teacher_states: one tensor a mapped layer, `[B, S, D]` or `[N, D]`, equal D within a pair;
            `[B, S, D]` of unequal S are cut to the shorter.
        mask: `[B, S]` or `[N]`; bool, or a weight >= 0 a token.
        metric: "mse", or "cosine" for 1 - cos (1e-5 is added to each norm).
        normalize: for "mse": "none" for `mean_d (s - t)^2`, which in a residual stream is ruled by a few huge
            channels; "layer_norm" for both vectors normalised over D first (eps 1e-5), within [0, 4], 2 for
            unrelated ones; "teacher_rms" for division by the teacher vector's mean square + 1e-5.
        layer_weights: one weight >= 0 a layer; default equal.
        skip_first: how many first positions of each sequence to leave out (the attention sink carries activations
            thousands of times the rest); `[B, S, D]` states only.
        num_tokens: divisor; default the sum of the weights. A divisor of 0 gives loss 0 and gradient 0.
        impl: as in `softmax_kl`.

    Raises:
        ValueError: for a wrong argument, with its name.
        RuntimeError: for an `impl` asked for that cannot be had.
    """
    checks.check_choice("metric", metric, ("mse", "cosine"))
    checks.check_choice("normalize", normalize, ("none", "layer_norm", "teacher_rms"))
    if metric == "cosine" and normalize != "none":
        raise ValueError(f"normalize must be 'none' for metric='cosine', got {normalize!r}")
    checks.check_sequence("student_states", student_states)
    checks.check_sequence("teacher_states", teacher_states)
    student_states, teacher_states = list(student_states), list(teacher_states)
    _check_states(student_states, teacher_states)
    layer_weights = _check_layer_weights(layer_weights, len(student_states))
    checks.whole_number("skip_first", skip_first, at_least=0)
    leading = tuple(student_states[0].shape[:-1])
    if skip_first and len(leading) == 1:
        raise ValueError(f"skip_first must be 0 for [N, D] states, whose positions are unknown, got {skip_first}")
    if mask is not None:
        checks.check_mask(mask, leading, student_states[0])
        mask = mask.detach()
    form = metric if metric == "cosine" else normalize
    use_triton = choose_impl("layer_loss", impl, student_states[0].device) == "triton"
    losses, per_layer = [], {}
    for part in _alike(student_states, teacher_states):
        students, teachers = [student_states[i] for i in part], [teacher_states[i] for i in part]
        shape, dtype = common_positions(students[0], teachers[0]), compute_dtype(students[0])
        weights = layer_token_weights(shape, mask, skip_first, dtype, students[0].device)
        n = count_tokens(num_tokens, weights)
        factors = _factors(layer_weights, len(student_states), weights)
        compute = _layer_loss_triton if use_triton else _layer_loss_torch
        loss, own = compute(students, teachers, weights, n, torch.stack([factors[i] for i in part]), form)
        losses.append(loss)
        per_layer |= dict(zip(part, own.detach().unbind(), strict=True))
    return LayerLossOutput(sum(losses[1:], losses[0]), torch.stack([per_layer[i] for i in range(len(student_states))]))


def _alike(students: list[Tensor], teachers: list[Tensor]) -> list[list[int]]:
    """Numbers of the layers that can be computed together: of one width, dtype and layout, with a gradient all or none.

    They are as many as one launch of the kernels takes, at most.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        of_student = student.dtype, student.shape, student.stride(), student.requires_grad
        alike.setdefault((*of_student, teacher.dtype, teacher.shape, teacher.stride()), []).append(i)
    return [part[i : i + MAX_LAUNCHED] for part in alike.values() for i in range(0, len(part), MAX_LAUNCHED)]


def _layer_loss_torch(
    students: list[Tensor], teachers: list[Tensor], weights: Tensor, num_tokens: Tensor, factors: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    """The layers' part of the loss, 0-d, and each one's own loss, `[L]`."""
    rows = token_rows(weights, None, drop_uncounted=weights.device.type == "cpu")
    per_layer = mean(layer_errors(students, teachers, rows, form), num_tokens)
    return torch.where(factors > 0, factors * per_layer, 0).sum(), per_layer


def _layer_loss_triton(
    students: list[Tensor], teachers: list[Tensor], weights: Tensor, num_tokens: Tensor, factors: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    """The same by one launch of the kernels."""
    from fastdistill import ops

    if weights.shape != students[0].shape[:-1]:  # positions that the teacher lacks
        weights = F.pad(weights, (0, students[0].shape[1] - weights.shape[1]))
    students = [with_unit_stride(state) for state in students]
    teachers = [with_unit_stride(state.detach()) for state in teachers]
    loss, per_layer, _ = ops.layer_loss(students, teachers, weights.contiguous(), num_tokens, factors, form)
    return loss, per_layer


def _factors(layer_weights: list[float] | Tensor | None, layers: int, beside: Tensor) -> Sequence[Tensor]:
    """Each layer's share of the loss, 0-d on the device of `beside`, which is not waited for."""
    if layer_weights is None:
        return beside.new_full((layers,), 1 / layers).unbind()
    if isinstance(layer_weights, Tensor):
        weights = layer_weights.to(beside)
        return (weights / weights.sum()).unbind()
    return [number_on_device(weight / sum(layer_weights), beside) for weight in layer_weights]


def _check_states(student_states: list[Tensor], teacher_states: list[Tensor]) -> None:
    if not student_states:
        raise ValueError("student_states must hold at least one layer, got none")
    if len(teacher_states) != len(student_states):
        raise ValueError(
            f"teacher_states must hold a layer for each of the {len(student_states)} student_states, "
            f"got {len(teacher_states)}"
        )
    first = student_states[0]
    for i, (student, teacher) in enumerate(zip(student_states, teacher_states, strict=True)):
        names = f"student_states[{i}]", f"teacher_states[{i}]"
        for name, state in zip(names, (student, teacher), strict=True):
            checks.check_float_tensor(name, state, (2, 3), "[B, S, D] or [N, D]")
        if student.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"{names[0]} must have the leading shape {tuple(first.shape[:-1])} of student_states[0], "
                f"got {tuple(student.shape)}"
            )
        checks.check_device(names[0], student, first)
        checks.check_pair(names[0], student, names[1], teacher)
        if teacher.shape[-1] != student.shape[-1]:
            raise ValueError(
                f"{names[1]} must have the width {student.shape[-1]} of {names[0]}, got {teacher.shape[-1]}: "
                "project one of them first"
            )
        checks.check_teacher_is_constant(names[1], teacher)


def _check_layer_weights(layer_weights: Any, layers: int) -> list[float] | Tensor | None:
    if layer_weights is None:
        return None
    try:
        weights = torch.as_tensor(layer_weights, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"layer_weights must hold numbers, got {layer_weights!r}") from error
    if tuple(weights.shape) != (layers,):
        raise ValueError(f"layer_weights must hold one weight for each of {layers} layers, got {layer_weights!r}")
    if not checks.may_read(weights):
        return weights
    if not bool(((weights >= 0) & weights.isfinite()).all()) or not weights.sum() > 0:
        raise ValueError(f"layer_weights must be finite, >= 0 and not all 0, got {layer_weights!r}")
    return weights.tolist()
