"""The module whose forward returns the losses: each component by hand, and the window's normalisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from fastdistill.training.config import UsageError
from fastdistill.training.data import Blocks
from fastdistill.training.evaluate import evaluate, perplexity
from fastdistill.training.objective import DistillationModule, Teacher, Weights

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = dict(vocab_size=40, n_positions=10, n_embd=16, n_head=2, bos_token_id=0, eos_token_id=0)


def model(layers: int, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**SHAPE, n_layer=layers)).eval()


@pytest.fixture
def blocks() -> Blocks:
    torch.manual_seed(2)
    mask = torch.arange(10).expand(6, 10) < torch.tensor([10, 10, 10, 10, 3, 7])[:, None]
    return Blocks(torch.randint(40, (6, 10)), mask)


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(model(4, seed=1))


def test_each_component_is_its_definition_on_whole_logits(blocks, teacher):
    student = model(2, seed=0)
    module = DistillationModule(
        student, Weights(kd=0.3, lm=0.6, layerwise=0.1), temperature=3.0, layer_map=[(0, 1), (1, 3)]
    )
    batch = blocks.batch(torch.arange(6), CPU)
    losses = module(batch, teacher(batch["input_ids"], module.teacher_layers), module.count([batch]))

    with torch.no_grad():
        s = student(input_ids=batch["input_ids"], output_hidden_states=True)
        t = teacher.model(input_ids=batch["input_ids"], output_hidden_states=True)
    counted = batch["targets"] != -100
    s_logits, t_logits = s.logits[counted], t.logits[counted]
    kl = F.kl_div((s_logits / 3).log_softmax(-1), (t_logits / 3).log_softmax(-1), reduction="none", log_target=True)
    raw = {"kd": 9 * kl.sum(-1).mean(), "lm": F.cross_entropy(s_logits, batch["targets"][counted])}
    # hidden_states of a GPT-2 end with the final norm, so its last block's output is read through a hook.
    t_last = teacher(batch["input_ids"], [1, 3]).layers
    s_last = Teacher(model(2, seed=0))(batch["input_ids"], [0, 1]).layers
    distances = [
        (F.layer_norm(a, (16,)) - F.layer_norm(b, (16,))).square().mean(-1)[batch["mask"]].mean()
        for a, b in zip(s_last, t_last, strict=True)
    ]
    raw["layerwise"] = 0.5 * torch.stack(distances).mean()
    for name, expected in raw.items():
        torch.testing.assert_close(losses.raw[name], expected)
    torch.testing.assert_close(losses.total, 0.3 * raw["kd"] + 0.6 * raw["lm"] + 0.1 * raw["layerwise"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_of_a_window_add_up_to_the_window(blocks, teacher, size):
    def gradients(rows: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
        module = DistillationModule(model(2, seed=0), Weights(0.5, 0.5, 0.5), layer_map=[(0, 1), (1, 3)])
        batches = [blocks.batch(part, CPU) for part in rows]
        counts = module.count(batches)
        for batch in batches:
            module(batch, teacher(batch["input_ids"], module.teacher_layers), counts).total.backward()
        return [parameter.grad for parameter in module.parameters()]

    everything = torch.arange(6)
    for whole, summed in zip(gradients((everything,)), gradients(everything.split(size)), strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-7)


def test_padding_changes_nothing(blocks, teacher):
    module = DistillationModule(model(2, seed=0), Weights(0.5, 0.5, 0.5), layer_map=[(0, 1), (1, 3)])
    totals = []
    for filler in (0, 39):
        batch = Blocks(blocks.ids.masked_fill(~blocks.mask, filler), blocks.mask).batch(torch.arange(6), CPU)
        totals.append(module(batch, teacher(batch["input_ids"], [1, 3]), module.count([batch])).total)
    assert torch.equal(*totals)


def test_a_component_of_weight_0_is_not_built(blocks):
    module = DistillationModule(model(2, seed=0), Weights(kd=0, lm=1, layerwise=0), layer_map=[(0, 1)])
    batch = blocks.batch(torch.arange(6), CPU)
    assert module.teacher_layers == []
    assert set(module(batch, None, module.count([batch])).raw) == {"lm"}


def test_a_layerwise_loss_needs_a_map():
    with pytest.raises(UsageError, match="--layerwise-weight needs a layer map"):
        DistillationModule(model(2, seed=0), Weights(kd=0, lm=1, layerwise=1))


def test_held_out_loss_is_the_models_own(blocks):
    student = model(2, seed=0)
    labels = blocks.ids.masked_fill(~blocks.mask, -100)
    expected = student(input_ids=blocks.ids, labels=labels).loss.item()
    result = evaluate(student, blocks, batch_size=4)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.tokens == 36 + 2 + 6


def test_a_model_agrees_with_itself(teacher, blocks):
    result = evaluate(teacher.model, blocks, batch_size=4, teacher=teacher)
    assert result.kl == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1


def test_perplexity_is_exp_and_never_clamped():
    assert perplexity(2.0) == pytest.approx(7.38905609893065)
    assert perplexity(21.0) > 1.3e9
    assert perplexity(1e6) == float("inf")
