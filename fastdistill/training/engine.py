"""The machinery around the loop: device and precision, the optimizer, and a clean way to be interrupted."""

from __future__ import annotations

import signal

import torch
from accelerate import Accelerator
from torch import nn

from fastdistill.training.config import Config, UsageError


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate's engine on the GPU if there is one. Parameters stay float32; `precision` is the forward pass's.

    "auto" takes bf16 where the GPU computes in it (sm_80 and later; older ones only emulate it), fp16 on older GPUs,
    and fp32 on the CPU.
    """
    native_bf16 = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    if precision == "auto":
        precision = "bf16" if native_bf16 else "fp16" if torch.cuda.is_available() else "fp32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("--precision fp16 needs a CUDA GPU, and there is none: use fp32")
    if precision == "bf16" and torch.cuda.is_available() and not native_bf16:
        raise UsageError(f"--precision bf16 would be emulated on {torch.cuda.get_device_name()}: use fp16")
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision)


def teacher_dtype(config: Config, accelerator: Accelerator) -> str:
    """`--teacher-dtype`, or the format in which the student computes."""
    if config.teacher_dtype != "auto":
        return config.teacher_dtype
    return {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


def make_optimizer(module: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (biases, norms) alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


class StopRequest:
    """While entered, the first Ctrl-C or SIGTERM only sets `requested`; the next one acts as it always does."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        self._restore()

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
