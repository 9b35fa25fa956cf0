"""The machinery around the loop: processes, wrappers that keep them together, and the optimizer's step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from fastdistill.training.config import Config, UsageError
from fastdistill.training.guard import TrainingFault
from fastdistill.training.objective import DistillationModule

T = TypeVar("T")


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate's view of the launch: `python`, `torchrun` and `accelerate launch`, on GPUs if there are any.

    Raises:
        UsageError: the launch asks for another engine than those that `wrap` has, or the settings for more processes.
    """
    for variable, flag in (("ACCELERATE_USE_FSDP", "--use_fsdp"), ("ACCELERATE_USE_DEEPSPEED", "--use_deepspeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise UsageError(f"launched with {flag}: launch without it, and give train.py --shard for sharded weights")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # see precision.py, which a CPU can run too
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                # What components have that begin later, or without kd and lm what comes after the blocks compared.
                find_unused_parameters=config.curriculum != "none" or not (config.kd_weight or config.lm_weight),
            ),
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # others wait while the first reads the text
        ],
    )
    if config.shard and accelerator.num_processes == 1:
        raise UsageError("--shard spreads weights over processes, and there is one: launch more, with torchrun")
    return accelerator


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work`, done by the first process alone, returns or raises: in all of them."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except (UsageError, TrainingFault) as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def describe(accelerator: Accelerator) -> str:
    """How many processes there are, if more than one, and on what."""
    ranks = accelerator.num_processes
    return f"{ranks} processes on {accelerator.device.type}" if ranks > 1 else str(accelerator.device)


def over_processes(values: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Each scalar summed over the processes, in one message."""
    summed: Any = accelerator.reduce(torch.stack([*values.values()]), "sum")
    return dict(zip(values, summed.unbind(), strict=True))


def wrap(module: DistillationModule, accelerator: Accelerator, config: Config) -> nn.Module:
    """What is called in place of `module` so that the processes train one model: itself where there is one process,
    DDP, or with `--shard` FSDP2.

    Sharded, each block is a group; embedding, final norm, head and projections are in the root's, since the loss takes
    the head's weight.
    """
    if config.gradient_checkpointing:
        checkpoint_activations(module.student)
    if config.shard:
        for block in module.parts[0].blocks:
            fully_shard(block)
        fully_shard(module)
        register_fsdp_forward_method(module, "measure")
        return module
    module.to(accelerator.device)
    return accelerator.prepare_model(module) if accelerator.num_processes > 1 else module


def checkpoint_activations(student: PreTrainedModel) -> None:
    """Under the name that transformers gives it, or gave it before 5.23."""
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def exchanging(wrapped: nn.Module, *, now: bool) -> AbstractContextManager:
    """Whether backward passes in it exchange gradients: under DDP the window's last alone does."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not now else nullcontext()


def make_optimizer(module: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (biases, norms) alone; one launch for all where it is fused."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def backward(total: Tensor, scale: int, scaler: torch.amp.GradScaler | None) -> None:
    """Gradients of `scale * total`; of a total that is not finite, NaN in every parameter and on every process."""
    scaled = total * torch.where(total.detach().isfinite(), float(scale), torch.nan)
    (scaled if scaler is None else scaler.scale(scaled)).backward()


def clip_gradients(
    module: nn.Module, optimizer: torch.optim.Optimizer, largest: float, scaler: torch.amp.GradScaler | None
) -> Tensor:
    """Clip to the norm `largest` over all parameters and processes, after a scaler's scale is taken out; the norm."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(module.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def step_if_finite(
    optimizer: torch.optim.Optimizer, learning_rate: float, norm: Tensor, scaler: torch.amp.GradScaler | None
) -> None:
    """An optimizer step, unless the gradients' norm is NaN or infinite; the device decides, and no host waits."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    else:
        setattr(optimizer, "found_inf", (~norm.isfinite()).float())  # noqa: B010 -- what a scaler tells a fused optimizer
        optimizer.step()
    optimizer.zero_grad()
