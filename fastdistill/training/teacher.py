"""The model that is learned from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from fastdistill.training.blocks import Inputs
from fastdistill.training.capture import Captured, Wanted, capturing
from fastdistill.training.models import parts


class TeacherStates(NamedTuple):
    """What the losses need of the teacher for one batch: what its head takes, the head, and what was asked for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    captured: Captured


class Teacher:
    """A frozen model. It never learns, drops nothing out and makes no logits.

    It computes where it is and in its own dtype; what it hands out is on `device`, the student's.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None, *, shard: bool = False):
        """With `shard` each process holds a part of each block, and gathers one block at a time."""
        self.model = model.eval().requires_grad_(False)
        self.parts = parts(model)
        self.device = device or model.device
        if shard:
            for block in self.parts.blocks:
                fully_shard(block, reshard_after_forward=True)  # each is a root, which by itself stays gathered
            nn.Module.to(model, self.device)
        head = self.parts.head
        self.weight = head.weight.to(self.device)
        self.bias = None if head.bias is None else head.bias.to(self.device)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, wanted: Wanted = Wanted()) -> TeacherStates:  # noqa: B008 -- it is immutable
        """States for `[B, S]` ids of the teacher's own tokenizer."""
        arguments = {name: value.to(self.model.device) for name, value in inputs.fed().items()}
        with capturing(self.parts.blocks, wanted) as captured:
            hidden = self.parts.base(**arguments, use_cache=False).last_hidden_state
        return TeacherStates(hidden.to(self.device), self.weight, self.bias, captured.to(self.device))
