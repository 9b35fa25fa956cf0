"""A whole optimizer step of random models, run to be measured: what its tensors take at most, and how long it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fastdistill import shift_targets
from fastdistill.training import engine
from fastdistill.training.blocks import Batch, Inputs, Pairs
from fastdistill.training.config import Config
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.loading import DTYPES
from fastdistill.training.memory import most_allocated
from fastdistill.training.objective import DistillationModule
from fastdistill.training.pairing import ONE_TOKENIZER, Pairing
from fastdistill.training.precision import Precision
from fastdistill.training.teacher import Teacher

STEPS = 3
"""That `measure_step` runs: to make Adam's state, for the memory, and for the time."""

MICRO_BATCHES = 2
"""Of a step that is measured, at most: from the second on, each needs what the one before it needed."""


class MeasuredStep(NamedTuple):
    bytes: int
    """The most that tensors took at once: weights, optimizer's state and all that the step allocates."""
    seconds: float
    """Of a step of all its micro-batches."""


def measure_step(
    config: Config,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    device: torch.device,
    *,
    two_tokenizers: bool = False,
    at_first: bool = False,
) -> MeasuredStep:
    """Teacher, student, losses, backward pass and AdamW with its state in place, as train.py makes them on one device.

    Weights and tokens are random, every row is full. On a CPU memory is what PyTorch's profiler sees allocated, on a
    GPU what its allocator counted.

    Args:
        student, teacher, two_tokenizers: as for `estimate`; ids of the same number stand for the same string.
        at_first: measure the run's first step, by its curriculum, in place of its last.
    """
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    precision = Precision.choose(config.precision, device)
    teacher_dtype = DTYPES[precision.name if config.teacher_dtype == "auto" else config.teacher_dtype]
    model: Any = AutoModelForCausalLM.from_config(student, dtype=torch.float32).train()
    teacher_model: Any = AutoModelForCausalLM.from_config(teacher, dtype=teacher_dtype)
    layer_map = LayerMap.between("uniform", model, teacher_model, None)
    if config.gradient_checkpointing:
        engine.checkpoint_activations(model)
    ids = torch.arange(min(student.vocab_size, teacher.vocab_size), device=device)
    pairing = Pairing((), "random ids", shared_ids=(ids, ids), method=config.cross_vocab)
    module = DistillationModule.of(
        config, model, teacher_model, layer_map, pairing if two_tokenizers else ONE_TOKENIZER
    ).to(device)
    teaches, scaler = Teacher(teacher_model.to(device)), precision.scaler()
    optimizer, batch = engine.make_optimizer(module, config), _random_batch(config, len(ids), device, two_tokenizers)
    micro_batches = min(MICRO_BATCHES, config.grad_accum)
    module.begin(0 if at_first else 999, 1000)

    def step() -> None:
        counts = module.count([batch] * micro_batches)
        for _ in range(micro_batches):
            states = teaches(batch.teacher, module.of_teacher) if module.needs_teacher else None  # kept, as in train.py
            with precision.autocast():
                losses = module(batch, states, counts)
            engine.backward(losses.total, 1, scaler)
        norm = engine.clip_gradients(module, optimizer, config.clip, scaler)
        engine.step_if_finite(optimizer, config.lr, norm, scaler)

    step()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device) - before
    else:
        weights = {p.data_ptr(): p.nbytes for each in (module, teacher_model) for p in each.parameters()}
        held = sum(weights.values())
        held += sum(x.nbytes for of_parameter in optimizer.state.values() for x in of_parameter.values())
    most = held + most_allocated(step, device)
    return MeasuredStep(most, _seconds(step, device) * config.grad_accum / micro_batches)


def _random_batch(config: Config, vocab: int, device: torch.device, two_tokenizers: bool) -> Batch:
    """Full rows of one document, or of two that do not see each other; with two tokenizers all positions are pairs."""
    ids = torch.randint(vocab, (config.batch_size, config.seq_len), device=device)
    first = config.seq_len // 2
    halves = torch.cat([torch.arange(first), torch.arange(config.seq_len - first)]).to(device)
    inputs = Inputs(ids, halves.expand_as(ids) if config.packing == "documents" else None)
    rows = torch.arange(config.batch_size, device=device).repeat_interleave(config.seq_len)
    positions = torch.arange(config.seq_len, device=device).repeat(config.batch_size)
    pairs = Pairs(rows, positions, positions) if two_tokenizers else None
    return Batch(inputs, torch.ones_like(ids, dtype=torch.bool), shift_targets(ids), inputs, pairs)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    run()
    return now() - start
