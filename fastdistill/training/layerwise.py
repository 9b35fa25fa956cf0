"""The layerwise component: how far the outputs of mapped blocks are apart, projected where the widths differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdistill import layer_loss
from fastdistill.training.blocks import Batch
from fastdistill.training.capture import Captured, Wanted
from fastdistill.training.component import Component, Terms, projection
from fastdistill.training.config import Config
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.window import Counts

_FORMS = {
    # Half of it is 1 - correlation: 0 when equal, 1 when unrelated, at any length and scale.
    "layer_norm": (0.5, "mse", "layer_norm"),
    "teacher_rms": (1.0, "mse", "teacher_rms"),
    "cosine": (1.0, "cosine", "none"),
    "raw": (1.0, "mse", "none"),
}
"""What makes each form of `layer_loss`: a factor, its `metric` and its `normalize`."""


class LayerwiseLoss(Component):
    """Mean over mapped pairs of blocks of the distance between their outputs.

    Where the student's states are narrower or wider than the teacher's, each pair has a projection to the teacher's
    width, which begins as the identity on the channels that both have.
    """

    name = "layerwise"

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        widths: tuple[int, int] | None = None,
        projected: str = "learned",
        form: str = "layer_norm",
        skip_first: int = 0,
    ):
        """`pairs` (student block, teacher block), 0-based; `widths` the student's and the teacher's, None if equal.

        `projected` is "learned", or "fixed" for one that stays as it begins. `form` is "layer_norm" (half the
        layer-normalised squared error), "teacher_rms", "cosine" or "raw", as `layer_loss` defines them. The first
        `skip_first` positions of each document are left out.
        """
        super().__init__()
        self.pairs, self.form, self.skip_first = pairs, form, skip_first
        self.of_student = Wanted(outputs=frozenset(student for student, _ in pairs))
        self.of_teacher = Wanted(outputs=frozenset(teacher for _, teacher in pairs))
        self.projections = nn.ModuleList(projection(widths, projected) for _ in pairs)

    @classmethod
    def of(cls, config: Config, layer_map: LayerMap) -> LayerwiseLoss:
        return cls(
            layer_map.pairs,
            widths=layer_map.widths,
            projected=config.projection,
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

    def count(self, batch: Batch) -> Tensor:
        return self.compared(batch).sum()

    def forward(self, student: Captured, teacher: Captured, batch: Batch, counts: Counts) -> Terms:
        """Its diagnostic is the founding document's sum((s - t)^2) / (B S D) over all positions, padding too, or with
        two tokenizers all pairs.
        """
        ours = [student.outputs[block] for block, _ in self.pairs]
        theirs = [teacher.outputs[block] for _, block in self.pairs]
        if batch.pairs is not None:
            row, student_position, teacher_position = batch.pairs
            ours = [state[row, student_position] for state in ours]
            theirs = [state[row, teacher_position] for state in theirs]
        ours = [project(state) for project, state in zip(self.projections, ours, strict=True)]
        factor, metric, normalize = _FORMS[self.form]
        mask = self.compared(batch)
        out = layer_loss(ours, theirs, mask, metric=metric, normalize=normalize, num_tokens=counts[self.name])
        with torch.no_grad():
            founding = layer_loss(ours, theirs).loss
        return Terms({self.name: factor * out.loss}, {"layerwise_raw": founding})
