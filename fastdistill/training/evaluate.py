"""Held-out cross-entropy, perplexity and how close a student is to its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from fastdistill import linear_cross_vocab_kl, linear_softmax_kl
from fastdistill.training.blocks import IGNORED, Blocks, collate
from fastdistill.training.models import parts
from fastdistill.training.objective import Teacher, fed
from fastdistill.training.pairing import ONE_TOKENIZER, Pairing


@dataclass(frozen=True)
class Evaluation:
    """Means over every predicted token: nats; with a teacher also KL(teacher || student) and top-1 agreement, T = 1.

    With two tokenizers these two are over the positions that both have (`compared` of them) and the strings that both
    have, and `bits_per_byte` is the loss that can be set beside that of a model with another tokenizer.
    """

    loss: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None
    compared: int | None = None
    bits_per_byte: float | None = None


def perplexity(loss: float) -> float:
    """exp(loss): never clamped, infinite where it does not fit a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    blocks: Blocks,
    pairing: Pairing = ONE_TOKENIZER,
    *,
    batch_size: int,
    teacher: Teacher | None = None,
) -> Evaluation:
    """Language-model loss of `model` on all of `blocks`, each token once, in context of at most a block."""
    was_training = model.training
    model.eval()
    own = parts(model)
    loss = kl = top1 = 0.0
    tokens = compared = text_bytes = 0
    for first in range(0, len(blocks), batch_size):
        some = [blocks[i] for i in range(first, min(first + batch_size, len(blocks)))]
        batch = collate(some, model.device, align=pairing.align)
        states = None if teacher is None else teacher(batch.teacher)
        hidden = own.base(**fed(batch.student), use_cache=False).last_hidden_state
        fused = states if pairing.is_one else None
        out = linear_softmax_kl(
            hidden,
            own.head.weight,
            fused and fused.hidden,
            fused and fused.weight,
            batch.targets,
            student_bias=own.head.bias,
            teacher_bias=fused and fused.bias,
            kl_weight=0.0,
            ce_weight=1.0,
            vocab_size=pairing.vocab_size if fused else None,
            reduction="sum",
            metrics=fused is not None,
        )
        assert out.ce is not None
        loss, tokens = loss + float(out.ce), tokens + int(out.num_tokens)
        if pairing.text_bytes:
            text_bytes += int(pairing.text_bytes[0][batch.targets[batch.targets != IGNORED]].sum())
        if states is not None and not fused:
            assert batch.pairs is not None
            row, student_position, teacher_position = batch.pairs
            out = linear_cross_vocab_kl(
                hidden[row, student_position],
                own.head.weight,
                states.hidden[row, teacher_position],
                states.weight,
                pairing.shared_ids,
                student_bias=own.head.bias,
                teacher_bias=states.bias,
                reduction="sum",
                metrics=True,
            )
        if states is not None:
            assert out.kl is not None
            assert out.top1_agreement is not None
            kl, top1, compared = kl + float(out.kl), top1 + float(out.top1_agreement), compared + int(out.num_tokens)
    model.train(was_training)
    result = Evaluation(loss / tokens, tokens)
    if text_bytes:
        result = replace(result, bits_per_byte=loss / math.log(2) / text_bytes)
    if compared:
        result = replace(result, compared=compared, kl=kl / compared, top1_agreement=top1 / compared)
    return result
