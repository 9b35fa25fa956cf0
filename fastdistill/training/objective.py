"""What is minimised: the student and its losses as one module, and the teacher that it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from fastdistill import linear_cross_vocab_kl, linear_softmax_kl
from fastdistill.outputs import CrossVocabOutput, LossOutput
from fastdistill.training.blocks import IGNORED, Batch, Inputs
from fastdistill.training.clock import Clock
from fastdistill.training.config import Config
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.layerwise import LayerwiseLoss
from fastdistill.training.measures import (
    Measures,
    States,
    cross_entropy,
    cross_entropy_and_retention,
    cross_vocab_retention,
)
from fastdistill.training.models import captured_outputs, parts
from fastdistill.training.pairing import ONE_TOKENIZER, Pairing


class TeacherStates(NamedTuple):
    """What the losses need of the teacher for one batch: what its head takes, the head, and mapped block outputs."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    layers: list[Tensor]


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
    def __call__(self, inputs: Inputs, layers: Sequence[int] = ()) -> TeacherStates:
        """States for `[B, S]` ids of the teacher's own tokenizer; `layers` are block numbers."""
        arguments = {name: value.to(self.model.device) for name, value in fed(inputs).items()}
        with captured_outputs(self.parts.blocks, layers) as outputs:
            hidden = self.parts.base(**arguments, use_cache=False).last_hidden_state
        states = [outputs[i].to(self.device) for i in layers]
        return TeacherStates(hidden.to(self.device), self.weight, self.bias, states)


def fed(inputs: Inputs) -> dict[str, Tensor]:
    """The arguments with which a base model reads `inputs`.

    Padding on the right needs no mask; positions that begin anew tell transformers where documents part.
    """
    return {name: value for name, value in inputs._asdict().items() if value is not None}


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
    """Divisors of one whole accumulation window: tokens predicted, tokens compared with the teacher, and tokens whose
    states are compared.
    """

    targets: Tensor
    compared: Tensor
    states: Tensor


class Losses(NamedTuple):
    """One micro-batch's share of the window's loss: the total, differentiable, and each component unweighted.

    `diagnostics` are numbers of this micro-batch alone that are to be seen and are in no loss.
    """

    total: Tensor
    raw: dict[str, Tensor]
    diagnostics: dict[str, Tensor]


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
        layerwise: LayerwiseLoss | None = None,
        pairing: Pairing = ONE_TOKENIZER,
        drop_masked: bool = True,
    ):
        """`drop_masked` leaves positions that predict nothing out of the output heads' products; a GPU is waited for
        to know how many there are.
        """
        super().__init__()
        if bool(weights.layerwise) != (layerwise is not None):
            raise ValueError(
                f"layerwise must be given where its weight is not 0 and only there, got {layerwise} with {weights}"
            )
        self.student, self.weights, self.pairing = student, weights, pairing
        self.temperature, self.divergence, self.layerwise = temperature, divergence, layerwise
        self.parts = [parts(student)]  # in a list: not registered a second time
        self.drop_masked = drop_masked
        self.clock: Clock | None = None

    @classmethod
    def of(cls, config: Config, student: PreTrainedModel, layer_map: LayerMap, pairing: Pairing) -> DistillationModule:
        how = {"temperature": config.temperature, "divergence": config.divergence}
        layerwise = LayerwiseLoss.of(config, layer_map) if config.layerwise_weight else None
        many_masked = config.packing == "padded"
        return cls(student, Weights.of(config), **how, layerwise=layerwise, pairing=pairing, drop_masked=many_masked)

    @property
    def teacher_layers(self) -> list[int]:
        """Teacher blocks whose outputs `forward` wants."""
        return self.layerwise.teacher_blocks if self.layerwise else []

    def forward(self, batch: Batch, teacher: TeacherStates | None, counts: TokenCounts) -> Losses:
        """Losses of `batch`, each token-wise sum divided by the window's own count."""
        base, blocks = self.parts[0].base, self.parts[0].blocks
        with captured_outputs(blocks, self.layerwise.student_blocks if self.layerwise else []) as outputs:
            hidden = base(**fed(batch.student), use_cache=False).last_hidden_state
        if self.clock:
            self.clock.mark("student")

        total, raw = self._softmax_losses(hidden, batch, teacher, counts)
        diagnostics = {}
        if self.layerwise:
            assert teacher is not None
            layerwise, founding = self.layerwise(outputs, teacher.layers, batch, counts.states)
            total = total + self.weights.layerwise * layerwise
            raw["layerwise"], diagnostics["layerwise_raw"] = layerwise.detach(), founding
        if self.clock:
            self.clock.mark("loss")
        return Losses(total, raw, diagnostics)

    def _softmax_losses(
        self, hidden: Tensor, batch: Batch, teacher: TeacherStates | None, counts: TokenCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is made of the output heads: the weighted sum of `kd` and `lm`, and each unweighted."""
        weights, how = self.weights, {"temperature": self.temperature, "divergence": self.divergence}
        total, raw = hidden.new_zeros((), dtype=torch.float32), {}
        fused = teacher if weights.kd and self.pairing.is_one else None
        if fused or weights.lm:
            out = self.linear_loss(
                hidden,
                batch,
                fused,
                **how,
                kl_weight=weights.kd if fused else 0.0,
                ce_weight=weights.lm,
                num_tokens=counts.targets,
                drop_masked=self.drop_masked or not hidden.is_cuda,
            )
            total = out.loss
            if out.kl is not None:
                raw["kd"] = self.temperature**2 * out.kl
            if weights.lm and out.ce is not None:
                raw["lm"] = out.ce
        if weights.kd and not fused:
            assert teacher is not None
            crossed = self._cross_vocab_loss(
                hidden, batch, teacher, **how, method=self.pairing.method, num_tokens=counts.compared
            )
            total = total + weights.kd * crossed.loss
            raw["kd"] = crossed.loss.detach()
        return total, raw

    def measure(self, batch: Batch, teacher: TeacherStates | None) -> Measures:
        """What is evaluated; like `forward` it may touch the student's base and head."""
        head = self.parts[0].head
        hidden = self.parts[0].base(**fed(batch.student), use_cache=False).last_hidden_state
        predicted = (batch.targets != IGNORED).nonzero(as_tuple=True)
        targets, places = batch.targets[predicted], batch.student.places()
        student, retained, compared = States(hidden[predicted], head.weight, head.bias), None, predicted
        if teacher is None:
            loss = cross_entropy(student, targets)
        elif self.pairing.is_one:
            taught = States(teacher.hidden[predicted], teacher.weight, teacher.bias)
            loss, retained = cross_entropy_and_retention(student, taught, targets, self.pairing.vocab_size)
        else:
            assert batch.pairs is not None
            assert self.pairing.shared_ids is not None
            loss = cross_entropy(student, targets)
            row, position, teacher_position = batch.pairs
            compared = row, position
            taught = States(teacher.hidden[row, teacher_position], teacher.weight, teacher.bias)
            retained = cross_vocab_retention(student._replace(hidden=hidden[compared]), taught, self.pairing.shared_ids)
        sizes = self.pairing.text_bytes
        return Measures(
            loss,
            places[predicted],
            sizes[0][targets] if sizes else None,
            retained,
            places[compared] if retained else None,
        )

    def linear_loss(self, hidden: Tensor, batch: Batch, teacher: TeacherStates | None, **how: Any) -> LossOutput:
        """`linear_softmax_kl` of the student's final states `[B, S, D]`, and a teacher's of the same tokenizer."""
        head = self.parts[0].head
        return linear_softmax_kl(
            hidden,
            head.weight,
            teacher and teacher.hidden,
            teacher and teacher.weight,
            batch.targets,
            student_bias=head.bias,
            teacher_bias=teacher and teacher.bias,
            vocab_size=self.pairing.vocab_size if teacher else None,
            **how,
        )

    def _cross_vocab_loss(self, hidden: Tensor, batch: Batch, teacher: TeacherStates, **how: Any) -> CrossVocabOutput:
        """`linear_cross_vocab_kl` at the positions at which two tokenizers have read the same."""
        assert batch.pairs is not None
        row, student_position, teacher_position = batch.pairs
        head = self.parts[0].head
        return linear_cross_vocab_kl(
            hidden[row, student_position],
            head.weight,
            teacher.hidden[row, teacher_position],
            teacher.weight,
            self.pairing.shared_ids,
            student_bias=head.bias,
            teacher_bias=teacher.bias,
            **how,
        )

    def count(self, batches: Sequence[Batch]) -> TokenCounts:
        """Divisors of a window of micro-batches."""
        targets = torch.stack([(batch.targets != IGNORED).sum() for batch in batches]).sum()
        states = torch.zeros_like(targets)
        if self.layerwise:
            states = torch.stack([self.layerwise.compared(batch).sum() for batch in batches]).sum()
        pairs = [len(batch.pairs.row) for batch in batches if batch.pairs is not None]
        return TokenCounts(targets, torch.full_like(targets, sum(pairs)) if pairs else targets, states)
