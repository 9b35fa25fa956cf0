"""What is minimised: the student and its losses as one module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from operator import or_
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistill import linear_cross_vocab_kl, linear_softmax_kl
from fastdistill.outputs import CrossVocabOutput, LossOutput
from fastdistill.training.attention import AttentionLoss
from fastdistill.training.attention_alignment import AttentionAlignmentLoss
from fastdistill.training.balance import MAIN, Balancer, gradient_norm
from fastdistill.training.blocks import IGNORED, Batch
from fastdistill.training.capture import Wanted, capturing, first_input
from fastdistill.training.clock import Clock
from fastdistill.training.component import Component
from fastdistill.training.config import Config
from fastdistill.training.contrastive import ContrastiveLoss
from fastdistill.training.curriculum import Curriculum
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.layerwise import LayerwiseLoss
from fastdistill.training.measures import (
    Measures,
    States,
    cross_entropy,
    cross_entropy_and_retention,
    cross_vocab_retention,
)
from fastdistill.training.models import parts
from fastdistill.training.pairing import ONE_TOKENIZER, Pairing
from fastdistill.training.router import RoutingFeatureLoss
from fastdistill.training.schedule import course
from fastdistill.training.teacher import TeacherStates
from fastdistill.training.window import Counts, Losses


@dataclass(frozen=True)
class Weights:
    """Weight of each component in the total; one of weight 0 is not built."""

    kd: float = 0.0
    lm: float = 0.0
    layerwise: float = 0.0
    attention: float = 0.0
    attention_alignment: float = 0.0
    routing_feature: float = 0.0
    load_balance: float = 0.0
    contrastive: float = 0.0

    @classmethod
    def of(cls, config: Config) -> Weights:
        weights = cls(**{f.name: getattr(config, f"{f.name}_weight") for f in fields(cls)})
        return weights if weights.routing_feature else replace(weights, load_balance=0.0)

    def active(self) -> dict[str, float]:
        return {name: weight for name, weight in vars(self).items() if weight != 0}


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
        temperature: float | Callable[[float], float] = 1.0,
        divergence: str = "forward_kl",
        components: Iterable[Component] = (),
        curriculum: Curriculum | None = None,
        balancer: Balancer | None = None,
        pairing: Pairing = ONE_TOKENIZER,
        drop_masked: bool = True,
    ):
        """`components` are those beside `kd` and `lm` that have a weight; `temperature` may be a function of progress,
        from 0 at the first optimizer step to 1 at the last, and is then as at its beginning until `begin`.

        `drop_masked` leaves positions that predict nothing out of the output heads' products; a GPU is waited for
        to know how many there are.
        """
        super().__init__()
        self.components = nn.ModuleDict({component.name: component for component in components})
        weighted = weights.active().keys() - {"kd", "lm", "load_balance"}
        if weighted != self.components.keys():
            raise ValueError(f"components must be those with a weight, {weighted}, got {set(self.components)}")
        self.student, self.weights, self.pairing = student, weights, pairing
        self.course, self.divergence, self.drop_masked = temperature, divergence, drop_masked
        self.temperature = temperature(0.0) if callable(temperature) else temperature
        self.curriculum, self.balancer = curriculum, balancer
        self.active, self.measures_gradients = frozenset(weights.active()), False
        self.parts = [parts(student)]  # in a list: not registered a second time
        self.clock: Clock | None = None

    @classmethod
    def of(
        cls, config: Config, student: PreTrainedModel, teacher: PreTrainedModel, layer_map: LayerMap, pairing: Pairing
    ) -> DistillationModule:
        weights = Weights.of(config)
        build: dict[str, Callable[[], Component]] = {
            "layerwise": lambda: LayerwiseLoss.of(config, layer_map),
            "attention": lambda: AttentionLoss.of(config, student, teacher, layer_map),
            "attention_alignment": lambda: AttentionAlignmentLoss.of(config, teacher, layer_map),
            "routing_feature": lambda: RoutingFeatureLoss.of(config, teacher, layer_map),
            "contrastive": lambda: ContrastiveLoss.of(config, layer_map),
        }
        components = [make() for name, make in build.items() if name in weights.active()]
        temperature = config.temperature
        if config.temperature_end is not None:
            ends = {"first": temperature, "last": config.temperature_end}
            temperature = partial(course, **ends, shape=config.temperature_schedule)
        return cls(
            student,
            weights,
            temperature=temperature,
            divergence=config.divergence,
            components=components,
            curriculum=Curriculum(config.curriculum, weights.active()),
            balancer=Balancer.of(config, [component.name for component in components]),
            pairing=pairing,
            drop_masked=config.packing == "padded",
        )

    def announced(self, total_steps: int) -> str:
        """For the log, a line of its own: at which steps components begin; empty if all are there from the start."""
        plan = self.curriculum.describe(total_steps) if self.curriculum else ""
        return plan and f"\ncurriculum: {plan}"

    def begin(self, step: int, total_steps: int) -> None:
        """Set what an optimizer step is to know of its number, `step`, 0-based: temperature, curriculum, schedules."""
        changed, progress = step == 0, step / max(1, total_steps - 1)
        if callable(self.course):
            self.temperature = self.course(progress)
        if self.curriculum:
            self.active = self.curriculum.active(step, total_steps)
            changed |= self.active != self.curriculum.active(step - 1, total_steps)
        for component in self._built():
            component.begin(progress)
        self.measures_gradients = bool(self.balancer and self.balancer.measures(step, changed))

    def balance(self, losses: Losses[Tensor]) -> None:
        """Take in the numbers of a whole window: if weights are balanced, those of the next follow from them."""
        if self.balancer:
            self.balancer.update(losses)

    @property
    def needs_teacher(self) -> bool:
        return bool(self.active - {"lm"})

    def _built(self) -> list[Component]:
        """Components that count at this step."""
        return [cast("Component", built) for name, built in self.components.items() if name in self.active]

    def _weight(self, name: str) -> float | Tensor:
        """What multiplies a component at this step."""
        if name not in self.active:
            return 0.0
        return getattr(self.weights, name) * (self.balancer.factor(name) if self.balancer else 1.0)

    @property
    def of_teacher(self) -> Wanted:
        """What `forward` wants of the teacher beside what its head takes."""
        return reduce(or_, (component.of_teacher for component in self._built()), Wanted())

    def forward(self, batch: Batch, teacher: TeacherStates | None, counts: Counts) -> Losses:
        """Losses of `batch`: sums over tokens are divided by the window's counts, means of it by its micro-batches."""
        base, blocks, built = self.parts[0].base, self.parts[0].blocks, self._built()
        of_student = reduce(or_, (component.of_student for component in built), Wanted())
        with capturing(blocks, of_student) as captured, first_input(blocks) as embedded:
            hidden = base(**batch.student.fed(), use_cache=False).last_hidden_state
        if self.clock:
            self.clock.mark("student")

        total, raw = self._softmax_losses(hidden, batch, teacher, counts)
        weighted, diagnostics = {name: self._weight(name) * loss for name, loss in raw.items()}, {}
        if callable(self.course):
            diagnostics["temperature"] = torch.full((), self.temperature, device=total.device)
        for component in built:
            assert teacher is not None
            terms = component(captured, teacher.captured, batch, counts)
            diagnostics |= terms.diagnostics
            for name, loss in terms.losses.items():
                weight = self._weight(name)
                if name not in self.active:  # the router's load balance, of weight 0
                    diagnostics[name] = loss.detach()
                    continue
                total = total + weight * loss
                raw[name], weighted[name] = loss.detach(), (weight * loss).detach()
            if self.measures_gradients:
                # Of a second forward pass of the loss: what is made by a kernel can be differentiated once.
                again = component(captured, teacher.captured, batch, counts).losses[component.name]
                diagnostics[f"gradient norm of {component.name}"] = gradient_norm(again, embedded[0])
        if self.measures_gradients:
            main, _ = self._softmax_losses(hidden, batch, teacher, counts)
            diagnostics[f"gradient norm of {MAIN}"] = gradient_norm(main, embedded[0])
        if self.clock:
            self.clock.mark("loss")
        return Losses(total, raw, weighted, diagnostics)

    def _softmax_losses(
        self, hidden: Tensor, batch: Batch, teacher: TeacherStates | None, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is made of the output heads: the weighted sum of `kd` and `lm`, and each unweighted."""
        kd, lm = self._weight("kd"), self._weight("lm")
        how = {"temperature": self.temperature, "divergence": self.divergence}
        total, raw = hidden.new_zeros((), dtype=torch.float32), {}
        fused = teacher if kd and self.pairing.is_one else None
        if fused or lm:
            out = self.linear_loss(
                hidden,
                batch,
                fused,
                **how,
                kl_weight=kd if fused else 0.0,
                ce_weight=lm,
                num_tokens=counts["lm"],
                drop_masked=self.drop_masked or not hidden.is_cuda,
            )
            total = out.loss
            if out.kl is not None:
                raw["kd"] = self.temperature**2 * out.kl
            if lm and out.ce is not None:
                raw["lm"] = out.ce
        if kd and not fused:
            assert teacher is not None
            crossed = self._cross_vocab_loss(
                hidden, batch, teacher, **how, method=self.pairing.method, num_tokens=counts["kd"]
            )
            total = total + kd * crossed.loss
            raw["kd"] = crossed.loss.detach()
        return total, raw

    def measure(self, batch: Batch, teacher: TeacherStates | None) -> Measures:
        """What is evaluated; like `forward` it may touch the student's base and head."""
        head = self.parts[0].head
        hidden = self.parts[0].base(**batch.student.fed(), use_cache=False).last_hidden_state
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

    def count(self, batches: Sequence[Batch]) -> Counts:
        """What divides the sums of a window of micro-batches."""
        targets = torch.stack([(batch.targets != IGNORED).sum() for batch in batches]).sum()
        pairs = [len(batch.pairs.row) for batch in batches if batch.pairs is not None]
        counts = {"lm": targets, "kd": torch.full_like(targets, sum(pairs)) if pairs else targets}
        for component in self._built():
            tokens = [counted for batch in batches if (counted := component.count(batch)) is not None]
            if tokens:
                counts[component.name] = torch.stack(tokens).sum()
        return counts | {"micro_batches": torch.full_like(targets, len(batches))}
