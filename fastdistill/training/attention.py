"""The attention component: how far the attention maps of mapped blocks are apart, head by head."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fastdistill.attention import attention_kl
from fastdistill.reference import attention_visible, log_attention, map_kl
from fastdistill.training.attention_maps import grouped_heads, map_square
from fastdistill.training.blocks import Batch
from fastdistill.training.capture import Captured, QueriesKeys, Wanted, watched_attention
from fastdistill.training.component import Component, Counterparts, Terms
from fastdistill.training.config import Config, UsageError
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.models import evaluating, parts
from fastdistill.training.window import Counts

_FORMS = {"kl": map_kl, "mse": map_square}


class AttentionLoss(Component):
    """Mean over mapped pairs of blocks, heads and counted positions of the distance between rows of attention.

    "kl" is KL(teacher || student) of each position's weights over what comes before it (MiniLM, Wang et al. 2020,
    arXiv:2002.10957, equation 5), "mse" their squared distance, summed over what is attended to. Both models' rows are
    softmaxes over the positions at which both have read the same. Where the models have unlike numbers of heads, those
    that follow each other are averaged to the greatest number that divides both, or `heads` pairs them. The squared
    distance and the average take maps `[B, H, S, S]`, the rest none.
    """

    name = "attention"

    def __init__(
        self, pairs: Sequence[tuple[int, int]], *, form: str = "kl", heads: Sequence[tuple[int, int]] | None = None
    ):
        """`pairs` (student block, teacher block) and `heads` (student head, teacher head), 0-based."""
        super().__init__()
        self.pairs, self.form, self.heads = pairs, form, heads
        self.of_student = Wanted(attention=frozenset(student for student, _ in pairs))
        self.of_teacher = Wanted(attention=frozenset(teacher for _, teacher in pairs))

    @classmethod
    def of(
        cls, config: Config, student: PreTrainedModel, teacher: PreTrainedModel, layer_map: LayerMap
    ) -> AttentionLoss:
        """As the settings ask for it.

        Raises:
            UsageError: as `head_pairs` and `check_attention`.
        """
        counts = [model.config.get_text_config().num_attention_heads for model in (student, teacher)]
        loss = cls(layer_map.pairs, form=config.attention_loss, heads=head_pairs(config.head_map, *counts))
        for model, wanted, name in ((student, loss.of_student, "student"), (teacher, loss.of_teacher, "teacher")):
            check_attention(model, wanted.attention, config.seq_len, name)
        return loss

    def count(self, batch: Batch) -> Tensor:
        return Counterparts.of(batch).mask.sum()

    def forward(self, student: Captured, teacher: Captured, batch: Batch, counts: Counts) -> Terms:
        common = Counterparts.of(batch)
        each = []
        for student_block, teacher_block in self.pairs:
            ours, theirs = student.attention[student_block], teacher.attention[teacher_block]
            theirs = QueriesKeys(common.of_teacher(theirs.query), common.of_teacher(theirs.key), theirs.scale)
            if self.heads is not None:
                ours = _of_heads(ours, [student_head for student_head, _ in self.heads])
                theirs = _of_heads(theirs, [teacher_head for _, teacher_head in self.heads])
            if self.form == "kl" and ours.query.shape[1] == theirs.query.shape[1]:
                each.append(_loss(ours, theirs, common, counts[self.name]))
            else:
                each.append(_loss_of_maps(self.form, ours, theirs, common, counts[self.name]))
        return Terms({self.name: torch.stack(each).mean()}, {})


def _loss(student: QueriesKeys, teacher: QueriesKeys, common: Counterparts, count: Tensor) -> Tensor:
    return attention_kl(
        *student[:2],
        *teacher[:2],
        common.mask,
        documents=common.documents,
        scale=(student.scale, teacher.scale),
        num_tokens=count,
    ).loss


def _loss_of_maps(form: str, student: QueriesKeys, teacher: QueriesKeys, common: Counterparts, count: Tensor) -> Tensor:
    """What is not a sum over queries of what each head alone has: a squared distance, and means of heads' maps."""
    visible = attention_visible(common.mask, common.documents, causal=True, itself=True)
    maps = [log_attention(*own, visible) for own in (student, teacher)]
    groups = math.gcd(*(own.shape[1] for own in maps))
    rows = _FORMS[form](*(grouped_heads(own, groups) for own in maps))
    return rows.mean(1).sum() / count.clamp(min=1)  # of what sees nothing the rows are alike


def _of_heads(own: QueriesKeys, heads: list[int]) -> QueriesKeys:
    """Of those heads alone, each with a key of its own."""
    each = own.query.shape[1] // own.key.shape[1]
    return QueriesKeys(own.query[:, heads], own.key[:, [head // each for head in heads]], own.scale)


def head_pairs(rule: str, student_heads: int, teacher_heads: int) -> list[tuple[int, int]] | None:
    """Pairs (student head, teacher head) that `--head-map` asks for; None for "auto", which averages where need be.

    Raises:
        UsageError: it is neither "auto" nor pairs, or names a head that is not there.
    """
    if rule == "auto":
        return None
    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", rule):
        raise UsageError(f"--head-map must be auto, or pairs student:teacher like 0:0,1:3, got {rule!r}")
    pairs = []
    for text in rule.split(","):
        pair = [int(number) for number in text.split(":")]
        for name, head, count in zip(("student", "teacher"), pair, (student_heads, teacher_heads), strict=True):
            if head >= count:
                raise UsageError(f"--head-map {rule}: the {name}'s heads are 0 to {count - 1}, got {head}")
        pairs.append((pair[0], pair[1]))
    return pairs


@torch.no_grad()
def check_attention(model: PreTrainedModel, blocks: frozenset[int], seq_len: int, name: str) -> None:
    """Raise `UsageError` unless those blocks attend to all that comes before by the softmax of queries and keys alone.

    One row of `seq_len` tokens is read, and each block's attention is computed anew from its queries and keys. `name`
    is "teacher" or "student".
    """
    away: dict[int, float] = {}

    def compare(block: int, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor) -> None:
        plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        expected = plain.transpose(1, 2).reshape(output.shape).float()
        away[block] = ((output.float() - expected).norm() / expected.norm()).item()

    own, device = parts(model), model.device
    ids = torch.arange(seq_len, device=device)[None] % model.config.get_text_config().vocab_size
    with evaluating(model), watched_attention(own.blocks, blocks, compare):
        own.base(input_ids=ids, use_cache=False)
    kind = f"{type(model).__name__}, the {name}"
    if missing := sorted(blocks - away.keys()):
        raise UsageError(f"--attention-weight: {kind}, does not show the queries and keys of its block {missing[0]}")
    for block, distance in sorted(away.items()):
        if not distance <= torch.finfo(model.dtype).eps ** 0.5:
            raise UsageError(
                f"--attention-weight: {kind}, attends in block {block} otherwise than by the softmax of queries and "
                f"keys over the {seq_len} positions of --seq-len ({distance:.1%} away): within a window, or with caps "
                "or sinks"
            )
