"""The layerwise component: how far the outputs of mapped blocks are apart, projected where the widths differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fastdistill import layer_loss
from fastdistill.training.blocks import Batch
from fastdistill.training.config import Config
from fastdistill.training.layer_map import LayerMap


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
    ):
        """`pairs` (student block, teacher block), 0-based; `widths` the student's and the teacher's, None if equal.

        `projection` is "learned", or "fixed" for one that stays as it begins.
        """
        super().__init__()
        self.student_blocks = [student for student, _ in pairs]
        self.teacher_blocks = [teacher for _, teacher in pairs]
        self.projections = nn.ModuleList(_projection(widths, projection) for _ in pairs)

    @classmethod
    def of(cls, config: Config, layer_map: LayerMap) -> LayerwiseLoss:
        return cls(layer_map.pairs, widths=layer_map.widths, projection=config.projection)

    def forward(
        self, student: Mapping[int, Tensor], teacher: Sequence[Tensor], batch: Batch, num_states: Tensor
    ) -> Tensor:
        """The loss of `batch`, 0-d, its sum over positions divided by `num_states`.

        `student` holds outputs `[B, S, D]` by number of block; `teacher` those of `teacher_blocks`, in their order.
        """
        states = [
            projection(student[block]) for projection, block in zip(self.projections, self.student_blocks, strict=True)
        ]
        # Half of it is 1 - correlation: 0 when equal, 1 when unrelated, at any length and scale.
        return 0.5 * layer_loss(states, teacher, batch.mask, normalize="layer_norm", num_tokens=num_states).loss


def _projection(widths: tuple[int, int] | None, kind: str) -> nn.Module:
    if widths is None or widths[0] == widths[1]:
        return nn.Identity()
    projection = nn.Linear(*widths, bias=False)
    nn.init.eye_(projection.weight)
    return projection.requires_grad_(kind == "learned")
