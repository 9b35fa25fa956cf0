"""Held-out cross-entropy, perplexity and how close a student is to its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fastdistill import linear_softmax_kl
from fastdistill.training.data import Blocks
from fastdistill.training.models import parts
from fastdistill.training.objective import Teacher


@dataclass(frozen=True)
class Evaluation:
    """Means over every predicted token: nats; with a teacher also KL(teacher || student) and top-1 agreement, T = 1."""

    loss: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None


def perplexity(loss: float) -> float:
    """exp(loss): never clamped, infinite where it does not fit a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def evaluate(model: PreTrainedModel, blocks: Blocks, *, batch_size: int, teacher: Teacher | None = None) -> Evaluation:
    """Language-model loss of `model` on all of `blocks`, each token once, in context of at most a block."""
    was_training = model.training
    model.eval()
    own = parts(model)
    device = model.device
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(len(blocks)).split(batch_size):
        batch = blocks.batch(rows, device)
        states = None if teacher is None else teacher(batch["input_ids"])
        out = linear_softmax_kl(
            own.base(input_ids=batch["input_ids"], use_cache=False).last_hidden_state,
            own.head.weight,
            None if states is None else states.hidden,
            None if states is None else states.weight,
            batch["targets"],
            student_bias=own.head.bias,
            teacher_bias=None if states is None else states.bias,
            kl_weight=0.0,
            ce_weight=1.0,
            reduction="sum",
            metrics=teacher is not None,
        )
        for i, value in enumerate((out.ce, out.kl, out.top1_agreement)):
            if value is not None:
                sums[i] += float(value)
    model.train(was_training)
    tokens = blocks.num_targets()
    loss, kl, top1 = (sums / tokens).tolist()
    return Evaluation(loss, tokens) if teacher is None else Evaluation(loss, tokens, kl, top1)
