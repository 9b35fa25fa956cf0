"""The number format of the student's forward pass: chosen from the device, or asked for. Its weights stay float32."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fastdistill.training.config import UsageError
from fastdistill.training.loading import DTYPES


@dataclass(frozen=True)
class Precision:
    """`name` is "fp32", "bf16" or "fp16"; `reason`, for the log, says why it is that one."""

    name: str
    device_type: str
    reason: str

    @classmethod
    def choose(cls, asked: str, device: torch.device) -> Precision:
        """The format `asked` for; "auto" takes what `accelerate launch` was told, else what the device is good at.

        A GPU before sm_80 only emulates bf16, and is given fp16.

        Raises:
            UsageError: bf16 is asked for where it would be emulated.
        """
        native_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if asked == "bf16" and not native_bf16:
            raise UsageError(f"--precision bf16 would be emulated on {torch.cuda.get_device_name(device)}: use fp16")
        if asked != "auto":
            return cls(asked, device.type, "as asked")
        if launched in DTYPES:
            return cls(launched, device.type, "as asked of accelerate launch")
        if device.type != "cuda":
            return cls("fp32", device.type, "a CPU's own")
        name = torch.cuda.get_device_name(device)
        return cls("bf16", "cuda", f"native on {name}") if native_bf16 else cls("fp16", "cuda", f"{name} has no bf16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, DTYPES[self.name], enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler | None:
        """fp16 gradients are scaled, so that small ones do not become 0."""
        return torch.amp.GradScaler(self.device_type) if self.name == "fp16" else None

    def describe(self) -> str:
        scaled = " with a gradient scaler" if self.name == "fp16" else ""
        return f"{self.name}{scaled} ({self.reason}), weights and optimizer in fp32"
