"""Weights that follow magnitudes or gradients: the factors by hand, in a module and in a run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from fastdistill.training.attention import AttentionLoss
from fastdistill.training.balance import FARTHEST, KEPT, Balancer, gradient_norm
from fastdistill.training.blocks import Batch, Inputs
from fastdistill.training.config import Config, UsageError
from fastdistill.training.curriculum import Curriculum
from fastdistill.training.layerwise import LayerwiseLoss
from fastdistill.training.memory import most_allocated
from fastdistill.training.models import parts
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.teacher import Teacher
from fastdistill.training.window import Losses
from tests.training.conftest import STAGE
from tests.training.families import FAMILIES, make

PAIRS = [(0, 1), (1, 3)]


def window(main: float, layerwise: float) -> Losses[Tensor]:
    """Weighted kd and lm of so much together; the raw kd is something else."""
    numbers = {"kd": torch.tensor(main / 4), "lm": torch.tensor(main * 3 / 4)}
    raw = {"kd": torch.tensor(77.0), "lm": torch.tensor(55.0), "layerwise": torch.tensor(layerwise)}
    return Losses(torch.tensor(0.0), raw, numbers, {})


def test_a_factor_brings_the_running_mean_to_that_of_kd_and_lm():
    balancer = Balancer(["layerwise"], "magnitude")
    assert balancer.factor("layerwise") == 1
    assert balancer.factor("kd") == balancer.factor("load_balance") == 1
    balancer.update(window(2.0, 0.5))
    assert float(balancer.factor("layerwise")) == pytest.approx(4.0)
    balancer.update(window(4.0, 1.0))
    main, own = KEPT * 2 + (1 - KEPT) * 4, KEPT * 0.5 + (1 - KEPT) * 1
    assert float(balancer.factor("layerwise")) == pytest.approx(main / own)


def test_what_is_not_finite_or_not_there_is_left_out():
    balancer = Balancer(["layerwise"], "magnitude")
    balancer.update(window(2.0, float("nan")))
    assert float(balancer.factor("layerwise")) == 1
    balancer.update(window(2.0, 0.5))
    for value in (float("nan"), float("inf")):
        balancer.update(window(2.0, value))
    losses = window(2.0, 1.0)
    del losses.raw["layerwise"]
    balancer.update(losses)
    assert float(balancer.factor("layerwise")) == pytest.approx(4.0)


@pytest.mark.parametrize(("size", "factor"), [(1e-9, FARTHEST), (1e9, 1 / FARTHEST), (0.0, 1.0)])
def test_a_factor_has_bounds(size, factor):
    balancer = Balancer(["layerwise"], "magnitude")
    balancer.update(window(1.0, size))
    assert float(balancer.factor("layerwise")) == pytest.approx(factor)


def test_gradients_are_measured_every_so_many_steps_and_when_components_change():
    balancer = Balancer(["layerwise"], "gradient", every=3)
    assert [step for step in range(8) if balancer.measures(step, changed=step == 5)] == [0, 3, 5, 6]
    assert not Balancer(["layerwise"], "magnitude").measures(0, changed=True)
    losses = window(2.0, 0.5)._replace(
        diagnostics={"gradient norm of main": torch.tensor(6.0), "gradient norm of layerwise": torch.tensor(0.5)}
    )
    balancer.update(losses)
    balancer.update(window(9.0, 9.0))  # a step at which nothing was measured
    assert float(balancer.factor("layerwise")) == pytest.approx(12.0)


def batch() -> Batch:
    torch.manual_seed(1)
    ids = Inputs(torch.randint(61, (2, 12)), None)
    return Batch(ids, torch.ones(2, 12, dtype=torch.bool), ids.input_ids.roll(-1, 1), ids, None)


def module_with(balancer: Balancer | None, **weights: float) -> DistillationModule:
    build = {"layerwise": LayerwiseLoss, "attention": AttentionLoss}
    built = [build[name](PAIRS) for name in weights if name in build]
    student = make(LlamaConfig(**{**FAMILIES["llama"].to_dict(), "num_hidden_layers": 2}))
    return DistillationModule(student, Weights(**weights), components=built, balancer=balancer)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(make(FAMILIES["llama"]))


def test_norms_are_of_the_gradient_at_the_embedded_tokens(teacher):
    """Each as autograd gives it for that loss alone; and the gradients that train are left as they are."""
    some, weights = batch(), {"kd": 0.4, "lm": 0.6, "layerwise": 0.3, "attention": 0.2}
    module = module_with(Balancer(["layerwise", "attention"], "gradient"), **weights)
    states, counts = teacher(some.teacher, module.of_teacher), module.count([some])
    plain = module(some, states, counts)
    plain.total.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    module.measures_gradients = True
    measured = module(some, states, counts)
    measured.total.backward()
    assert all(torch.equal(p.grad, gradients[name]) for name, p in module.named_parameters() if p.grad is not None)
    assert torch.equal(plain.total, measured.total)

    seen: dict[str, Tensor] = {}
    embedding: Any = module.student.get_input_embeddings()
    for name, kept in {"main": ("kd", "lm"), "layerwise": ("layerwise",), "attention": ("attention",)}.items():
        alone = module_with(None, **{part: weights[part] if name == "main" else 1.0 for part in kept})
        alone.student = copy.deepcopy(module.student)
        alone.parts = [parts(alone.student)]
        out: list[Tensor] = []

        def cut_off(layer: Any, inputs: Any, output: Tensor, out: list[Tensor] = out) -> Tensor:
            out.append(output.detach().requires_grad_())
            return out[0]

        handle = alone.student.get_input_embeddings().register_forward_hook(cut_off)
        alone(some, states, counts | alone.count([some])).total.backward()
        handle.remove()
        assert out[0].grad is not None
        seen[f"gradient norm of {name}"] = out[0].grad.norm()
    assert embedding.weight.grad is not None
    for name, norm in seen.items():
        torch.testing.assert_close(measured.diagnostics[name], norm, rtol=1e-4, atol=1e-7)


def test_gradients_are_measured_where_the_curriculum_switches():
    curriculum = Curriculum("layerwise:0.45,attention:0.7", ["kd", "lm", "layerwise", "attention"])
    weights = {"kd": 0.5, "lm": 0.5, "layerwise": 0.1, "attention": 0.1}
    module = module_with(Balancer(["layerwise", "attention"], "gradient", every=4), **weights)
    module.curriculum, measured = curriculum, []
    for step in (*range(10), 6):  # once more, as a run that goes on
        module.begin(step, 10)
        measured.append((step, module.measures_gradients))
    assert [step for step, is_measured in measured if is_measured] == [0, 4, 5, 7, 8]


def test_kd_may_begin_later(teacher):
    some, module = batch(), module_with(None, kd=0.5, lm=0.5)
    module.curriculum = Curriculum("kd:0.5", ["kd", "lm"])
    totals = []
    for step in (0, 1):
        module.begin(step, 2)
        losses = module(some, teacher(some.teacher) if module.needs_teacher else None, module.count([some]))
        torch.testing.assert_close(losses.total, 0.5 * torch.stack([*losses.raw.values()]).sum())
        totals.append(set(losses.raw))
    assert totals == [{"lm"}, {"kd", "lm"}]


def test_a_small_gradient_is_not_lost_in_half_precision():
    embedded = torch.full((4, 4), 0.5, requires_grad=True)
    loss = 1e-6 * embedded.to(torch.float16).float().square().sum()
    expected = 1e-6 * torch.ones(16).norm()
    torch.testing.assert_close(gradient_norm(loss, embedded), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("how", ["magnitude", "gradient"])
def test_in_a_run_the_logged_weights_are_those_applied(run, records, how):
    """Each the configured weight times a factor that the sizes of the steps before give; kd and lm keep theirs."""
    flags = {"layerwise_weight": 0.2, "attention_weight": 0.1, "balance": how, "balance_steps": 2, "max_steps": 6}
    train = [r for r in records(run(**flags) / STAGE / "log.jsonl") if r["event"] == "train"]
    means: dict[str, float] = {}
    for record in train:
        parts = record["components"]
        assert (parts["kd"]["weight"], parts["lm"]["weight"]) == (0.5, 0.5)
        assert sum(part["weighted"] for part in parts.values()) == pytest.approx(record["total"], rel=1e-5)
        for name, weight in (("layerwise", 0.2), ("attention", 0.1)):
            factor = min(FARTHEST, means["main"] / means[name]) if means else 1.0
            assert parts[name]["weight"] == pytest.approx(weight * factor, rel=1e-4)
        if how == "magnitude":
            sizes = {"main": parts["kd"]["weighted"] + parts["lm"]["weighted"]}
            sizes |= {name: parts[name]["raw"] for name in ("layerwise", "attention")}
        else:
            sizes = {
                name.removeprefix("gradient norm of "): value
                for name, value in record["diagnostics"].items()
                if name.startswith("gradient norm of")
            }
            assert bool(sizes) == (record["step"] % 2 == 1)
        for name, size in sizes.items():
            means[name] = KEPT * means[name] + (1 - KEPT) * size if name in means else size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kd_weight": 0.0, "lm_weight": 0.0, "layerwise_weight": 1.0, "balance": "magnitude"},
            "measures against kd and lm",
        ),
        (
            {"balance": "gradient", "shard": True, "layerwise_weight": 1.0},
            "--balance gradient: gradients of weights spread",
        ),
        ({"balance": "size"}, "--balance must be one of none, magnitude, gradient, got 'size'"),
    ],
)
def test_a_balance_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Config(**settings)


def test_nothing_is_balanced_where_there_is_nothing_beside_kd_and_lm():
    assert Balancer.of(Config(balance="magnitude"), []) is None
    assert Balancer.of(Config(), ["layerwise"]) is None
    balancer = Balancer.of(Config(balance="gradient", balance_steps=7), ["layerwise"])
    assert balancer is not None
    assert (balancer.how, balancer.every) == ("gradient", 7)


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_component_that_has_not_begun_adds_neither_time_nor_memory(teacher):
    """As many operations and as many bytes at the peak of a step as without it; when it has begun, more of both."""

    def cost(module: DistillationModule) -> tuple[int, int]:
        some = batch()

        def step() -> None:
            states = teacher(some.teacher, module.of_teacher) if module.needs_teacher else None
            module(some, states, module.count([some])).total.backward()
            module.zero_grad()

        step()
        with Operations() as operations:
            step()
        return operations.count, most_allocated(step, torch.device("cpu"))

    module = module_with(None, kd=0.5, lm=0.5, layerwise=0.1, attention=0.1)
    plain, begun = cost(module_with(None, kd=0.5, lm=0.5)), cost(module)
    module.active = frozenset({"kd", "lm"})
    assert cost(module) == plain
    assert begun[0] > plain[0]
    assert begun[1] > plain[1]
