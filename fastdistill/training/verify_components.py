"""Checks of the components beside kd, lm and layerwise, of documents one by one against plain definitions."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdistill.training import verify_definitions as plain
from fastdistill.training.blocks import collate
from fastdistill.training.capture import Captured
from fastdistill.training.config import COMPONENTS
from fastdistill.training.curriculum import Curriculum
from fastdistill.training.verify_numbers import equal, true
from fastdistill.training.verify_run import CPU, DOCUMENTS, RECIPE, Run

_WEIGHTS = {f"{name}_weight": 0.0 for name in COMPONENTS}
# Block 0 of the student with 1 of the teacher; of a single candidate the router's mixture is that one.
_ONE_PAIR = dataclasses.replace(
    RECIPE,
    **{
        **_WEIGHTS, "attention_weight": 1.0, "attention_alignment_weight": 1.0, "routing_feature_weight": 1.0,
        "contrastive_weight": 1.0,
    },
    contrastive_negatives="tokens", contrastive_temperature=0.5, batch_size=len(DOCUMENTS),
)  # fmt: skip


def components() -> list[str]:
    """Attention, its alignment, routing and contrast are their definitions; the curriculum begins them in their turn;
    a student that is its teacher has nothing to learn of them.
    """
    run = Run(_ONE_PAIR)
    batch = collate([run.walk.blocks[i] for i in range(len(DOCUMENTS))], CPU)
    losses = run.module(batch, run.teacher(batch.teacher, run.module.of_teacher), run.module.count([batch]))
    expected = _by_hand(run.module.student, run.teacher.model)
    seen = [equal(f"{name}, of documents one by one:", losses.raw[name].item(), expected[name]) for name in expected]
    seen.append(equal("load balance of a single candidate:", losses.raw["load_balance"].item(), 1.0))
    weighted = sum(value.item() for value in losses.weighted.values())
    seen.append(equal(f"{len(losses.weighted)} weighted components and the total:", weighted, losses.total.item()))

    theirs = run.teacher(batch.teacher, run.module.of_teacher).captured
    for name in ("attention", "attention_alignment", "routing_feature"):
        component = run.module.components[name]
        alike = component(_as_student(theirs), theirs, batch, run.module.count([batch])).losses[name].item()
        seen.append(equal(f"{name} of the teacher's own states:", alike, 0.0, 1e-6))

    curriculum = Curriculum("founding", [*COMPONENTS, "load_balance"])
    begins = [next(step for step in range(20) if name in curriculum.active(step, 20)) for name in COMPONENTS]
    seen.append(true(f"of 20 steps the founding curriculum begins at {begins}", begins == [0, 0, 8, 2, 2, 2, 14]))
    return seen


def _as_student(theirs: Captured) -> Captured:
    """What was captured of the teacher's block 1, as of a student's block 0."""
    return dataclasses.replace(theirs, outputs={0: theirs.outputs[1]}, attention={0: theirs.attention[1]})


@torch.no_grad()
def _by_hand(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, float]:
    attention, alignment, routing, contrast = [], [], [], []
    for ids in DOCUMENTS:
        s, s_maps = _seen(student, ids, 0)
        t, t_maps = _seen(teacher, ids, 1)
        for i in range(len(ids)):
            attention.append(plain.kl(t_maps[:, i, : i + 1], s_maps[:, i, : i + 1]).mean())
        alignment.append(plain.alignment(s, t, heads=t_maps.shape[0]))
        routing.append(plain.layer_error("layer_norm", s, t) / 2)
        contrast.append(plain.contrast(s, t, _ONE_PAIR.contrastive_temperature))
    return {
        "attention": torch.stack(attention).mean().item(),
        "attention_alignment": torch.cat(alignment).mean().item(),
        "routing_feature": torch.cat(routing).mean().item(),
        "contrastive": torch.cat(contrast).mean().item(),
    }


def _seen(model: PreTrainedModel, ids: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A block's output `[S, D]` and its maps `[H, S, S]`, as transformers returns them."""
    eager = copy.deepcopy(model).eval()
    eager.set_attn_implementation("eager")
    out = eager(input_ids=ids[None], output_attentions=True, output_hidden_states=True)
    return out.hidden_states[block + 1][0], out.attentions[block][0]
