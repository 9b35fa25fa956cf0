"""The layerwise component by hand: what is projected, which positions count, and in which form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastdistill.training.blocks import Batch, Blocks, collate, cut
from fastdistill.training.layerwise import LayerwiseLoss
from fastdistill.training.objective import DistillationModule, Teacher, Weights
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
    return DistillationModule(student, Weights(kd=0, lm=0, layerwise=1), layerwise=layerwise)


def outputs_of(model: GPT2LMHeadModel, batch: Batch) -> list[Tensor]:
    """What each block of a GPT-2 puts out, `[B, S, D]`, with its gradients: written out, without hooks."""
    ids, positions = batch.student
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


@pytest.mark.parametrize("width", [8, 24], ids=["narrower", "wider"])
@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_the_projected_loss_is_its_definition_and_reaches_what_learns(teacher, width, kind):
    student, batch = model(2, width, seed=0), batch_of(blocks("padded"))
    module = loss_alone(student, LayerwiseLoss(PAIRS, widths=(width, 16), projection=kind))
    total = module(batch, teacher(batch.teacher, module.teacher_layers), module.count([batch])).total

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
    by_hand = {f"layerwise.projections.{i}.weight": projection for i, projection in enumerate(projections)}
    by_hand |= {f"student.{name}": parameter for name, parameter in student.named_parameters()}
    wanted = torch.autograd.grad(expected, list(by_hand.values()), allow_unused=True)
    for name, gradient in zip(by_hand, wanted, strict=True):
        if kind == "fixed" and "projection" in name:
            assert not learned[name].requires_grad
            assert learned[name].grad is None
        else:
            torch.testing.assert_close(learned[name].grad, gradient, rtol=1e-4, atol=1e-6)


def test_states_of_one_width_are_not_projected():
    assert not list(LayerwiseLoss(PAIRS, widths=(16, 16)).parameters())
