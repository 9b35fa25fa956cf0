"""What is minimised: the student and its losses as one module, and the teacher that it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistill import layer_loss, linear_softmax_kl
from fastdistill.training.config import Config, UsageError
from fastdistill.training.models import captured_outputs, parts


class TeacherStates(NamedTuple):
    """What the losses need of the teacher for one batch: what its head takes, the head, and mapped block outputs."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    layers: list[Tensor]


class Teacher:
    """A frozen model. It never learns, drops nothing out and makes no logits."""

    def __init__(self, model: PreTrainedModel):
        self.model = model.eval().requires_grad_(False)
        self.parts = parts(model)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, layers: Sequence[int] = ()) -> TeacherStates:
        """States for `[B, S]` ids of the teacher's own tokenizer; `layers` are block numbers."""
        with captured_outputs(self.parts.blocks, layers) as outputs:
            hidden = self.parts.base(input_ids=input_ids, use_cache=False).last_hidden_state
        head = self.parts.head
        return TeacherStates(hidden, head.weight, head.bias, [outputs[i] for i in layers])


@dataclass(frozen=True)
class Weights:
    """Weight of each component in the total; one of weight 0 is not built."""

    kd: float
    lm: float
    layerwise: float

    @classmethod
    def of(cls, config: Config) -> Weights:
        return cls(config.kd_weight, config.lm_weight, config.layerwise_weight)

    def need_teacher(self) -> bool:
        return bool(self.kd or self.layerwise)

    def active(self) -> dict[str, float]:
        return {name: weight for name, weight in vars(self).items() if weight != 0}


class TokenCounts(NamedTuple):
    """Divisors of one whole accumulation window: predicted tokens, and tokens whose states are compared."""

    targets: Tensor
    states: Tensor


class Losses(NamedTuple):
    """One micro-batch's share of the window's loss: the total, differentiable, and each component unweighted."""

    total: Tensor
    raw: dict[str, Tensor]


class DistillationModule(nn.Module):
    """The student with everything that learns; its forward returns the losses.

    Nothing outside this forward touches the student's base or head, so wrappers that synchronise gradients or gather
    shards see every use of a parameter.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        weights: Weights,
        *,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        layer_map: Sequence[tuple[int, int]] = (),
    ):
        """`layer_map` holds pairs (student block, teacher block), 0-based."""
        super().__init__()
        if weights.layerwise and not layer_map:
            raise UsageError(
                "--layerwise-weight needs a layer map, which a student that is not built from the teacher lacks"
            )
        self.student, self.weights = student, weights
        self.temperature, self.divergence, self.layer_map = temperature, divergence, tuple(layer_map)
        self.parts = [parts(student)]  # in a list: not registered a second time

    @property
    def teacher_layers(self) -> list[int]:
        """Teacher blocks whose outputs `forward` wants."""
        return [teacher for _, teacher in self.layer_map] if self.weights.layerwise else []

    def forward(self, batch: dict[str, Tensor], teacher: TeacherStates | None, counts: TokenCounts) -> Losses:
        """Losses of `batch` (see `Blocks.batch`), each token-wise sum divided by the window's own count."""
        base, blocks, head = self.parts[0].base, self.parts[0].blocks, self.parts[0].head
        student_layers = [student for student, _ in self.layer_map] if self.weights.layerwise else []
        with captured_outputs(blocks, student_layers) as outputs:
            hidden = base(input_ids=batch["input_ids"], use_cache=False).last_hidden_state

        softmax = linear_softmax_kl(
            hidden,
            head.weight,
            None if teacher is None else teacher.hidden,
            None if teacher is None else teacher.weight,
            batch["targets"],
            student_bias=head.bias,
            teacher_bias=None if teacher is None else teacher.bias,
            temperature=self.temperature,
            divergence=self.divergence,
            kl_weight=self.weights.kd,
            ce_weight=self.weights.lm,
            num_tokens=counts.targets,
        )
        total, raw = softmax.loss, {}
        if self.weights.kd:
            assert softmax.kl is not None
            raw["kd"] = self.temperature**2 * softmax.kl
        if self.weights.layerwise:
            assert teacher is not None
            states = [outputs[i] for i in student_layers]
            # Half of it is 1 - correlation: 0 when equal, 1 when unrelated, at any length and scale.
            layerwise = (
                0.5
                * layer_loss(
                    states, teacher.layers, batch["mask"], normalize="layer_norm", num_tokens=counts.states
                ).loss
            )
            total = total + self.weights.layerwise * layerwise
            raw["layerwise"] = layerwise.detach()
        if self.weights.lm:
            assert softmax.ce is not None
            raw["lm"] = softmax.ce
        return Losses(total, raw)

    @staticmethod
    def count(batches: Sequence[dict[str, Tensor]]) -> TokenCounts:
        """Divisors of a window of micro-batches."""
        targets = sum((batch["targets"] != -100).sum() for batch in batches)
        states = sum(batch["mask"].sum() for batch in batches)
        return TokenCounts(torch.as_tensor(targets), torch.as_tensor(states))
