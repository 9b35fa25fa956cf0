"""The contrastive component: whether the student's state of a text, or of a token, is known among the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.training.blocks import Batch
from fastdistill.training.capture import Captured, Wanted
from fastdistill.training.component import Component, Counterparts, Terms, normalised, projection
from fastdistill.training.config import Config, UsageError
from fastdistill.training.gathered import gathered, rank, ranks
from fastdistill.training.info_nce import Told, info_nce
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.window import Counts

ENOUGH_TEXTS = 32
"""From so many on, "auto" compares texts. One of N tells at most ln N nats (van den Oord et al. 2018), 3.5 of 32; of
fewer texts, a document's own tokens tell more."""


class ContrastiveLoss(Component):
    """Symmetric `info_nce` between the outputs of the last mapped pair of blocks.

    Each position's state is layer-normalised, the student's after it is brought to the teacher's width, so that no
    position decides for the others: the first alone has up to 99 % of the energy of what is raw. What is learned beside
    the student is that projection, and nothing on the teacher's side.

    "texts" compares the mean states of the rows of a micro-batch, over the positions that count, on all processes. A
    row without any is left out, as a query and among the others. "tokens" compares the positions of each document of a
    row. Other documents are no negatives: where two begin alike the teacher's states are the same, and nothing can
    tell them apart; within one, no two positions have read the same. "auto" is "texts" where there are `ENOUGH_TEXTS`.

    A mean over the texts, or the tokens, of a micro-batch, and then over the window's micro-batches: what a text is
    told from is its micro-batch, so 1 x 8 is not 8 x 1. All processes must have the same number of rows.
    """

    name = "contrastive"

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        widths: tuple[int, int] | None = None,
        projected: str = "learned",
        temperature: float = 0.1,
        negatives: str = "auto",
    ):
        """`pairs` (student block, teacher block), 0-based; `widths` the student's and the teacher's, None if equal.

        `projected` is "learned" or "fixed". `temperature` is that of the cosines. `negatives` is "texts", "tokens" or
        "auto".
        """
        super().__init__()
        self.pair, self.temperature, self.negatives = pairs[-1], temperature, negatives
        self.of_student = Wanted(outputs=frozenset({self.pair[0]}))
        self.of_teacher = Wanted(outputs=frozenset({self.pair[1]}))
        self.project = projection(widths, projected)

    @classmethod
    def of(cls, config: Config, layer_map: LayerMap) -> ContrastiveLoss:
        """As the settings ask for it.

        Raises:
            UsageError: texts are to be compared, and there is never more than one.
        """
        if config.contrastive_negatives == "texts" and config.batch_size * ranks() == 1:
            raise UsageError(
                "--contrastive-negatives texts tells apart the texts of a micro-batch on all processes, and needs at "
                "least 2, got --batch-size 1 on one process: give a larger one, or --contrastive-negatives tokens"
            )
        return cls(
            layer_map.pairs,
            widths=layer_map.widths,
            projected=config.projection,
            temperature=config.contrastive_temperature,
            negatives=config.contrastive_negatives,
        )

    def forward(self, student: Captured, teacher: Captured, batch: Batch, counts: Counts) -> Terms:
        """Its diagnostics are means over the same: "contrastive chance" of the logarithm of how many candidates each
        has, the loss of a student that cannot tell them apart; and "contrastive accuracy", the share of the student's
        states whose counterpart is the teacher's most like it.
        """
        common = Counterparts.of(batch)
        # What does not count may be anything: a product would carry its NaN into the projection's gradient.
        void = ~common.mask[..., None]
        ours = normalised(self.project(student.outputs[self.pair[0]].masked_fill(void, 0.0)))
        theirs = normalised(common.of_teacher(teacher.outputs[self.pair[1]]).detach().masked_fill(void, 0.0))
        compared = self._texts if self._by_texts(len(ours)) else self._tokens
        told, counted, number = compared(ours, theirs, common)
        loss, chance, accuracy = (torch.where(counted, each, 0.0).sum() / number for each in told)
        diagnostics = {"contrastive chance": chance, "contrastive accuracy": accuracy}
        return Terms({self.name: loss / counts["micro_batches"]}, diagnostics)

    def _by_texts(self, rows: int) -> bool:
        return self.negatives == "texts" or (self.negatives == "auto" and rows * ranks() >= ENOUGH_TEXTS)

    def _texts(self, ours: Tensor, theirs: Tensor, common: Counterparts) -> tuple[Told, Tensor, Tensor]:
        """Of this process's rows; which of them count; and how many do on a process in the mean, so that the processes'
        quotients have the mean over all rows as their mean.
        """
        counted, first = common.mask.any(1), rank() * len(ours)
        ours, theirs = (gathered(_mean(states, common.mask)) for states in (ours, theirs))
        everywhere = gathered(counted)
        candidates, queries = everywhere.expand(len(ours), -1), slice(first, first + len(counted))
        told = info_nce(ours, theirs, candidates, self.temperature, queries)
        return told, counted, everywhere.sum().clamp(min=1) / ranks()

    def _tokens(self, ours: Tensor, theirs: Tensor, common: Counterparts) -> tuple[Told, Tensor, Tensor]:
        """Of each position; which of them count; and how many do."""
        candidates = (common.documents[:, :, None] == common.documents[:, None, :]) & common.mask[:, None, :]
        told = info_nce(ours, theirs, candidates, self.temperature)
        return told, common.mask, common.mask.sum().clamp(min=1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Over the positions in `mask` `[B, S]`, of states that are 0 elsewhere, `[B, S, D]` to `[B, D]`; 0 of none."""
    return states.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
