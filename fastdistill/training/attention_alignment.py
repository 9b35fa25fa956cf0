"""The attention alignment component: whether the student's states find among the teacher's what the teacher's find."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistill.attention import attention_kl
from fastdistill.training.blocks import Batch
from fastdistill.training.capture import Captured, Wanted
from fastdistill.training.component import Component, Counterparts, Terms, normalised, projection
from fastdistill.training.config import Config
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.window import Counts


class AttentionAlignmentLoss(Component):
    """Mean over mapped pairs of blocks of the KL between two attentions over the teacher's states: the teacher's own,
    and that of the student's states in place of its queries.

    Each position looks back at the teacher's layer-normalised states of earlier positions, in `heads` parts of the
    channels (relations of states with states are MiniLM's, Wang et al. 2020, arXiv:2002.10957). Only the query differs,
    the student's state brought to the teacher's width. What is learned beside the student is that one matrix. It sees
    no state of the teacher and the keys are constants, so without the student it cannot come to 0; and a position does
    not see itself, which it could find by its number alone.
    """

    name = "attention_alignment"

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        widths: tuple[int, int] | None = None,
        projected: str = "learned",
        heads: int = 1,
    ):
        """`pairs` (student block, teacher block), 0-based; `widths` the student's and the teacher's, None if equal.

        `projected` is "learned" or "fixed". `heads` must divide the teacher's width.
        """
        super().__init__()
        self.pairs, self.heads = pairs, heads
        self.of_student = Wanted(outputs=frozenset(student for student, _ in pairs))
        self.of_teacher = Wanted(outputs=frozenset(teacher for _, teacher in pairs))
        self.projections = nn.ModuleList(projection(widths, projected) for _ in pairs)

    @classmethod
    def of(cls, config: Config, teacher: PreTrainedModel, layer_map: LayerMap) -> AttentionAlignmentLoss:
        heads = teacher.config.get_text_config().num_attention_heads
        heads = heads if layer_map.widths[1] % heads == 0 else 1
        return cls(layer_map.pairs, widths=layer_map.widths, projected=config.projection, heads=heads)

    def count(self, batch: Batch) -> Tensor:
        """Of the tokens with one to look back at: those whose document is that of one before."""
        common = Counterparts.of(batch)
        latest = torch.where(common.mask, common.documents, 0).cummax(1).values
        return (common.mask & (common.documents == F.pad(latest[:, :-1], (1, 0)))).sum()

    def forward(self, student: Captured, teacher: Captured, batch: Batch, counts: Counts) -> Terms:
        common = Counterparts.of(batch)
        each = []
        for (student_block, teacher_block), project in zip(self.pairs, self.projections, strict=True):
            query = self._split(project(student.outputs[student_block]))
            key = self._split(common.of_teacher(teacher.outputs[teacher_block]))
            to_keys = attention_kl(
                query,
                key,
                key,
                key,
                common.mask,
                itself=False,
                documents=common.documents,
                num_tokens=counts[self.name],
            )
            each.append(to_keys.loss)
        return Terms({self.name: torch.stack(each).mean()}, {})

    def _split(self, states: Tensor) -> Tensor:
        """Layer-normalised `[B, S, D]` by heads, `[B, H, S, D / H]`."""
        return normalised(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
