"""The attention and attention alignment components, against maps that transformers itself returns and by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from fastdistill.reference import log_attention, map_kl
from fastdistill.training import capture
from fastdistill.training.attention import AttentionLoss, check_attention, head_pairs
from fastdistill.training.attention_alignment import AttentionAlignmentLoss
from fastdistill.training.attention_maps import map_square
from fastdistill.training.blocks import Batch, Inputs, Pairs, collate, cut
from fastdistill.training.capture import Wanted, capturing
from fastdistill.training.component import Component
from fastdistill.training.config import Config, UsageError
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.models import parts
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.teacher import Teacher
from fastdistill.training.tokens import Tokens
from tests.training.families import FAMILIES, make

CPU = torch.device("cpu")
PAIRS = [(0, 1), (1, 3)]
SMALL: dict[str, Any] = {
    "vocab_size": 61, "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip


def llama(layers: int, heads: int, width: int = 32, seed: int = 0, head_dim: int = 8) -> Any:
    """Of grouped queries, in float64."""
    shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return moved(LlamaConfig(**SMALL, **shape, num_key_value_heads=max(1, heads // 2), head_dim=head_dim), seed)


def gpt2(layers: int, seed: int = 0) -> Any:
    """Its softmaxes stay in float64, where Llama's are in float32 if they are to be returned."""
    shape: dict[str, Any] = {
        "n_layer": layers,
        "n_embd": 32,
        "n_head": 4,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }
    return moved(GPT2Config(vocab_size=61, n_positions=32, **shape, bos_token_id=0, eos_token_id=0), seed)


def moved(config: PreTrainedConfig, seed: int) -> Any:
    model = make(config).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(packing: str) -> Batch:
    """Documents of 4, 3, 10, 6 and 5 tokens."""
    torch.manual_seed(2)
    starts = torch.tensor([0, 4, 3, 10, 6, 5]).cumsum(0)
    blocks = cut((Tokens(torch.randint(61, (28,), dtype=torch.int32), starts, None, None),), 10, packing)
    return collate([blocks[i] for i in range(len(blocks))], CPU)


def module_of(student: Any, component: Component) -> DistillationModule:
    return DistillationModule(student, Weights(**{component.name: 1.0}), components=[component])


def loss_of(module: DistillationModule, teacher: Teacher, *batches: Batch) -> Tensor:
    counts = module.count(batches)
    each = [module(batch, teacher(batch.teacher, module.of_teacher), counts).total for batch in batches]
    return torch.stack(each).sum()


def own_maps(model: Any, batch: Batch) -> list[Tensor]:
    """The row-normalised maps that transformers returns, `[B, H, S, S]` a block."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager(**batch.student.fed(), output_attentions=True, use_cache=False).attentions


def mean_of_groups(maps: Tensor, groups: int) -> Tensor:
    return torch.stack([part.mean(1) for part in maps.chunk(groups, 1)], 1)


def by_hand(form: str, ours: list[Tensor], theirs: list[Tensor], batch: Batch) -> Tensor:
    """Mean over pairs, heads and positions that are no padding, one by one."""
    rows = []
    for s, t in PAIRS:
        for b, i in batch.mask.nonzero().tolist():
            for student, teacher in zip(ours[s][b, :, i], theirs[t][b, :, i], strict=True):
                seen = teacher > 0
                if form == "kl":
                    rows.append((teacher[seen] * (teacher[seen].log() - student[seen].log())).sum())
                else:
                    rows.append((teacher - student).square().sum())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("form", ["kl", "mse"])
@pytest.mark.parametrize("packing", ["padded", "documents", "stream"])
def test_the_loss_is_that_of_the_maps_transformers_returns(packing, form):
    student, batch = gpt2(2), batch_of(packing)
    teacher = Teacher(gpt2(4, seed=1))
    module = module_of(student, AttentionLoss(PAIRS, form=form))
    total = loss_of(module, teacher, batch)
    expected = by_hand(form, own_maps(student, batch), own_maps(teacher.model, batch), batch)
    assert expected > 0.01
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=0)

    # The gradient along a direction, as a difference of the definition by hand.
    torch.manual_seed(3)
    weights = [block.attn.c_attn.weight for block in student.transformer.h]
    directions, values = [torch.randn_like(weight) for weight in weights], []
    gradients = torch.autograd.grad(total, weights)
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(step * direction)
            values.append(by_hand(form, own_maps(student, batch), own_maps(teacher.model, batch), batch))
    along = torch.stack([(gradient * d).sum() for gradient, d in zip(gradients, directions, strict=True)]).sum()
    torch.testing.assert_close(along, (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("student_heads", "teacher_heads", "groups"), [(2, 4, 2), (6, 4, 2), (4, 2, 2), (1, 4, 1)])
def test_heads_that_follow_each_other_are_averaged_where_numbers_differ(student_heads, teacher_heads, groups):
    student, batch = llama(2, student_heads, width=24), batch_of("padded")
    teacher = Teacher(llama(4, teacher_heads, width=24, seed=1))
    ours, theirs = ([mean_of_groups(m, groups) for m in own_maps(of, batch)] for of in (student, teacher.model))
    total = loss_of(module_of(student, AttentionLoss(PAIRS)), teacher, batch)
    torch.testing.assert_close(total, by_hand("kl", ours, theirs, batch), rtol=1e-5, atol=0)


def test_heads_may_be_paired():
    student, teacher, batch = llama(2, 2), Teacher(llama(4, 4, seed=1, head_dim=4)), batch_of("padded")
    heads = head_pairs("0:3,1:0,1:1", 2, 4)
    assert heads == [(0, 3), (1, 0), (1, 1)]
    total = loss_of(module_of(student, AttentionLoss(PAIRS, heads=heads)), teacher, batch)
    ours = [maps[:, [0, 1, 1]] for maps in own_maps(student, batch)]
    theirs = [maps[:, [3, 0, 1]] for maps in own_maps(teacher.model, batch)]
    torch.testing.assert_close(total, by_hand("kl", ours, theirs, batch), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("mean", "must be auto, or pairs student:teacher like 0:0,1:3, got 'mean'"),
        ("0:0,2:1", "0:0,2:1: the student's heads are 0 to 1, got 2"),
        ("0:4", "0:4: the teacher's heads are 0 to 3, got 4"),
    ],
)
def test_a_head_map_that_cannot_be_is_refused(rule, message):
    with pytest.raises(UsageError, match=message):
        head_pairs(rule, 2, 4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "sliding" not in name])
def test_queries_and_keys_are_those_of_the_models_own_maps(family):
    model = make(FAMILIES[family])
    batch = batch_of("padded")
    visible = torch.ones(len(batch.mask), 10, 10, dtype=torch.bool).tril()
    with capturing(parts(model).blocks, Wanted(attention=frozenset({0, 3}))) as seen, torch.no_grad():
        model(**batch.student.fed(), use_cache=False)
    maps = own_maps(model, batch)
    for block in (0, 3):
        found = log_attention(*seen.attention[block], visible).exp()
        torch.testing.assert_close(found, maps[block], rtol=1e-4, atol=1e-6)
    before = seen.attention[0].query
    model(**batch.student.fed(), use_cache=False)
    assert seen.attention[0].query is before


@pytest.mark.parametrize("family", ["mistral, sliding", "gemma3, sliding", "qwen2, tied, sliding"])
def test_a_window_narrower_than_a_row_is_refused(family):
    model = make(FAMILIES[family])
    check_attention(model, frozenset(range(4)), 4, "teacher")
    with pytest.raises(UsageError, match=r"the teacher, attends in block \d otherwise .* 12 positions"):
        check_attention(model, frozenset(range(4)), 12, "teacher")


def test_a_model_that_shows_no_queries_and_keys_is_refused(monkeypatch):
    model: Any = make(FAMILIES["llama"])
    attention = model.model.layers[2].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **others: (hidden_states, None))
    with pytest.raises(UsageError, match="the student, does not show the queries and keys of its block 2"):
        check_attention(model, frozenset({0, 2}), 8, "student")


def two_tokenizers() -> Batch:
    """Rows of 6 and 4 positions; a student's row is of two documents."""
    torch.manual_seed(3)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    student, teacher = Inputs(torch.randint(61, (2, 6)), positions), Inputs(torch.randint(61, (2, 4)), None)
    pairs = Pairs(torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 2, 5, 1, 3, 4]), torch.tensor([0, 1, 3, 0, 1, 2]))
    return Batch(student, torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.int64), teacher, pairs)


LOOKS_BACK = {
    (0, 0): [0], (0, 2): [0, 2], (0, 5): [0, 2, 5], (1, 1): [1], (1, 3): [3], (1, 4): [3, 4],
}  # fmt: skip
"""Of `two_tokenizers`, for each compared position of the student which others it sees."""
OTHERS = {(0, 0): 0, (0, 2): 1, (0, 5): 3, (1, 1): 0, (1, 3): 1, (1, 4): 2}
"""And which position of the teacher is its counterpart."""


def test_with_two_tokenizers_attention_is_over_the_positions_that_both_have():
    student, teacher, batch = llama(2, 4), Teacher(llama(4, 4, seed=1)), two_tokenizers()
    wanted = Wanted(attention=frozenset(range(4)))
    theirs = teacher(batch.teacher, wanted).captured.attention
    ours = Teacher(student)(batch.student, Wanted(attention=frozenset({0, 1}))).captured.attention
    rows = []
    for s, t in PAIRS:
        for (row, i), seen in LOOKS_BACK.items():
            keys = [OTHERS[row, j] for j in seen]
            for head in range(4):
                scores = ours[s].scale * ours[s].key[row, head // 2, seen] @ ours[s].query[row, head, i]
                taught = (
                    theirs[t].scale * theirs[t].key[row, head // 2, keys] @ theirs[t].query[row, head, OTHERS[row, i]]
                )
                rows.append(F.kl_div(scores.log_softmax(0), taught.log_softmax(0), reduction="sum", log_target=True))
    total = loss_of(module_of(student, AttentionLoss(PAIRS)), teacher, batch)
    torch.testing.assert_close(total, torch.stack(rows).mean(), rtol=1e-9, atol=0)


def relations(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Scores `[heads, len(queries), len(keys)]` of layer-normalised states."""
    width = keys.shape[-1]
    queries, keys = (F.layer_norm(states, (width,)).view(len(states), heads, -1) for states in (queries, keys))
    return torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(width // heads)


@pytest.mark.parametrize("width", [32, 24], ids=["equal widths", "projected"])
@pytest.mark.parametrize("packing", ["padded", "documents"])
def test_alignment_is_its_definition_by_hand(packing, width):
    student, batch = llama(2, 4, width), batch_of(packing)
    teacher = Teacher(llama(4, 4, seed=1))
    component = AttentionAlignmentLoss(PAIRS, widths=(width, 32), heads=4)
    module = module_of(student, component.double())
    wanted = Wanted(outputs=frozenset(range(4)))
    theirs = teacher(batch.teacher, wanted).captured.outputs
    with capturing(parts(student).blocks, Wanted(outputs=frozenset({0, 1}))) as ours:
        student(**batch.student.fed(), use_cache=False)
    rows, counted = [], 0
    positions = batch.student.places()
    for s, t in PAIRS:
        for b, i in batch.mask.nonzero().tolist():
            first = i - int(positions[b, i])
            if first < i:
                own, their = ours.outputs[s][b], theirs[t][b]
                query = F.pad(own[i : i + 1], (0, 32 - width))
                found = relations(query, their[first:i], 4).log_softmax(-1)
                truth = relations(their[i : i + 1], their[first:i], 4).log_softmax(-1)
                rows.append(F.kl_div(found, truth, reduction="sum", log_target=True) / 4)
                counted += 1
    assert int(module.count([batch])["attention_alignment"]) == counted / 2
    total = loss_of(module, teacher, batch)
    torch.testing.assert_close(total, torch.stack(rows).mean(), rtol=1e-9, atol=0)


def test_alignment_with_two_tokenizers_is_over_the_positions_that_both_have():
    student, teacher, batch = llama(2, 4), Teacher(llama(4, 4, seed=1)), two_tokenizers()
    theirs = teacher(batch.teacher, Wanted(outputs=frozenset({1, 3}))).captured.outputs
    ours = Teacher(student)(batch.student, Wanted(outputs=frozenset({0, 1}))).captured.outputs
    rows = []
    for s, t in PAIRS:
        for (row, i), seen in LOOKS_BACK.items():
            if keys := [OTHERS[row, j] for j in seen[:-1]]:
                found = relations(ours[s][row, [i]], theirs[t][row, keys], 2).log_softmax(-1)
                truth = relations(theirs[t][row, [OTHERS[row, i]]], theirs[t][row, keys], 2).log_softmax(-1)
                rows.append(F.kl_div(found, truth, reduction="sum", log_target=True) / 2)
    total = loss_of(module_of(student, AttentionAlignmentLoss(PAIRS, heads=2)), teacher, batch)
    torch.testing.assert_close(total, torch.stack(rows).mean(), rtol=1e-9, atol=0)


COMPONENTS = {
    "attention": lambda: AttentionLoss(PAIRS),
    "attention, mse": lambda: AttentionLoss(PAIRS, form="mse"),
    "attention_alignment": lambda: AttentionAlignmentLoss(PAIRS, heads=4).double(),
}


@pytest.mark.parametrize("kind", COMPONENTS)
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(kind):
    model, batch = llama(4, 4), batch_of("documents")
    component = COMPONENTS[kind]()
    component.pairs = [(0, 0), (2, 2)]
    component.of_student = component.of_teacher = Wanted(*(frozenset({0, 2}),) * 2)
    total = loss_of(module_of(copy.deepcopy(model), component), Teacher(model), batch)
    assert abs(total.item()) < 1e-12


@pytest.mark.parametrize("kind", COMPONENTS)
def test_micro_batches_add_up_and_padding_changes_nothing(kind):
    teacher, whole = Teacher(llama(4, 4, seed=1)), batch_of("padded")

    def gradients(*batches: Batch) -> dict[str, Tensor]:
        module = module_of(llama(2, 4), COMPONENTS[kind]())
        loss_of(module, teacher, *batches).backward()
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    torch.manual_seed(2)
    starts = torch.tensor([0, 4, 3, 10, 6, 5]).cumsum(0)
    blocks = cut((Tokens(torch.randint(61, (28,), dtype=torch.int32), starts, None, None),), 10, "padded")
    rows = [collate([blocks[i]], CPU) for i in range(len(blocks))]
    assert not whole.mask.all()
    filled = Inputs(whole.student.input_ids.masked_fill(~whole.mask, 7), whole.student.position_ids)
    expected = gradients(whole)
    for other in (gradients(*rows), gradients(whole._replace(student=filled, teacher=filled))):
        assert other.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distance", [map_kl, map_square])
def test_gradients_by_differences(distance):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 3).double().requires_grad_(), torch.randn(2, 2, 5, 3).double().requires_grad_()
    visible = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    visible[1, :, 0] = False
    teacher = log_attention(torch.randn(2, 4, 5, 2).double(), torch.randn(2, 1, 5, 2).double(), 0.7, visible)
    assert torch.autograd.gradcheck(lambda q, k: distance(log_attention(q, k, 0.3, visible), teacher), (query, key))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["attention", "attention_alignment"])
def test_under_autocast_the_softmaxes_are_in_single_precision(kind, half):
    student, teacher, batch = llama(2, 4).float(), Teacher(llama(4, 4, seed=1).float()), batch_of("padded")
    module = module_of(student, COMPONENTS[kind]().float())
    exact = loss_of(module, teacher, batch)
    with torch.autocast("cpu", half):
        total = loss_of(module, Teacher(copy.deepcopy(teacher.model).to(half)), batch)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=0.1, atol=0.01)
    total.backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def fresh(number: int) -> Batch:
    torch.manual_seed(100 + number)
    ids = Inputs(torch.randint(61, (4, 24)), None)
    return Batch(ids, torch.ones(4, 24, dtype=torch.bool), ids.input_ids, ids, None)


@pytest.mark.parametrize("module_sees", ["the student", "the teacher"])
def test_the_alignment_module_alone_cannot_bring_the_loss_to_0(module_sees):
    """Trained on text without end, with the student frozen: on fresh text most of the loss is still there.

    A module that is shown the teacher's states, as the founding run's was, comes to 0 without any student.
    """
    teacher, student = Teacher(gpt2(4, seed=1).float()), gpt2(2).float()
    component = AttentionAlignmentLoss([(1, 3)], heads=4)
    component.projections[0] = torch.nn.Linear(32, 32, bias=False)
    optimizer = torch.optim.AdamW(component.parameters(), lr=1e-2)

    def loss(number: int) -> Tensor:
        batch = fresh(number)
        theirs = teacher(batch.teacher, component.of_teacher).captured
        ours = Teacher(student)(batch.student, component.of_student).captured
        if module_sees == "the teacher":
            ours.outputs[1] = theirs.outputs[3]
        counts = {component.name: component.count(batch)}
        return component(ours, theirs, batch, counts).losses[component.name]

    before = torch.stack([loss(-1 - n).detach() for n in range(4)]).mean().item()
    for number in range(300):
        optimizer.zero_grad()
        loss(number).backward()
        optimizer.step()
    after = torch.stack([loss(-1 - n).detach() for n in range(4)]).mean().item()
    print(f"alignment, module trained on {module_sees}: {before:.3f} -> {after:.3f}")
    if module_sees == "the teacher":
        assert after < 0.02 * before
    else:
        assert after > 0.4 * before


def test_a_configuration_is_followed():
    student, teacher = make(FAMILIES["llama"]), make(FAMILIES["gpt2"])
    layer_map = LayerMap(((0, 2), (1, 1)), "0:2,1:1", 4, (8, 16))
    config = Config(attention_loss="mse", head_map="1:0", projection="fixed", seq_len=8)
    attention = AttentionLoss.of(config, student, teacher, layer_map)
    assert (attention.pairs, attention.form, attention.heads) == (((0, 2), (1, 1)), "mse", [(1, 0)])
    aligned = AttentionAlignmentLoss.of(config, teacher, layer_map)
    assert aligned.heads == 2
    assert [(p.shape, p.requires_grad) for p in aligned.parameters()] == [((16, 8), False)] * 2
    with pytest.raises(UsageError, match="the student's heads are 0 to 1, got 7"):
        AttentionLoss.of(Config(head_map="7:0"), student, teacher, layer_map)


def test_what_uses_neither_keeps_no_queries(monkeypatch):
    """Attention is looked at only of the blocks that a loss compares, and of none where there is no such loss."""
    seen = []
    watched = capture.watched_attention
    monkeypatch.setattr(capture, "watched_attention", lambda *given: seen.append(given[1]) or watched(*given))
    config: PreTrainedConfig = FAMILIES["llama"]
    Teacher(make(config))(batch_of("padded").teacher, Wanted(outputs=frozenset({1})))
    assert seen == []
    Teacher(make(config))(batch_of("padded").teacher, Wanted(attention=frozenset({1})))
    assert seen == [{1}]
