"""What the components of the loss beside `kd` and `lm` have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdistill.reference import compute_dtype
from fastdistill.training.blocks import Batch
from fastdistill.training.capture import Captured, Wanted
from fastdistill.training.window import Counts


class Terms(NamedTuple):
    """What a component says of one micro-batch, 0-d each.

    `losses` are its share of the window's, by name, differentiable; `diagnostics` are to be seen and are in no loss.
    """

    losses: dict[str, Tensor]
    diagnostics: dict[str, Tensor]


class Component(nn.Module, ABC):
    """A loss between what is captured of the student and of the teacher, with what it learns for itself."""

    name: str
    """Of its loss, of its weight, and of its count if it has one."""
    of_student: Wanted
    of_teacher: Wanted

    def begin(self, progress: float) -> None:
        """Called before each optimizer step with the share of the run's steps that are done."""

    def count(self, batch: Batch) -> Tensor | None:
        """How many tokens of a micro-batch it takes the mean over; None if each micro-batch weighs the same."""
        return None

    @abstractmethod
    def forward(self, student: Captured, teacher: Captured, batch: Batch, counts: Counts) -> Terms: ...


class Counterparts(NamedTuple):
    """For each of the student's positions, `[B, S]`, where the teacher has read the same.

    `mask` is False where it is padding, or the teacher has no such position; `documents` numbers those of a row.
    """

    mask: Tensor
    documents: Tensor
    positions: Tensor | None
    """The teacher's; None where they are the student's own."""

    @classmethod
    def of(cls, batch: Batch) -> Counterparts:
        documents = (batch.student.places() == 0).cumsum(1)
        if batch.pairs is None:
            return cls(batch.mask, documents, None)
        row, student, teacher = batch.pairs
        mask, positions = torch.zeros_like(batch.mask), torch.zeros_like(documents)
        mask[row, student] = True
        positions[row, student] = teacher
        return cls(mask, documents, positions)

    def of_teacher(self, values: Tensor) -> Tensor:
        """The teacher's `[B, ..., St, D]` at the student's positions: `[B, ..., S, D]`, void outside `mask`."""
        if self.positions is None:
            return values
        index = self.positions.view(len(values), *[1] * (values.ndim - 3), -1, 1)
        return values.gather(-2, index.expand(*values.shape[:-2], -1, values.shape[-1]))


def wide(values: Tensor) -> Tensor:
    """In the type that losses compute in: fp32, or of fp64 fp64."""
    return values.to(compute_dtype(values))


def normalised(states: Tensor) -> Tensor:
    """`[..., D]` with mean 0 and variance 1 over D, `wide`."""
    return F.layer_norm(wide(states), states.shape[-1:])


def projection(widths: tuple[int, int] | None, kind: str) -> nn.Module:
    """What brings states of the first width to the second: nothing where they are equal (or None), else a matrix that
    begins as the identity on the channels that both have, "learned" or "fixed".
    """
    if widths is None or widths[0] == widths[1]:
        return nn.Identity()
    matrix = nn.Linear(*widths, bias=False)
    nn.init.eye_(matrix.weight)
    return matrix.requires_grad_(kind == "learned")
