"""The largest batch that trains in 16 GB: GPT-2 (124M) into six layers of it (82M), 512 tokens a sequence, fp16:

python -m bench.gpu_largest_batch results.json

A step is a whole one: teacher, student, loss, backward with a gradient scaler, AdamW on float32 weights. "eager" is the
usual composition on the models' logits; both train the same models, of random weights, without gradient checkpointing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bench.gpu import main
from fastdistill import shift_targets
from fastdistill.testing import DEVICE
from fastdistill.training.blocks import Batch, Inputs
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.teacher import Teacher

GIGABYTES = 16
POSITIONS = 512
SIZES: dict[str, dict[str, Any]] = {"teacher": {"n_layer": 12}, "student": {"n_layer": 6}}
TEMPERATURE = 2.0


def eager_loss(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """Half T^2 KL, half cross-entropy, as they are usually written: on the logits `[B, S, V]` of both models."""
    student, teacher = (logits[:, :-1].flatten(0, 1) for logits in (student, teacher))
    log_s, log_t = (F.log_softmax(logits / TEMPERATURE, -1) for logits in (student, teacher))
    kl = F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    return 0.5 * TEMPERATURE**2 * kl + 0.5 * F.cross_entropy(student, ids[:, 1:].flatten())


class EagerModule(nn.Module):
    """The loss of `DistillationModule` by `eager_loss`."""

    def __init__(self, student: GPT2LMHeadModel, teacher: GPT2LMHeadModel):
        super().__init__()
        self.student, self.teacher = student, [teacher]  # in a list: it is not trained

    def forward(self, batch: Batch) -> Tensor:
        ids = batch.student.input_ids
        student = self.student(input_ids=ids, use_cache=False).logits
        with torch.no_grad():
            teacher = self.teacher[0](input_ids=ids, use_cache=False).logits
        return eager_loss(student, teacher, ids)


class FusedModule(nn.Module):
    """What train.py trains."""

    def __init__(self, student: GPT2LMHeadModel, teacher: GPT2LMHeadModel):
        super().__init__()
        self.module = DistillationModule(student, Weights(kd=0.5, lm=0.5, layerwise=0), temperature=TEMPERATURE)
        self.teacher = [Teacher(teacher)]

    def forward(self, batch: Batch) -> Tensor:
        return self.module(batch, self.teacher[0](batch.teacher), self.module.count([batch])).total


MODULES: dict[str, Callable[..., nn.Module]] = {"eager": EagerModule, "fastdistill": FusedModule}


def make_models(**sizes: Any) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """Student and teacher without dropout; on a GPU the teacher is in float16."""
    models = {}
    for name, own in SIZES.items():
        torch.manual_seed(0)
        no_dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        shape: dict[str, Any] = {"n_positions": POSITIONS, "bos_token_id": 0, "eos_token_id": 0, **no_dropout}
        model: Any = GPT2LMHeadModel(GPT2Config(**shape | own | sizes))
        models[name] = model.to(DEVICE)
    teacher = models["teacher"].eval().requires_grad_(False)
    return models["student"], teacher.half() if DEVICE == "cuda" else teacher


def make_batch(sequences: int, positions: int, vocab: int) -> Batch:
    ids = torch.randint(vocab, (sequences, positions), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs = Inputs(ids, None)
    return Batch(inputs, torch.ones_like(ids, dtype=torch.bool), shift_targets(ids), inputs, None)


def fits(implementation: str, sequences: int) -> bool:
    """Whether two steps, the second with the optimizer's state in place, stay within the memory that is allowed."""
    try:
        module = MODULES[implementation](*make_models())
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        scaler, batch = torch.amp.GradScaler(DEVICE), make_batch(sequences, POSITIONS, 50257)
        for _ in range(2):
            with torch.autocast(DEVICE, torch.float16):
                loss = module(batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    except torch.OutOfMemoryError:
        return False
    return True


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, if whatever is less than one that fits does too; 0 for none."""
    below, above = 0, 1
    while fits(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def results() -> Iterator[dict[str, Any]]:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, GIGABYTES * 1e9 / total))
    found: dict[str, int] = {}
    for implementation in MODULES:

        def tried(sequences: int, implementation: str = implementation) -> bool:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return fits(implementation, sequences)

        found[implementation] = largest(tried)
        tried(found[implementation])
        yield {
            "implementation": implementation,
            "gigabytes": GIGABYTES,
            "sequences": found[implementation],
            "positions": POSITIONS,
            "peak_mb": torch.cuda.max_memory_allocated() / 1e6,
            "of_eager": found[implementation] / max(1, found["eager"]),
        }


if __name__ == "__main__":
    sys.exit(main("gpu_largest_batch", results))
