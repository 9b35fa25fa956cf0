"""The layerwise component by hand: what is projected, which positions count, and in which form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastdistill import layer_loss
from fastdistill.training import layerwise
from fastdistill.training.blocks import Batch, Blocks, Inputs, Pairs, collate, cut
from fastdistill.training.capture import Wanted
from fastdistill.training.config import Config
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.layerwise import LayerwiseLoss
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.teacher import Teacher
from fastdistill.training.tokens import Tokens

CPU = torch.device("cpu")
PAIRS = [(0, 1), (1, 3)]


def model(layers: int, width: int, seed: int) -> GPT2LMHeadModel:
    """Weights large enough that blocks change what they are given."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": 40, "n_positions": 10, "n_embd": width, "n_head": 2, "n_layer": layers}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, initializer_range=0.3)).eval()


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(model(4, 16, seed=1))


def blocks(packing: str) -> Blocks:
    """Documents of unlike lengths."""
    torch.manual_seed(2)
    starts = torch.tensor([0, 4, 3, 3, 10, 6, 4]).cumsum(0)
    return cut((Tokens(torch.randint(40, (30,), dtype=torch.int32), starts, None, None),), 10, packing)


def batch_of(blocks: Blocks) -> Batch:
    return collate([blocks[i] for i in range(len(blocks))], CPU)


def loss_alone(student: GPT2LMHeadModel, layerwise: LayerwiseLoss) -> DistillationModule:
    return DistillationModule(student, Weights(kd=0, lm=0, layerwise=1), components=[layerwise])


def outputs_of(model: GPT2LMHeadModel, batch: Batch) -> list[Tensor]:
    """What each block of a GPT-2 puts out, `[B, S, D]`, with its gradients: written out, without hooks."""
    ids, positions = batch.student.input_ids, batch.student.position_ids
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    transformer: Any = model.transformer
    states = transformer.wte(ids) + transformer.wpe(positions)
    outputs = []
    for block in transformer.h:
        states = block(states, attention_mask=None)
        states = states[0] if isinstance(states, tuple) else states
        outputs.append(states)
    return outputs


def seen(model: Teacher, inputs: Inputs, blocks: list[int]) -> list[Tensor]:
    outputs = model(inputs, Wanted(outputs=frozenset(blocks))).captured.outputs
    return [outputs[block] for block in blocks]


@pytest.mark.parametrize("width", [8, 24], ids=["narrower", "wider"])
@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_the_projected_loss_is_its_definition_and_reaches_what_learns(teacher, width, kind):
    student, batch = model(2, width, seed=0), batch_of(blocks("padded"))
    module = loss_alone(student, LayerwiseLoss(PAIRS, widths=(width, 16), projected=kind))
    total = module(batch, teacher(batch.teacher, module.of_teacher), module.count([batch])).total

    theirs, ours = outputs_of(teacher.model, batch), outputs_of(student, batch)
    projections = [torch.eye(16, width, requires_grad=True) for _ in PAIRS]
    distances = [
        (F.layer_norm(ours[s] @ projection.T, (16,)) - F.layer_norm(theirs[t], (16,))).square().mean(-1)[batch.mask]
        for (s, t), projection in zip(PAIRS, projections, strict=True)
    ]
    expected = 0.5 * torch.stack([distance.mean() for distance in distances]).mean()
    torch.testing.assert_close(total, expected)

    total.backward()
    learned = dict(module.named_parameters())
    assert sum("projection" in name for name in learned) == len(PAIRS)
    by_hand = {f"components.layerwise.projections.{i}.weight": projection for i, projection in enumerate(projections)}
    by_hand |= {f"student.{name}": parameter for name, parameter in student.named_parameters()}
    wanted = torch.autograd.grad(expected, list(by_hand.values()), allow_unused=True)
    for name, gradient in zip(by_hand, wanted, strict=True):
        if kind == "fixed" and "projection" in name:
            assert not learned[name].requires_grad
            assert learned[name].grad is None
        else:
            torch.testing.assert_close(learned[name].grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_the_loss_takes_what_the_projection_puts_out(teacher, half, monkeypatch):
    """In half precision, without a cast or a copy of states between them; the teacher may hold either precision."""
    taken, made = [], []
    monkeypatch.setattr(layerwise, "layer_loss", lambda s, t, *a, **k: taken.extend(s) or layer_loss(s, t, *a, **k))
    loss, batch = LayerwiseLoss(PAIRS, widths=(8, 16)), batch_of(blocks("padded"))
    for projection in loss.projections:
        projection.register_forward_hook(lambda module, inputs, output: made.append(output))
    module, half_teacher = loss_alone(model(2, 8, seed=0), loss), Teacher(copy.deepcopy(teacher.model).to(half))
    counts = module.count([batch])
    exact = module(batch, teacher(batch.teacher, module.of_teacher), counts).total
    for states in (teacher(batch.teacher, module.of_teacher), half_teacher(batch.teacher, module.of_teacher)):
        made.clear()
        taken.clear()
        loss.zero_grad()
        with torch.autocast("cpu", half):
            total = module(batch, states, counts).total
        assert [state.dtype for state in made] == [half] * 2
        # Once for the loss, and once for the founding document's number.
        assert all(one is other for one, other in zip(taken, made * 2, strict=True))
        torch.testing.assert_close(total, exact, rtol=2e-2, atol=1e-2)
        total.backward()
        for parameter in loss.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.any()


def test_states_of_one_width_are_not_projected():
    assert not list(LayerwiseLoss(PAIRS, widths=(16, 16)).parameters())


def test_a_configuration_is_followed():
    config = Config(layerwise_loss="cosine", layerwise_skip_first=3, projection="fixed")
    layerwise = LayerwiseLoss.of(config, LayerMap(((0, 2), (1, 1)), "0:2,1:1", 4, (8, 16)))
    assert layerwise.pairs == ((0, 2), (1, 1))
    assert (layerwise.form, layerwise.skip_first) == ("cosine", 3)
    assert [(p.shape, p.requires_grad) for p in layerwise.parameters()] == [((16, 8), False)] * 2


def correlation_distance(s: Tensor, t: Tensor) -> Tensor:
    s, t = (state - state.mean(-1, keepdim=True) for state in (s, t))
    return 1 - F.cosine_similarity(s, t, -1)


FORMS = {
    "layer_norm": correlation_distance,
    "teacher_rms": lambda s, t: (s - t).square().sum(-1) / t.square().sum(-1),
    "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, -1),
    "raw": lambda s, t: (s - t).square().mean(-1),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_its_definition(teacher, form):
    student, batch = model(2, 16, seed=0), batch_of(blocks("padded"))
    module = loss_alone(student, LayerwiseLoss(PAIRS, form=form))
    losses = module(batch, teacher(batch.teacher, module.of_teacher), module.count([batch]))
    ours, theirs = outputs_of(student, batch), outputs_of(teacher.model, batch)
    expected = torch.stack([FORMS[form](ours[s], theirs[t])[batch.mask].mean() for s, t in PAIRS]).mean()
    torch.testing.assert_close(losses.raw["layerwise"], expected.detach(), rtol=1e-4, atol=1e-5)


# Documents of 4, 3, 3, 10, 6 and 4 tokens. A row of a stream reads one token of the row before once more.
AFTER_FIRST_TWO = {
    "documents": ["..xx..x..x", "..xxxxxxxx", "..xxxx..xx"],
    "padded": ["..xx", "..x", "..x", "..xxxxxxxx", "..xxxx", "..xx"],
    "stream": ["..xxxxxxxx", "..xxxxxxxx", "..xxxxxxxx", "..x"],
}


@pytest.mark.parametrize("packing", AFTER_FIRST_TWO)
def test_the_first_positions_are_left_out_of_each_document(teacher, packing):
    student, batch = model(2, 16, seed=0), batch_of(blocks(packing))
    module = loss_alone(student, LayerwiseLoss(PAIRS, form="raw", skip_first=2))
    counts = module.count([batch])
    losses = module(batch, teacher(batch.teacher, module.of_teacher), counts)
    kept = [(row, i) for row, line in enumerate(AFTER_FIRST_TWO[packing]) for i, c in enumerate(line) if c == "x"]
    assert int(counts["layerwise"]) == len(kept)
    ours, theirs = seen(Teacher(student), batch.student, [0, 1]), seen(teacher, batch.teacher, [1, 3])
    errors = [(s[row, i] - t[row, i]).square().mean() for s, t in zip(ours, theirs, strict=True) for row, i in kept]
    torch.testing.assert_close(losses.raw["layerwise"], torch.stack(errors).mean())


def two_tokenizers() -> list[Batch]:
    """Two batches in which a student's positions have read what other positions of the teacher have; the second row
    of the student is of two documents, and the last batch has no position in common.
    """
    torch.manual_seed(3)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    student, teacher = Inputs(torch.randint(40, (2, 6)), positions), Inputs(torch.randint(40, (2, 4)), None)
    pairs = [
        Pairs(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 2, 5, 1, 3, 4]), torch.tensor([0, 1, 3, 0, 1, 2])),
        Pairs(*(torch.empty(0, dtype=torch.int64) for _ in range(3))),
    ]
    mask = torch.ones(2, 6, dtype=torch.bool)
    return [Batch(student, mask, torch.zeros(2, 6, dtype=torch.int64), teacher, each) for each in pairs]


def test_with_two_tokenizers_states_are_compared_where_both_have_read_the_same(teacher):
    student, batches = model(2, 8, seed=0), two_tokenizers()
    module = loss_alone(student, LayerwiseLoss(PAIRS, widths=(8, 16), form="raw", skip_first=1))
    counts = module.count(batches)
    # Of the six pairs (row, student, teacher) the student begins a document at (0, 0, 0) and (1, 3, 1), and the
    # teacher at (1, 1, 0).
    kept = [(0, 2, 1), (0, 5, 3), (1, 4, 2)]
    assert int(counts["layerwise"]) == len(kept)
    total = sum(module(batch, teacher(batch.teacher, module.of_teacher), counts).total for batch in batches)
    ours, theirs = seen(Teacher(student), batches[0].student, [0, 1]), seen(teacher, batches[0].teacher, [1, 3])
    errors = [
        (F.pad(s[row, i], (0, 8)) - t[row, j]).square().mean()
        for s, t in zip(ours, theirs, strict=True)
        for row, i, j in kept
    ]
    torch.testing.assert_close(total, torch.stack(errors).mean())


@pytest.mark.parametrize("how", [{}, {"form": "cosine", "skip_first": 2}], ids=["plain", "otherwise"])
def test_the_founding_formula_is_over_everything_and_in_no_loss(teacher, how):
    student, batch = model(2, 8, seed=0), batch_of(blocks("padded"))
    module = loss_alone(student, LayerwiseLoss(PAIRS, widths=(8, 16), **how))
    losses = module(batch, teacher(batch.teacher, module.of_teacher), module.count([batch, batch]))
    assert not batch.mask.all()
    ours, theirs = outputs_of(student, batch), outputs_of(teacher.model, batch)
    expected = torch.stack([F.mse_loss(F.pad(ours[s], (0, 8)), theirs[t]) for s, t in PAIRS]).mean()
    torch.testing.assert_close(losses.diagnostics, {"layerwise_raw": expected.detach()})
    torch.testing.assert_close(losses.total.detach(), losses.raw["layerwise"])


def test_the_founding_formula_of_two_tokenizers_is_over_all_pairs(teacher):
    student, (batch, _) = model(2, 8, seed=0), two_tokenizers()
    module = loss_alone(student, LayerwiseLoss(PAIRS, widths=(8, 16), skip_first=1))
    losses = module(batch, teacher(batch.teacher, module.of_teacher), module.count([batch]))
    ours, theirs = seen(Teacher(student), batch.student, [0, 1]), seen(teacher, batch.teacher, [1, 3])
    assert batch.pairs is not None
    errors = [
        (F.pad(s[row, i], (0, 8)) - t[row, j]).square().mean()
        for s, t in zip(ours, theirs, strict=True)
        for row, i, j in zip(*batch.pairs, strict=True)
    ]
    torch.testing.assert_close(losses.diagnostics["layerwise_raw"], torch.stack(errors).mean())


def windows() -> dict[str, list[list[Batch]]]:
    """A window as one batch and as several."""
    documents = blocks("documents")
    rows = [collate([documents[i]], CPU) for i in range(len(documents))]
    whole, empty = two_tokenizers()
    assert whole.pairs is not None
    pairs = [whole.pairs.row == row for row in range(2)]
    pieces = [whole._replace(pairs=Pairs(*(index[chosen] for index in whole.pairs))) for chosen in pairs]
    return {"one tokenizer": [[batch_of(documents)], rows], "two tokenizers": [[whole], [*pieces, empty]]}


@pytest.mark.parametrize("kind", windows())
def test_micro_batches_of_a_window_add_up_to_the_window(teacher, kind):
    def gradients(batches: list[Batch]) -> list[Tensor | None]:
        layerwise = LayerwiseLoss(PAIRS, widths=(8, 16), skip_first=1)
        module = loss_alone(model(2, 8, seed=0), layerwise)
        counts = module.count(batches)
        for batch in batches:
            module(batch, teacher(batch.teacher, module.of_teacher), counts).total.backward()
        return [parameter.grad for parameter in module.parameters()]

    whole, pieces = (gradients(batches) for batches in windows()[kind])
    for one, summed in zip(whole, pieces, strict=True):
        torch.testing.assert_close(summed, one, rtol=1e-4, atol=1e-6)
