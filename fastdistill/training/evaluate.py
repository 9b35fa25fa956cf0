"""Held-out cross-entropy, perplexity and how close a student is to its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastdistill.training.blocks import Blocks, collate
from fastdistill.training.engine import over_processes
from fastdistill.training.models import evaluating
from fastdistill.training.objective import DistillationModule, Sums, Teacher, Weights
from fastdistill.training.pairing import ONE_TOKENIZER, Pairing

_LM = Weights(kd=0.0, lm=1.0, layerwise=0.0)


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
    model: PreTrainedModel | DistillationModule,
    blocks: Blocks,
    pairing: Pairing = ONE_TOKENIZER,
    *,
    batch_size: int,
    teacher: Teacher | None = None,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Language-model loss of `model` on all of `blocks`, each token once, in context of at most a block.

    With an `accelerator` each process evaluates its part of them, and all know the result. A `DistillationModule` has
    a `pairing` of its own.
    """
    module = model if isinstance(model, DistillationModule) else DistillationModule(model, _LM, pairing=pairing)
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(module.parameters()).device
    sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)
    with evaluating(module.student):
        # Sharded weights are gathered by all processes together: each has as many batches, of which the last may not
        # count.
        for first in range(0, len(blocks), batch_size * ranks):
            mine = range(first, min(first + batch_size * ranks, len(blocks)))[rank * batch_size :][:batch_size]
            batch = collate([blocks[i] for i in mine or [0]], device, align=module.pairing.align)
            states = None if teacher is None else teacher(batch.teacher)
            sums += torch.stack(module.measure(batch, states)) * bool(mine)
    if isinstance(module, FSDPModule):
        module.reshard()  # a forward pass alone leaves the root's weights gathered
    if accelerator:
        sums = torch.stack(over_processes(sums, accelerator))
    loss, tokens, text_bytes, kl, top1, compared = sums.tolist()
    result = Evaluation(loss / tokens, int(tokens))
    if text_bytes:
        result = replace(result, bits_per_byte=loss / math.log(2) / text_bytes)
    if compared:
        result = replace(result, compared=int(compared), kl=kl / compared, top1_agreement=top1 / compared)
    return result
