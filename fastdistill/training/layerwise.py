"""The layerwise component: how far the outputs of mapped blocks are apart, projected where the widths differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastdistill import layer_loss
from fastdistill.training.blocks import Batch
from fastdistill.training.config import Config
from fastdistill.training.layer_map import LayerMap

_FORMS = {
    # Half of it is 1 - correlation: 0 when equal, 1 when unrelated, at any length and scale.
    "layer_norm": (0.5, "mse", "layer_norm"),
    "teacher_rms": (1.0, "mse", "teacher_rms"),
    "cosine": (1.0, "cosine", "none"),
    "raw": (1.0, "mse", "none"),
}
"""What makes each form of `layer_loss`: a factor, its `metric` and its `normalize`."""


class LayerwiseLoss(nn.Module):
    """Mean over mapped pairs of blocks of the distance between their outputs.

    Where the student's states are narrower or wider than the teacher's, each pair has a projection to the teacher's
    width, which begins as the identity on the channels that both have.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        widths: tuple[int, int] | None = None,
        projection: str = "learned",
        form: str = "layer_norm",
        skip_first: int = 0,
    ):
        """`pairs` (student block, teacher block), 0-based; `widths` the student's and the teacher's, None if equal.

        `projection` is "learned", or "fixed" for one that stays as it begins. `form` is "layer_norm" (half the
        layer-normalised squared error), "teacher_rms", "cosine" or "raw", as `layer_loss` defines them. The first
        `skip_first` positions of each document are left out.
        """
        super().__init__()
        self.student_blocks = [student for student, _ in pairs]
        self.teacher_blocks = [teacher for _, teacher in pairs]
        self.form, self.skip_first = form, skip_first
        self.projections = nn.ModuleList(_projection(widths, projection) for _ in pairs)

    @classmethod
    def of(cls, config: Config, layer_map: LayerMap) -> LayerwiseLoss:
        return cls(
            layer_map.pairs,
            widths=layer_map.widths,
            projection=config.projection,
            form=config.layerwise_loss,
            skip_first=config.layerwise_skip_first,
        )

    def compared(self, batch: Batch) -> Tensor:
        """Which states are compared, bool: of the positions `[B, S]`, or with two tokenizers of `batch.pairs`, `[N]`.

        A pair is left out if either model is among the first positions of the document there.
        """
        past_first = batch.student.past_first(self.skip_first)
        if batch.pairs is None:
            return batch.mask & past_first
        row, student_position, teacher_position = batch.pairs
        return past_first[row, student_position] & batch.teacher.past_first(self.skip_first)[row, teacher_position]

    def forward(
        self, student: Mapping[int, Tensor], teacher: Sequence[Tensor], batch: Batch, num_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of `batch`, 0-d each: the loss, its sum over the states that are `compared` divided by `num_states`; and the
        founding document's sum((s - t)^2) / (B S D) over all positions, padding too, or all pairs, without a gradient.

        `student` holds outputs `[B, S, D]` by number of block; `teacher` those of `teacher_blocks`, in their order.
        """
        states = [student[block] for block in self.student_blocks]
        if batch.pairs is not None:
            row, student_position, teacher_position = batch.pairs
            states = [state[row, student_position] for state in states]
            teacher = [state[row, teacher_position] for state in teacher]
        states = [projection(state) for projection, state in zip(self.projections, states, strict=True)]
        factor, metric, normalize = _FORMS[self.form]
        mask = self.compared(batch)
        out = layer_loss(states, teacher, mask, metric=metric, normalize=normalize, num_tokens=num_states)
        with torch.no_grad():
            founding = layer_loss(states, teacher).loss
        return factor * out.loss, founding


def _projection(widths: tuple[int, int] | None, kind: str) -> nn.Module:
    if widths is None or widths[0] == widths[1]:
        return nn.Identity()
    projection = nn.Linear(*widths, bias=False)
    nn.init.eye_(projection.weight)
    return projection.requires_grad_(kind == "learned")
