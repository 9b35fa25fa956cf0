"""Arguments of the public functions, checked once: a ValueError names the argument, what came and what was expected.

Values that live on a GPU are not read, since that would stall it, unless FASTDISTILL_VALIDATE=1 asks for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.align import outside_vocabulary

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_float_tensor(name: str, value: Any, ndims: tuple[int, ...], layout: str) -> None:
    """A floating-point tensor with one of `ndims` dimensions, described by `layout`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor {layout}, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.ndim not in ndims:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(value.shape)}")
    if value.shape[-1] == 0 or (value.ndim == 2 and layout == "[V, D]" and len(value) == 0):
        raise ValueError(f"{name} must be {layout} with V and D of at least 1, got shape {tuple(value.shape)}")


def check_sequence(name: str, value: Any) -> None:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list or tuple of tensors, one a layer, got {type(value).__name__}")


def check_pair(student_name: str, student: Tensor, teacher_name: str, teacher: Tensor) -> None:
    """Student and teacher on one device with the same leading shape; a third dimension's S may differ."""
    if teacher.ndim != student.ndim:
        raise ValueError(
            f"{teacher_name} must have as many dimensions as {student_name} {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    if teacher.shape[0] != student.shape[0]:
        size = "B" if student.ndim == 3 else "N"
        raise ValueError(
            f"{teacher_name} must have the {size} = {student.shape[0]} of {student_name} {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
    check_device(teacher_name, teacher, student)


def check_device(name: str, value: Tensor, beside: Tensor) -> None:
    if value.device != beside.device:
        raise ValueError(f"{name} must be on the student's device {beside.device}, got {value.device}")


def check_teacher_is_constant(name: str, teacher: Tensor | None) -> None:
    if teacher is not None and teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, and none flows to the teacher: run the teacher under torch.no_grad(), "
            f"or pass {name}.detach()"
        )


def check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """Check one model's hidden states and head; return its vocabulary size."""
    layout = "[B, S, D] or [N, D]"
    check_float_tensor(f"{model}_hidden", hidden, (2, 3), layout)
    check_float_tensor(f"{model}_weight", weight, (2,), "[V, D]")
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            f"{model}_weight must be a whole tensor, got a DTensor, sharded over processes: call this inside the "
            "forward of a module that fully_shard wraps, and leave the head to that module's own group"
        )
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{model}_weight must be [V, D] with the D = {hidden.shape[-1]} of {model}_hidden, "
            f"got {tuple(weight.shape)}"
        )
    check_device(f"{model}_weight", weight, hidden)
    if bias is not None:
        check_float_tensor(f"{model}_bias", bias, (1,), "[V]")
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{model}_bias must be [V] with V = {weight.shape[0]}, got {tuple(bias.shape)}")
        check_device(f"{model}_bias", bias, hidden)
    return weight.shape[0]


def check_targets(targets: Any, leading: tuple[int, ...], beside: Tensor, ignore_index: int, vocab: int) -> None:
    """Integer targets of shape `leading`, each `ignore_index` or within the student's vocabulary."""
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        came = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be an int64 or int32 tensor, got {came}")
    if tuple(targets.shape) != leading:
        raise ValueError(f"targets must have the student's leading shape {leading}, got {tuple(targets.shape)}")
    check_device("targets", targets, beside)
    if may_read(targets):
        invalid = outside_vocabulary(targets, ignore_index, vocab)
        if invalid.any():
            raise ValueError(
                f"targets must be in [0, {vocab}) or ignore_index {ignore_index}, "
                f"got {int(targets[invalid][0])} and {int(invalid.sum()) - 1} more outside"
            )


def check_shared_ids(shared_ids: Any, vocabs: tuple[int, int], beside: Tensor) -> None:
    """Two int64 tensors `[K]`, K >= 1, the first with ids of the student, each once, the second of the teacher."""
    if not isinstance(shared_ids, Sequence):
        raise ValueError(f"shared_ids must be a pair of int64 tensors [K], got {_kind(shared_ids)}")
    if len(shared_ids) != 2:
        came = f"{type(shared_ids).__name__} of {len(shared_ids)}"
        raise ValueError(f"shared_ids must be a pair of int64 tensors [K], got a {came}")
    for i, (ids, vocab) in enumerate(zip(shared_ids, vocabs, strict=True)):
        name = f"shared_ids[{i}]"
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            raise ValueError(f"{name} must be an int64 tensor [K], got {_kind(ids)}")
        if ids.ndim != 1 or len(ids) == 0:
            raise ValueError(f"{name} must be [K] with K of at least 1, got shape {tuple(ids.shape)}")
        check_device(name, ids, beside)
        if may_read(ids):
            outside = ids[(ids < 0) | (ids >= vocab)]
            if len(outside) > 0:
                raise ValueError(f"{name} must be in [0, {vocab}), got {int(outside[0])}")
            _, place, counts = ids.unique(return_inverse=True, return_counts=True)
            repeated = ids[counts[place] > 1]
            if len(repeated) > 0:
                raise ValueError(f"{name} must hold each id once, got {int(repeated[0])} more than once")
    student_ids, teacher_ids = shared_ids
    if len(student_ids) != len(teacher_ids):
        raise ValueError(
            f"shared_ids[1] must hold an id for each of the {len(student_ids)} in shared_ids[0], got {len(teacher_ids)}"
        )


def check_mask(mask: Any, leading: tuple[int, ...], beside: Tensor) -> None:
    """Weights >= 0 of shape `leading`: bool, integer or float."""
    if not isinstance(mask, Tensor) or mask.dtype.is_complex:
        raise ValueError(f"mask must be a bool, integer or float tensor, got {_kind(mask)}")
    if tuple(mask.shape) != leading:
        raise ValueError(f"mask must have the student's leading shape {leading}, got {tuple(mask.shape)}")
    check_device("mask", mask, beside)
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask requires a gradient, and none flows to it: pass mask.detach()")
    if mask.dtype != torch.bool and may_read(mask):
        wrong = mask[~((mask >= 0) & mask.isfinite())]
        if len(wrong) > 0:
            raise ValueError(f"mask must hold finite weights >= 0, got {wrong[0].item()} and {len(wrong) - 1} more")


def scalar(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float | Tensor:
    """A finite number as a float; a 0-d tensor on a GPU stays one, unread."""
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and none flows to it: pass {name}.detach()")
        if not may_read(value):
            return value
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number or a 0-d tensor, got {_kind(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be > {above}, got {value}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")
    return float(value)


def whole_number(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {_kind(value)}")
    if (at_least is not None and value < at_least) or (at_most is not None and value > at_most):
        limit = f"in [{at_least}, {at_most}]" if at_most is not None else f">= {at_least}"
        raise ValueError(f"{name} must be {limit}, got {value}")
    return value


def may_read(tensor: Tensor) -> bool:
    """Whether to look at values: not where the device would be waited for, nor where torch.compile is tracing."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("FASTDISTILL_VALIDATE") == "1"


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"
