"""Held-out cross-entropy, perplexity and how close a student is to its teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastdistill.training.blocks import Blocks, collate
from fastdistill.training.measures import SUMS, Measures
from fastdistill.training.models import evaluating
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.pairing import ONE_TOKENIZER, Pairing
from fastdistill.training.teacher import Teacher

LM = Weights(lm=1.0)
"""Of a module that is only evaluated."""


@dataclass(frozen=True)
class Evaluation:
    """Means over every predicted token: nats; with a teacher also what is kept of it, as `measures.Retention` has it.

    With two tokenizers that is over the positions that both have (`compared` of them) and the strings that both have,
    and `bits_per_byte` is the loss that can be set beside that of a model with another tokenizer.
    """

    loss: float
    tokens: int
    kl: float | None = None
    top1_agreement: float | None = None
    top5_overlap: float | None = None
    shared_mass: float | None = None
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
    module = model if isinstance(model, DistillationModule) else DistillationModule(model, LM, pairing=pairing)
    process = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    sums = torch.zeros(SUMS, dtype=torch.float64, device=next(module.parameters()).device)
    for measures, counts in measured(module, blocks, batch_size=batch_size, teacher=teacher, process=process):
        sums += measures.sums() * counts
    if accelerator:
        sums = cast("Tensor", accelerator.reduce(sums, "sum"))
    return summary(sums)


@torch.no_grad()
def measured(
    module: DistillationModule,
    blocks: Blocks,
    *,
    batch_size: int,
    teacher: Teacher | None = None,
    process: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Measures, bool]]:
    """Batch by batch, of one process of so many; and whether the batch counts.

    Sharded weights are gathered by all processes together: each has as many batches, of which the last may not count.
    """
    rank, ranks = process
    device = next(module.parameters()).device
    with evaluating(module.student):
        for first in range(0, len(blocks), batch_size * ranks):
            mine = range(first, min(first + batch_size * ranks, len(blocks)))[rank * batch_size :][:batch_size]
            batch = collate([blocks[i] for i in mine or [0]], device, align=module.pairing.align)
            yield module.measure(batch, None if teacher is None else teacher(batch.teacher)), bool(mine)
    if isinstance(module, FSDPModule):
        module.reshard()  # a forward pass alone leaves the root's weights gathered


def summary(sums: Tensor) -> Evaluation:
    """Means, of the sums that `Measures.sums` gives."""
    loss, tokens, text_bytes, compared, kl, top1, top5, mass, _ = sums.tolist()
    result = Evaluation(loss / tokens, int(tokens))
    if text_bytes:
        result = replace(result, bits_per_byte=loss / math.log(2) / text_bytes)
    if compared:
        means = {"kl": kl, "top1_agreement": top1, "top5_overlap": top5, "shared_mass": mass}
        means = {name: value / compared for name, value in means.items()}
        result = replace(result, compared=int(compared), **means)
    return result
