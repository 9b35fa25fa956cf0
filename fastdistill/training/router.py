"""The routing component: the student's states against the mixture of the teacher's that a router chooses per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdistill import layer_loss
from fastdistill.training.blocks import Batch
from fastdistill.training.capture import Captured, Wanted, experts_of
from fastdistill.training.component import Component, Counterparts, Terms, normalised, projection, wide
from fastdistill.training.config import Config, UsageError
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.models import parts
from fastdistill.training.window import Counts

_REACHED = 0.5
"""The share of the run after which a token's mixture is of as few candidates as at its end."""
_TEMPERATURES = 2.0, 0.5
"""Of the softmax over candidates, at the first and at the last step."""


def chosen(progress: float, candidates: int, last: int) -> int:
    """Of how many `candidates` a mixture is: all at progress 0, `last` (or all, if they are fewer) from 1/2 on, and
    between them linear, rounded.
    """
    last = min(last, candidates)
    return round(candidates + (last - candidates) * min(1.0, progress / _REACHED))


def sharpness(progress: float) -> float:
    """The softmax's temperature: from 2 to 0.5, geometrically."""
    first, last = _TEMPERATURES
    return first * (last / first) ** progress


class Offer(NamedTuple):
    """The C candidates of each token, constants and 0 where no token counts.

    `states` `[B, S, C, D]` are layer-normalised, in fp32 (or fp64); `identities` `[B, S, C]` say which layer or expert
    each is; `log_weights` `[B, S, C]` are of the weight that the teacher itself gives it, 0 where it gives none.
    """

    states: Tensor
    identities: Tensor
    log_weights: Tensor


@dataclass(frozen=True)
class Layers:
    """Candidates are the outputs of these blocks of the teacher, the same for every token."""

    blocks: tuple[int, ...]

    @property
    def wanted(self) -> Wanted:
        return Wanted(outputs=frozenset(self.blocks))

    @property
    def count(self) -> int:
        return len(self.blocks)

    def offer(self, teacher: Captured, common: Counterparts) -> Offer:
        here = [normalised(_of_teacher(teacher.outputs[block], common)) for block in self.blocks]
        states = torch.stack(here, -2)
        identities = torch.arange(self.count, device=states.device).expand(states.shape[:-1])
        return Offer(states, identities, torch.zeros_like(states[..., 0]))

    def described(self, loads: Tensor) -> dict[str, Tensor]:
        """For the log, what share of the weight each has, `[C]`."""
        return {f"router load of block {b}": load for b, load in zip(self.blocks, loads.unbind(), strict=True)}


@dataclass(frozen=True)
class Experts:
    """Candidates are the outputs of those experts that one of the teacher's blocks gave a token, of `count` it has."""

    block: int
    count: int

    @classmethod
    def of(cls, teacher: PreTrainedModel) -> Experts:
        """Those of the last block that has any.

        Raises:
            UsageError: none has.
        """
        blocks = parts(teacher).blocks
        for number in reversed(range(len(blocks))):
            try:
                return cls(number, cast("int", experts_of(blocks[number]).num_experts))
            except UsageError:
                continue
        raise UsageError(f"--routing-over experts: no block of {type(teacher).__name__}, the teacher, has experts")

    @property
    def wanted(self) -> Wanted:
        return Wanted(experts=frozenset({self.block}))

    def offer(self, teacher: Captured, common: Counterparts) -> Offer:
        rows = len(common.mask)
        outputs, experts, weights = (
            _of_teacher(part.reshape(rows, -1, part[0].numel()), common).unflatten(-1, part.shape[1:])
            for part in teacher.experts[self.block]
        )
        weights = wide(weights)
        return Offer(normalised(outputs), experts, weights.clamp(min=torch.finfo(weights.dtype).tiny).log())

    def described(self, loads: Tensor) -> dict[str, Tensor]:
        """For the log, the largest and the smallest share of the weight that one has, of all `[E]`."""
        return {"router load, largest": loads.max(), "router load, smallest": loads.min()}


class Scores(NamedTuple):
    """What a router says of each token, `capacity` `[B, S]`, and of its candidates, `logits` and `gap` `[B, S, C]`."""

    logits: Tensor
    capacity: Tensor
    gap: Tensor


class Router(nn.Module):
    """How well each candidate suits a token of the student.

    `importance + (2 capacity - 1) reach gap`: importance is a linear score of the candidate, plus one learned for its
    identity, plus the logarithm of the teacher's own weight; capacity, within (0, 1), is read from the student's state;
    gap, within [0, 2], is 1 - the correlation of both; reach > 0 is learned, and 1 at first. So of candidates alike in
    importance a token of capacity above 1/2 goes for the farther, and one below for the nearer. That is a form, not an
    aim: what the router learns by is less at the nearer for every token.
    """

    def __init__(self, width: int, count: int):
        """`width` is D of all states; identities are 0 to `count` - 1."""
        super().__init__()
        self.capacity = nn.Linear(width, 1)
        self.importance = nn.Linear(width, 1, bias=False)
        # Nothing is preferred at first, and all processes begin alike.
        for parameter in (*self.capacity.parameters(), *self.importance.parameters()):
            nn.init.zeros_(parameter)
        self.preference = nn.Parameter(torch.zeros(count))
        self.log_reach = nn.Parameter(torch.zeros(1))  # of one dimension: FSDP2 takes none of 0

    def forward(self, states: Tensor, offer: Offer) -> Scores:
        """Of layer-normalised `states` of the student, `[B, S, D]`."""
        capacity = self.capacity(states).sigmoid()
        gap = 1 - (offer.states @ states[..., None]).squeeze(-1) / states.shape[-1]
        preference = self.preference.expand(*states.shape[:-1], -1).gather(-1, offer.identities)
        importance = self.importance(offer.states).squeeze(-1) + preference + offer.log_weights
        return Scores(importance + (2 * capacity - 1) * self.log_reach.exp() * gap, capacity.squeeze(-1), gap)


class RoutingFeatureLoss(Component):
    """1 - the correlation between the student's states and, for each token, a mixture of the teacher's.

    The student's are those of its last mapped block, projected where the widths differ. What they are compared with is
    `sum_c weights_c candidate_c` of layer-normalised candidates, with the softmax of a `Router`'s logits over
    temperature at the k largest, 0 elsewhere. k falls from all candidates to `top_k` by half of the run, and the
    temperature from 2 to 0.5 over all of it; both follow from the progress alone.

    Student and router have the gradient of this one number, each with the other held constant: the router reads the
    student, and the student cannot change what is chosen. Both make it less, so the router seeks what is near already.
    A single candidate's weight is 1 whatever the router does: with `top_k` 1 it learns by this number for half the run.

    What spreads it is `load_balance`, the loss of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961, equations 4
    to 6) as `sum_e f_e P_e / o_e` over the identities e of candidates, of which the router alone has the gradient. P is
    the mean softmax over all candidates. f, a constant, is the share of the weights: of one choice a token that is the
    share of choices, as there; of all candidates, where the share of choices is 1 / C whatever the router does, it can
    still tell. o is the share of offers, 1 / C where each token may choose any of C, as there. It is 1 where each is
    used as often as it is offered, so that a teacher whose own router prefers some experts is no imbalance of this one.

    Both are means over a micro-batch's tokens and then over the window's micro-batches, which weigh the same however
    many tokens they have. The candidates are held in fp32, 4 B S C D bytes.
    """

    name = "routing_feature"

    def __init__(
        self,
        student_block: int,
        source: Layers | Experts,
        *,
        widths: tuple[int, int],
        projected: str = "learned",
        top_k: int = 2,
    ):
        """`student_block` is 0-based, `widths` the student's and the teacher's; `projected` is "learned" or "fixed"."""
        super().__init__()
        self.student_block, self.source, self.top_k = student_block, source, top_k
        self.of_student, self.of_teacher = Wanted(outputs=frozenset({student_block})), source.wanted
        self.projection = projection(widths, projected)
        self.router = Router(widths[1], source.count)
        self.begin(0.0)

    @classmethod
    def of(cls, config: Config, teacher: PreTrainedModel, layer_map: LayerMap) -> RoutingFeatureLoss:
        """As the settings ask for it.

        Raises:
            UsageError: experts are to be chosen from, and the teacher has none.
        """
        blocks = dict.fromkeys(block for _, block in layer_map.pairs)
        return cls(
            layer_map.pairs[-1][0],
            Experts.of(teacher) if config.routing_over == "experts" else Layers(tuple(blocks)),
            widths=layer_map.widths,
            projected=config.projection,
            top_k=config.routing_top_k,
        )

    def begin(self, progress: float) -> None:
        self.progress, self.temperature = progress, sharpness(progress)

    def forward(self, student: Captured, teacher: Captured, batch: Batch, counts: Counts) -> Terms:
        """Diagnostics are means over tokens: the entropy of the weights in nats, capacity, the gap weighted by them,
        and the shares of weight; and k.
        """
        common = Counterparts.of(batch)
        mask, micro_batches = common.mask, counts["micro_batches"]
        # What does not count may be NaN, and would be in the gradients of matrices, where it is multiplied by 0.
        projected = self.projection(student.outputs[self.student_block].masked_fill(~mask[..., None], 0))
        with torch.autocast(mask.device.type, enabled=False):
            offer = self.source.offer(teacher, common)
            scores = self.router(normalised(projected.detach()), offer)
            logits, k = scores.logits / self.temperature, chosen(self.progress, offer.states.shape[-2], self.top_k)
            top = logits.topk(k)
            weights = torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))
            target = (weights[..., None, :] @ offer.states).squeeze(-2)
        distance = _distance(projected, target, mask)
        # It is symmetric in the two, so that with their places changed it has the gradient of the other.
        of_router = _distance(target, projected, mask)
        loss = distance + (of_router - of_router.detach())

        def share(values: Tensor) -> Tensor:
            """Of candidates `[B, S, C]`, by identity, `[E]`."""
            spread = values.new_zeros(*mask.shape, self.source.count).scatter(-1, offer.identities, values)
            return _mean(spread, mask)

        used = weights.detach()
        load, offered = share(used), share(torch.full_like(used, 1 / used.shape[-1]))
        # What nobody was offered has no load.
        balance = (load * share(logits.softmax(-1)) / offered.clamp(min=torch.finfo(offered.dtype).tiny)).sum()
        diagnostics = {
            "router entropy": _mean(torch.special.entr(used).sum(-1), mask),
            "router capacity": _mean(scores.capacity.detach(), mask),
            "router gap": _mean((used * scores.gap).sum(-1), mask),
            "router k": load.new_full((), k),
            **self.source.described(load),
        }
        return Terms({self.name: loss / micro_batches, "load_balance": balance / micro_batches}, diagnostics)


def _of_teacher(values: Tensor, common: Counterparts) -> Tensor:
    """The teacher's `[B, St, X]` at the student's positions, constants `[B, S, X]`, 0 where none counts."""
    return common.of_teacher(values.detach()).masked_fill(~common.mask[..., None], 0)


def _distance(states: Tensor, constants: Tensor, mask: Tensor) -> Tensor:
    """Mean 1 - correlation, with the gradient of `states` alone."""
    return 0.5 * layer_loss([states], [constants.detach()], mask, metric="mse", normalize="layer_norm").loss


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens of `mask`: `[B, S, ...]` to `[...]`, 0 where there are none; others must be finite."""
    counted = mask.view(*mask.shape, *[1] * (values.ndim - 2))
    return (values * counted).sum((0, 1)) / mask.sum().clamp(min=1)
