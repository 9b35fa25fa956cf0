"""The module whose forward returns the losses: each component by hand, and the window's normalisation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from fastdistill import heads
from fastdistill.training.blocks import Batch, Blocks, Inputs, collate, cut
from fastdistill.training.capture import Wanted
from fastdistill.training.evaluate import evaluate, perplexity
from fastdistill.training.layerwise import LayerwiseLoss
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.pairing import Pairing
from fastdistill.training.teacher import Teacher
from fastdistill.training.tokens import Tokens
from tests.half_products import half_products

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = dict(vocab_size=40, n_positions=10, n_embd=16, n_head=2, bos_token_id=0, eos_token_id=0)


def model(layers: int, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**SHAPE, n_layer=layers)).eval()


@pytest.fixture
def blocks() -> Blocks:
    """Six documents, each a row."""
    torch.manual_seed(2)
    starts = torch.tensor([0, 10, 10, 10, 10, 3, 7]).cumsum(0)
    return cut((Tokens(torch.randint(40, (50,), dtype=torch.int32), starts, None, None),), 10, "padded")


def batch_of(blocks: Blocks, rows=range(6)) -> Batch:
    return collate([blocks[i] for i in rows], CPU)


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(model(4, seed=1))


def halves(student: GPT2LMHeadModel) -> DistillationModule:
    return DistillationModule(student, Weights(0.5, 0.5, 0.5), components=[LayerwiseLoss([(0, 1), (1, 3)])])


def test_each_component_is_its_definition_on_whole_logits(blocks, teacher):
    student = model(2, seed=0)
    module = DistillationModule(
        student, Weights(kd=0.3, lm=0.6, layerwise=0.1), temperature=3.0, components=[LayerwiseLoss([(0, 1), (1, 3)])]
    )
    batch = batch_of(blocks)
    losses = module(batch, teacher(batch.teacher, module.of_teacher), module.count([batch]))

    with torch.no_grad():
        s = student(input_ids=batch.student.input_ids, output_hidden_states=True)
        t = teacher.model(input_ids=batch.student.input_ids, output_hidden_states=True)
    counted = batch.targets != -100
    s_logits, t_logits = s.logits[counted], t.logits[counted]
    kl = F.kl_div((s_logits / 3).log_softmax(-1), (t_logits / 3).log_softmax(-1), reduction="none", log_target=True)
    raw = {"kd": 9 * kl.sum(-1).mean(), "lm": F.cross_entropy(s_logits, batch.targets[counted])}
    # hidden_states of a GPT-2 end with the final norm, so its last block's output is read through a hook.
    theirs = teacher(batch.teacher, module.of_teacher).captured.outputs
    ours = Teacher(model(2, seed=0))(batch.teacher, Wanted(outputs=frozenset({0, 1}))).captured.outputs
    distances = [
        (F.layer_norm(ours[s], (16,)) - F.layer_norm(theirs[t], (16,))).square().mean(-1)[batch.mask].mean()
        for s, t in [(0, 1), (1, 3)]
    ]
    raw["layerwise"] = 0.5 * torch.stack(distances).mean()
    for name, expected in raw.items():
        torch.testing.assert_close(losses.raw[name], expected)
    torch.testing.assert_close(losses.total, 0.3 * raw["kd"] + 0.6 * raw["lm"] + 0.1 * raw["layerwise"])


def test_ids_above_the_tokenizers_are_padding_of_the_heads_and_not_compared(blocks, teacher):
    pairing = Pairing((), "30 ids", vocab_size=30)
    student, batch = model(2, seed=0), batch_of(blocks)
    module = DistillationModule(student, Weights(kd=1.0, lm=0, layerwise=0), pairing=pairing)
    losses = module(batch, teacher(batch.teacher), module.count([batch]))
    counted = batch.targets != -100
    with torch.no_grad():
        log_s, log_t = (
            m(input_ids=batch.student.input_ids).logits[counted][:, :30].log_softmax(-1)
            for m in (student, teacher.model)
        )
    expected = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(losses.raw["kd"], expected)
    kl = evaluate(student, blocks, pairing, batch_size=4, teacher=teacher).kl
    assert kl == pytest.approx(expected.item(), rel=1e-5)  # both in float32


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_of_a_window_add_up_to_the_window(blocks, teacher, size):
    def gradients(rows: list[range]) -> list[torch.Tensor | None]:
        module = DistillationModule(
            model(2, seed=0), Weights(0.5, 0.5, 0.5), components=[LayerwiseLoss([(0, 1), (1, 3)])]
        )
        batches = [batch_of(blocks, part) for part in rows]
        counts = module.count(batches)
        for batch in batches:
            module(batch, teacher(batch.teacher, module.of_teacher), counts).total.backward()
        return [parameter.grad for parameter in module.parameters()]

    pieces = [range(first, first + size) for first in range(0, 6, size)]
    for whole, summed in zip(gradients([range(6)]), gradients(pieces), strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-7)


def test_padding_changes_nothing(blocks, teacher):
    module = halves(model(2, seed=0))
    totals = []
    for filler in (0, 39):
        batch = batch_of(blocks)
        ids = Inputs(batch.student.input_ids.masked_fill(~batch.mask, filler), None)
        batch = batch._replace(student=ids, teacher=ids)
        totals.append(module(batch, teacher(batch.teacher, module.of_teacher), module.count([batch])).total)
    assert torch.equal(*totals)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_the_heads_multiply_in_its_precision_and_masters_keep_theirs(blocks, teacher, half, monkeypatch):
    """As a GPU does, whose products are stood in for; the teacher has its own half-precision weights."""
    operands = []
    product_into = heads.product_into
    monkeypatch.setattr(heads, "product_into", lambda out, a, b: operands.append(a.dtype) or product_into(out, a, b))
    student, batch = model(2, seed=0), batch_of(blocks)
    half_teacher = Teacher(copy.deepcopy(teacher.model).to(half))

    def step(teacher: Teacher, autocast: bool) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        module = halves(copy.deepcopy(student))
        with torch.autocast("cpu", half, enabled=autocast):
            losses = module(batch, teacher(batch.teacher, module.of_teacher), module.count([batch]))
        losses.total.backward()
        return losses.total.detach(), [parameter.grad for parameter in module.parameters()]

    total, gradients = step(teacher, False)
    assert operands == [torch.float32] * 2
    with half_products(widening=True):
        half_total, half_gradients = step(half_teacher, True)
    assert operands[2:] == [half] * 2
    torch.testing.assert_close(half_total, total, rtol=1e-2, atol=0)
    for gradient, half_gradient in zip(gradients, half_gradients, strict=True):
        assert gradient is not None
        assert half_gradient is not None
        assert half_gradient.dtype == torch.float32
        assert (half_gradient - gradient).norm() <= 0.1 * gradient.norm() + 1e-4


def test_documents_in_a_row_do_not_see_each_other(teacher):
    """Each is what it is in a row of its own; in a stream it is not."""
    starts = torch.tensor([0, 4, 3, 3, 10]).cumsum(0)
    tokens = Tokens(torch.randint(40, (20,), dtype=torch.int32), starts, None, None)
    module = DistillationModule(model(2, seed=0), Weights(kd=0.5, lm=0.5, layerwise=0))
    totals = {}
    for packing in ("documents", "padded", "stream"):
        blocks = cut((tokens,), 10, packing)
        batch = batch_of(blocks, range(len(blocks)))
        totals[packing] = module(batch, teacher(batch.teacher), module.count([batch])).total
    torch.testing.assert_close(totals["documents"], totals["padded"])
    assert abs(totals["stream"] - totals["padded"]) > 1e-3


def test_a_component_of_weight_0_is_not_built(blocks):
    module = DistillationModule(model(2, seed=0), Weights(kd=0, lm=1, layerwise=0))
    batch = batch_of(blocks)
    assert module.of_teacher == Wanted()
    assert not module.needs_teacher
    assert set(module(batch, None, module.count([batch])).raw) == {"lm"}


@pytest.mark.parametrize(("weight", "built"), [(1.0, []), (0.0, [LayerwiseLoss([(0, 1)])])])
def test_a_component_and_its_weight_go_together(weight, built):
    with pytest.raises(ValueError, match="components must be those with a weight"):
        DistillationModule(model(2, seed=0), Weights(lm=1, layerwise=weight), components=built)


def test_held_out_loss_is_the_models_own(blocks):
    student = model(2, seed=0)
    batch = batch_of(blocks)
    ids = batch.student.input_ids
    expected = student(input_ids=ids, labels=ids.masked_fill(~batch.mask, -100)).loss.item()
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
