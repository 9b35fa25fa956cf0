"""The routing component: by hand token by token, what its gradients are of, what does not count, and no collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, MixtralConfig, Qwen2MoeConfig

from fastdistill import reference
from fastdistill.training import router
from fastdistill.training.blocks import Batch, Inputs, Pairs
from fastdistill.training.capture import Captured, ExpertOutputs, Wanted, capturing, experts_of
from fastdistill.training.component import Terms
from fastdistill.training.config import Config, UsageError
from fastdistill.training.engine import make_optimizer
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.models import parts
from fastdistill.training.objective import DistillationModule
from fastdistill.training.pairing import ONE_TOKENIZER
from fastdistill.training.router import Experts, Layers, RoutingFeatureLoss, chosen, sharpness
from fastdistill.training.teacher import Teacher
from tests.training.conftest import STAGE
from tests.training.families import EXPERTS, FAMILIES, GROUPED, make

MAP = LayerMap(((0, 0), (0, 1), (1, 1), (1, 3)), "0:0,0:1,1:1,1:3", 4, (8, 16))
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
PAIRS = Pairs(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 2, 5, 1, 4]), torch.tensor([0, 1, 3, 2, 1]))


def small_student(layers: int = 2, width: int = 8) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"vocab_size": 61, "n_positions": 32, "n_embd": width, "n_head": 2, "n_layer": layers}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, initializer_range=0.3)).eval()


def one_tokenizer() -> Batch:
    inputs = Inputs(torch.randint(61, (2, 6), generator=torch.Generator().manual_seed(2)), None)
    return Batch(inputs, MASK, torch.zeros(2, 6, dtype=torch.int64), inputs, None)


def two_tokenizers() -> Batch:
    teacher = Inputs(torch.randint(61, (2, 4), generator=torch.Generator().manual_seed(3)), None)
    return one_tokenizer()._replace(mask=torch.ones(2, 6, dtype=torch.bool), teacher=teacher, pairs=PAIRS)


class Seen(NamedTuple):
    """A loss and what it is given, in float64; its router has learned to prefer and to reach."""

    loss: RoutingFeatureLoss
    student: Captured
    teacher: Captured
    batch: Batch

    def __call__(self, micro_batches: int = 1) -> Terms:
        return self.loss(self.student, self.teacher, self.batch, {"micro_batches": torch.tensor(micro_batches)})


SOURCES = {"layers": ("llama", "layers"), "mixtral": ("mixtral", "experts"), "qwen3-moe": ("qwen3-moe", "experts")}


def seen(source: str, batch: Batch, progress: float = 0.25) -> Seen:
    """What the tiny models say of a batch; the student's states and the teacher's take gradients."""
    family, over = SOURCES[source]
    teacher, student = make(FAMILIES[family]), small_student()
    loss = RoutingFeatureLoss.of(Config(routing_over=over), teacher, MAP).double()
    loss.begin(progress)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in loss.router.parameters():
            parameter.normal_()
        loss.router.log_reach.fill_(0.7)
    captured = []
    for model, inputs, wanted in ((student, batch.student, loss.of_student), (teacher, batch.teacher, loss.of_teacher)):
        with capturing(parts(model).blocks, wanted) as found, torch.no_grad():
            parts(model).base(**inputs.fed(), use_cache=False)
        captured.append(changed(found, lambda states: states.double().requires_grad_()))
    return Seen(loss, captured[0], captured[1], batch)


def changed(captured: Captured, change: Callable[[Tensor], Tensor]) -> Captured:
    """With `change` for each `[B, S, D]` of floating point, experts' too."""
    experts = {}
    for block, each in captured.experts.items():
        rows = [part.unflatten(0, (2, -1)).flatten(2) for part in each]
        rows = [change(part) if part.is_floating_point() else part for part in rows]
        experts[block] = ExpertOutputs(*(new.reshape(old.shape) for new, old in zip(rows, each, strict=True)))
    return Captured({block: change(output) for block, output in captured.outputs.items()}, {}, experts)


# By hand --------------------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    state: Tensor
    identity: int
    prior: float
    """The weight that the teacher's router gives it."""


def normal(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (normal(a) - normal(b)).square().mean() / 2


def candidates(given: Seen, row: int, position: int) -> list[Candidate]:
    """Of one of the teacher's tokens."""
    if isinstance(given.loss.source, Layers):
        states = [given.teacher.outputs[block][row, position].detach() for block in given.loss.source.blocks]
        return [Candidate(normal(state), i, 1.0) for i, state in enumerate(states)]
    outputs, experts, weights = (part.detach() for part in given.teacher.experts[given.loss.source.block])
    token = row * given.batch.teacher.input_ids.shape[1] + position
    return [
        Candidate(normal(outputs[token, i]), int(experts[token, i]), float(weights[token, i]))
        for i in range(outputs.shape[1])
    ]


def tokens(batch: Batch) -> list[tuple[int, int, int]]:
    """Row and positions, the student's and the teacher's, of those that count."""
    if batch.pairs is not None:
        return [(int(r), int(i), int(j)) for r, i, j in zip(*batch.pairs, strict=True)]
    return [(row, i, i) for row in range(2) for i in range(6) if batch.mask[row, i]]


class ByHand(NamedTuple):
    for_student: Tensor
    """The loss with its targets constant."""
    for_router: Tensor
    """The loss with the student constant."""
    balance: Tensor
    diagnostics: dict[str, float]


def by_hand(given: Seen, k: int, temperature: float) -> ByHand:
    loss, own = given.loss, given.loss.router
    count = loss.source.count
    of_student, of_router, entropies, capacities, gaps = [], [], [], [], []
    used, probable, offered = ([torch.zeros((), dtype=torch.float64) for _ in range(count)] for _ in range(3))
    for row, position, teacher_position in tokens(given.batch):
        mine = loss.projection(given.student.outputs[1][row, position])
        fixed = normal(mine.detach())
        capacity = 1 / (1 + (-(own.capacity.weight[0] @ fixed + own.capacity.bias[0])).exp())
        choices, logits, apart = candidates(given, row, teacher_position), [], []
        for choice in choices:
            apart.append(1 - float(choice.state @ fixed) / 16)
            importance = own.importance.weight[0] @ choice.state + own.preference[choice.identity]
            reach = (2 * capacity - 1) * own.log_reach.exp()[0] * apart[-1]
            logits.append(importance + math.log(choice.prior) + reach)
        best = sorted(range(len(choices)), key=lambda c: -logits[c].item())[:k]
        whole = sum((each / temperature).exp() for each in logits)
        kept = sum((logits[c] / temperature).exp() for c in best)
        target, entropy, gap = torch.zeros(16, dtype=torch.float64), 0.0, 0.0
        for c, choice in enumerate(choices):
            offered[choice.identity] += 1 / len(choices)
            probable[choice.identity] = probable[choice.identity] + (logits[c] / temperature).exp() / whole
            if c in best:
                weight = (logits[c] / temperature).exp() / kept
                target = target + weight * choice.state
                used[choice.identity] += weight.item()
                entropy -= weight.item() * math.log(weight.item())
                gap += weight.item() * apart[c]
        of_student.append(distance(mine, target.detach()))
        of_router.append(distance(mine.detach(), target))
        entropies.append(entropy)
        capacities.append(capacity.item())
        gaps.append(gap)
    n = len(entropies)
    pairs = zip(used, probable, offered, strict=True)
    balance = sum((f / n * (p / n) / (o / n) for f, p, o in pairs if o > 0), torch.zeros((), dtype=torch.float64))
    loads = [float(f) / n for f in used]
    diagnostics = {"router entropy": sum(entropies) / n, "router capacity": sum(capacities) / n, "router k": k}
    diagnostics["router gap"] = sum(gaps) / n
    if isinstance(loss.source, Layers):
        diagnostics |= {f"router load of block {b}": load for b, load in zip((0, 1, 3), loads, strict=True)}
    else:
        diagnostics |= {"router load, largest": max(loads), "router load, smallest": min(loads)}
    return ByHand(torch.stack(of_student).mean(), torch.stack(of_router).mean(), balance, diagnostics)


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def gradients(value: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(of), retain_graph=True, allow_unused=True, materialize_grads=True))


# k of three layers at 0 and 1, of two experts at 0; in each case the temperature is 2^(1 - 2 progress).
CASES = [("layers", 0.0, 3), ("layers", 1.0, 2), ("mixtral", 0.0, 2), ("qwen3-moe", 0.75, 2)]


@pytest.mark.parametrize("make_batch", [one_tokenizer, two_tokenizers])
@pytest.mark.parametrize(("source", "progress", "k"), CASES)
def test_it_is_its_definition_and_so_are_its_gradients(source, progress, k, make_batch):
    given = seen(source, make_batch(), progress)
    check_by_hand(given, k, 2 ** (1 - 2 * progress))


def test_of_one_of_the_experts_too():
    given = seen("mixtral", one_tokenizer(), 1.0)
    given.loss.top_k = 1
    check_by_hand(given, 1, 0.5)


def check_by_hand(given: Seen, k: int, temperature: float) -> None:
    terms, expected = given(), by_hand(given, k, temperature)
    assert_same(terms.losses["routing_feature"], expected.for_student)
    assert_same(terms.losses["load_balance"], expected.balance)
    assert {n: v.item() for n, v in terms.diagnostics.items()} == pytest.approx(expected.diagnostics, rel=1e-9)

    students = [given.student.outputs[1], *given.loss.projection.parameters()]
    routers, loss, balance = list(given.loss.router.parameters()), *terms.losses.values()
    for actual, by_definition, of in (
        (loss, expected.for_student, students),
        (loss, expected.for_router, routers),
        (balance, expected.balance, routers),
    ):
        for one, other in zip(gradients(actual, of), gradients(by_definition, of), strict=True):
            assert_same(one, other)
    # To know that these say something: but of one candidate, whose weight is 1, all are moved.
    assert k == 1 or all(gradient.any() for gradient in gradients(loss, [*students, *routers]))
    assert not any(gradient.any() for gradient in gradients(balance, students))


def test_nothing_reaches_the_teacher():
    for source in SOURCES:
        given = seen(source, one_tokenizer())
        experts = given.teacher.experts.values()
        theirs = [*given.teacher.outputs.values(), *(part for each in experts for part in (each.outputs, each.weights))]
        assert theirs
        loss = torch.stack([*given().losses.values()]).sum()
        assert not any(gradient is not None for gradient in torch.autograd.grad(loss, theirs, allow_unused=True))


def test_the_value_moves_as_the_gradients_say():
    """The router's always; the student's where what is chosen does not hang on it, as it does by capacity and gap."""
    given = seen("layers", one_tokenizer(), 0.0)

    def loss(*parameters: Tensor) -> Tensor:
        return given().losses["routing_feature"]

    assert torch.autograd.gradcheck(loss, tuple(given.loss.router.parameters()), fast_mode=True)
    nn.init.zeros_(given.loss.router.capacity.weight)
    nn.init.zeros_(given.loss.router.capacity.bias)
    of_student = given.student.outputs[1], *given.loss.projection.parameters()
    assert torch.autograd.gradcheck(loss, of_student, fast_mode=True)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_as_they_are_captured_sum_to_what_the_block_puts_out(family):
    model = make(FAMILIES[family])
    blocks, whole = parts(model).blocks, []
    experts_of(blocks[3]).register_forward_hook(lambda module, inputs, output: whole.append(output))
    with capturing(blocks, Wanted(experts=frozenset({3}))) as captured, torch.no_grad():
        parts(model).base(**one_tokenizer().student.fed(), use_cache=False)
    outputs, _, weights = captured.experts[3]
    torch.testing.assert_close((outputs * weights[..., None]).sum(1), whole[0])


# What does not count --------------------------------------------------------------------------------------------------


def everything(given: Seen, *, autocast: bool = False) -> list[Tensor]:
    """Losses, diagnostics, and the gradients of each loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = given()
    of = [given.student.outputs[1], *given.loss.parameters()]
    losses = list(terms.losses.values())
    return [*losses, *terms.diagnostics.values(), *(g for loss in losses for g in gradients(loss, of))]


@pytest.mark.parametrize("filler", [math.nan, math.inf])
@pytest.mark.parametrize("make_batch", [one_tokenizer, two_tokenizers])
@pytest.mark.parametrize("source", ["layers", "mixtral"])
def test_what_does_not_count_may_hold_anything(source, make_batch, filler):
    given = seen(source, make_batch())
    ours, theirs = torch.ones(2, 6, dtype=torch.bool), torch.ones(given.batch.teacher.input_ids.shape, dtype=torch.bool)
    for row, position, teacher_position in tokens(given.batch):
        ours[row, position] = theirs[row, teacher_position] = False
    assert ours.any()
    assert theirs.any()

    def filled(value: float) -> Seen:
        def leaf(hidden: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda states: states.detach().masked_fill(hidden[..., None], value).requires_grad_()

        return given._replace(student=changed(given.student, leaf(ours)), teacher=changed(given.teacher, leaf(theirs)))

    plain, strange = everything(filled(0.0)), everything(filled(filler))
    for one, other in zip(plain, strange, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(other, one, rtol=0, atol=0)
    # And the states before were the same where it counts.
    torch.testing.assert_close(plain[0], given().losses["routing_feature"])


@pytest.mark.parametrize("source", ["layers", "mixtral"])
def test_of_no_tokens_all_is_0(source):
    batch = one_tokenizer()._replace(mask=torch.zeros(2, 6, dtype=torch.bool))
    given = seen(source, batch)
    terms = given()
    assert terms.diagnostics.pop("router k") > 0
    numbers = [*terms.losses.values(), *terms.diagnostics.values()]
    assert all(number == 0 for number in numbers)
    of = [given.student.outputs[1], *given.loss.parameters()]
    assert all((gradient == 0).all() for loss in terms.losses.values() for gradient in gradients(loss, of))


def test_a_student_that_is_its_single_target_has_no_loss():
    given = seen("layers", one_tokenizer())
    loss = RoutingFeatureLoss(1, Layers((3,)), widths=(16, 16)).double()
    given = given._replace(loss=loss, student=Captured({1: given.teacher.outputs[3].detach().requires_grad_()}))
    losses = given().losses
    assert losses["routing_feature"].abs() < 1e-9
    assert losses["load_balance"] == 1
    assert gradients(losses["routing_feature"], [given.student.outputs[1]])[0].abs().max() < 1e-5


# Schedules and balance ------------------------------------------------------------------------------------------------


def test_fewer_are_chosen_until_half_of_the_run_and_more_sharply_until_its_end():
    assert [chosen(step / 10, 12, 2) for step in range(11)] == [12, 10, 8, 6, 4, 2, 2, 2, 2, 2, 2]
    assert [chosen(progress, 4, 1) for progress in (0.0, 0.1, 0.25, 0.4, 0.5, 1.0)] == [4, 3, 2, 2, 1, 1]
    assert {chosen(progress, 3, 8) for progress in (0.0, 0.3, 1.0)} == {3}
    assert [sharpness(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([2, 2**0.5, 1, 0.5])


def test_at_first_nothing_is_preferred_whatever_the_seed():
    """All processes must begin alike, and their generators need not."""
    given, seeds = seen("layers", one_tokenizer(), 0.0), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loss = RoutingFeatureLoss.of(Config(), make(FAMILIES["llama"]), MAP).double()
        seeds.append(loss.state_dict())
        diagnostics = given._replace(loss=loss)().diagnostics
        assert diagnostics["router entropy"].item() == pytest.approx(math.log(3))
        assert diagnostics["router capacity"].item() == 0.5
    assert all(torch.equal(value, seeds[1][name]) for name, value in seeds[0].items())


def test_each_step_of_a_run_begins_with_its_own():
    config = Config(kd_weight=0, routing_feature_weight=1.0, routing_top_k=1)
    module = DistillationModule.of(config, small_student(), make(FAMILIES["llama"]), MAP, ONE_TOKENIZER)
    loss = module.components["routing_feature"]
    assert isinstance(loss, RoutingFeatureLoss)
    assert loss.temperature == 2
    found = []
    for step in range(5):
        module.begin(step, 5)
        found.append((loss.progress, loss.temperature))
    assert found == [(p, pytest.approx(2 * 4**-p)) for p in (0, 0.25, 0.5, 0.75, 1)]


@pytest.mark.parametrize("source", ["layers", "mixtral"])
def test_balance_is_1_where_each_is_used_as_it_is_offered_and_more_where_not(source):
    """The teacher's own router offers its experts unevenly."""
    given = seen(source, one_tokenizer(), 0.0)
    for parameter in given.loss.router.parameters():
        nn.init.zeros_(parameter)
    for block, each in given.teacher.experts.items():
        given.teacher.experts[block] = each._replace(weights=torch.full_like(each.weights, 0.5))
        assert len(set(each.experts.view(2, 6, 2)[MASK].flatten().bincount(minlength=4).tolist())) > 1
    assert given().losses["load_balance"].item() == pytest.approx(1, rel=1e-12)
    with torch.no_grad():
        given.loss.router.preference[0] = 100.0
    if source == "layers":
        assert given().losses["load_balance"].item() == pytest.approx(3, rel=1e-12)
    else:
        assert given().losses["load_balance"].item() > 1.1


def trained(load_balance_weight: float) -> tuple[list[float], float]:
    """Mean load of each of four layers over the last of 500 steps, and its entropy. One candidate is chosen at the end,
    which collapses most; the student is one block, whose states are to be like those of any depth of the teacher.
    """
    teacher = Teacher(make(FAMILIES["mixtral"]))
    config = Config(
        kd_weight=0,
        lm_weight=0,
        routing_feature_weight=1,
        load_balance_weight=load_balance_weight,
        routing_top_k=1,
        lr=1e-2,
    )
    layer_map = LayerMap(((0, 0), (0, 1), (0, 2), (0, 3)), "0:0,0:1,0:2,0:3", 4, (8, 16))
    module = DistillationModule.of(config, small_student(layers=1), teacher.model, layer_map, ONE_TOKENIZER)
    optimizer, steps, kept = make_optimizer(module, config), 500, 100
    text = []
    for _ in range(8):
        inputs = Inputs(torch.randint(61, (4, 12)), None)
        batch = Batch(inputs, torch.ones(4, 12, dtype=torch.bool), inputs.input_ids.roll(-1, 1), inputs, None)
        text.append((batch, teacher(inputs, module.of_teacher)))
    mean = torch.zeros(4)
    for step in range(steps):
        batch, states = text[step % len(text)]
        module.begin(step, steps)
        losses = module(batch, states, module.count([batch]))
        losses.total.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps - kept:
            loads = [losses.diagnostics[f"router load of block {block}"] for block in range(4)]
            mean += torch.stack(loads) / kept
    return mean.tolist(), torch.special.entr(mean).sum().item()


def test_load_balance_keeps_every_layer_in_use():
    """Even load has entropy log 4 = 1.386."""
    found = {weight: trained(weight) for weight in (0.0, 0.01)}
    for weight, (loads, entropy) in found.items():
        print(f"load balance {weight}: loads {[round(load, 3) for load in loads]}, entropy {entropy:.3f}")
    loads, entropy = found[0.01]
    assert min(loads) > 0.1
    assert entropy > 1.3
    assert found[0.0][1] < 1.1


# In the module --------------------------------------------------------------------------------------------------------


def test_micro_batches_are_averaged_however_many_tokens_they_have():
    config = Config(kd_weight=0, lm_weight=0, routing_feature_weight=0.5, load_balance_weight=0.2)
    teacher, whole = Teacher(make(FAMILIES["llama"])), one_tokenizer()
    module = DistillationModule.of(config, small_student(), teacher.model, MAP, ONE_TOKENIZER)
    batches = [whole, whole._replace(mask=MASK & (torch.arange(6) < 2)), whole._replace(mask=MASK & False)]

    def step(window: list[Batch]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        module.zero_grad()
        raws = []
        for batch in window:
            losses = module(batch, teacher(batch.teacher, module.of_teacher), module.count(window))
            torch.testing.assert_close(
                losses.total, 0.5 * losses.raw["routing_feature"] + 0.2 * losses.raw["load_balance"]
            )
            losses.total.backward()
            raws.append(losses.raw)
        return raws, [parameter.grad for parameter in module.parameters() if parameter.grad is not None]

    alone = [step([batch]) for batch in batches]
    raws, together = step(batches)
    for raw, ((single,), _) in zip(raws, alone, strict=True):
        assert set(raw) == {"routing_feature", "load_balance"}
        torch.testing.assert_close(raw, {name: value / 3 for name, value in single.items()})
    means = [torch.stack(each).mean(0) for each in zip(*(gradients for _, gradients in alone), strict=True)]
    torch.testing.assert_close(together, means, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", ["layers", "mixtral"])
def test_under_autocast_all_is_near_and_finite(source):
    given = seen(source, one_tokenizer())
    exact = everything(given)
    loss = given.loss.float()

    def half(states: Tensor) -> Tensor:
        return states.detach().bfloat16().requires_grad_()

    given = given._replace(loss=loss, student=changed(given.student, half), teacher=changed(given.teacher, half))
    found = everything(given, autocast=True)
    for one, other in zip(exact, found, strict=True):
        assert other.isfinite().all()
        assert (other.double() - one).norm() <= 0.05 * one.norm() + 1e-2
    assert {value.dtype for value in found[:2]} == {torch.float32}


@pytest.mark.parametrize("source", ["layers", "mixtral"])
def test_under_autocast_the_router_computes_as_without(source):
    """What is half precision are the states that it is given."""
    given = seen(source, one_tokenizer())
    loss = RoutingFeatureLoss(1, given.loss.source, widths=(16, 16))
    states = torch.randn(2, 6, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(5)).requires_grad_()
    given = given._replace(
        loss=loss, student=Captured({1: states}), teacher=changed(given.teacher, lambda s: s.detach().bfloat16())
    )
    for one, other in zip(everything(given), everything(given, autocast=True), strict=True):
        assert torch.equal(one, other)


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        by_mask = name == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask, "an index by a mask"
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["layers", "mixtral"])
def test_the_host_waits_for_no_number(source, monkeypatch):
    """But in `layer_loss`, whose path for the CPU is another."""
    monkeypatch.setattr(router, "layer_loss", reference.layer_loss)
    given = seen(source, one_tokenizer())
    with NoWaiting():
        torch.stack([*given().losses.values()]).sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        given.batch.mask.sum().item()


# Settings -------------------------------------------------------------------------------------------------------------


def test_a_configuration_is_followed():
    config = Config(routing_top_k=5, projection="fixed")
    loss = RoutingFeatureLoss.of(config, make(FAMILIES["gpt2"]), MAP)
    assert (loss.of_student, loss.of_teacher) == (
        Wanted(outputs=frozenset({1})),
        Wanted(outputs=frozenset({0, 1, 3})),
    )
    assert (loss.source, loss.top_k) == (Layers((0, 1, 3)), 5)
    assert [(p.shape, p.requires_grad) for p in loss.projection.parameters()] == [((16, 8), False)]


def test_experts_are_those_of_the_last_block_that_has_any():
    shape = {**EXPERTS, "num_experts": 5, "shared_expert_intermediate_size": 8, "mlp_only_layers": [3]}
    teacher = make(Qwen2MoeConfig(**GROUPED, **shape))
    loss = RoutingFeatureLoss.of(Config(routing_over="experts"), teacher, MAP)
    assert loss.source == Experts(2, 5)
    assert loss.of_teacher == Wanted(experts=frozenset({2}))
    assert loss.router.preference.shape == (5,)


def test_a_teacher_without_experts_is_refused():
    with pytest.raises(UsageError, match=r"--routing-over experts: no block of GPT2LMHeadModel, the teacher, has"):
        RoutingFeatureLoss.of(Config(routing_over="experts"), make(FAMILIES["gpt2"]), MAP)


def test_a_run_over_the_experts_of_its_teacher(run, records, teacher_folder, tmp_path):
    """The student is dense, and narrower."""
    path, student = tmp_path / "mixtral", tmp_path / "student"
    shape = {**GROUPED, "vocab_size": 300, "num_local_experts": 4}
    make(MixtralConfig(**shape)).save_pretrained(path)
    make(LlamaConfig(**{**GROUPED, "vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 8})).save_pretrained(
        student
    )
    for folder in (path, student):
        AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    flags = {"routing_feature_weight": 0.5, "routing_over": "experts", "routing_top_k": 1, "layerwise_weight": 0.0}
    log = records(run(teacher=path, student=student, **flags) / STAGE / "log.jsonl")
    train = [record for record in log if record["event"] == "train"]
    assert [record["diagnostics"]["router k"] for record in train] == [2, 2, 1, 1, 1, 1]
    for record in train:
        assert {"routing_feature", "load_balance"} < set(record["components"])
        assert 0 <= record["diagnostics"]["router load, smallest"] < record["diagnostics"]["router load, largest"] < 1
