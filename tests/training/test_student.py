"""Students made of a teacher's layers: which layers a rule keeps, and that the model they make is what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    Qwen2MoeConfig,
)

from fastdistill.training.config import UsageError
from fastdistill.training.models import parts
from fastdistill.training.student import build_student, kept_layers, layer_importance
from tests.training.families import EXPERTS, FAMILIES, GPT2, GROUPED, IDS, SMALL, make

LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


def leave_out(model: Any, *layers: int) -> None:
    """From now on these blocks do nothing."""
    for layer in layers:
        parts(model).blocks[layer].forward = lambda states, *_, **__: states


@pytest.mark.parametrize(("depth", "kept"), [(4, [1, 3]), (5, [0, 2, 4]), (1, [0]), (2, [1])])
def test_every_other_keeps_the_last(depth, kept):
    assert kept_layers("every-other", depth) == kept


@pytest.mark.parametrize(
    ("rule", "depth", "kept"),
    [("first", 4, [0, 1]), ("first", 5, [0, 1, 2]), ("first:1", 5, [0]), ("first:5", 5, [0, 1, 2, 3, 4])],
)
def test_first_keeps_the_first_ones_and_half_if_no_number_is_given(rule, depth, kept):
    assert kept_layers(rule, depth) == kept


def test_numbers_are_kept_as_they_are():
    assert kept_layers("0,1,2,8", 9) == [0, 1, 2, 8]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.data())
def test_importance_keeps_the_most_important_in_their_order(data):
    values = data.draw(st.lists(st.integers(-1000, 1000), min_size=1, max_size=12, unique=True))
    count = data.draw(st.integers(1, len(values)))
    kept = kept_layers(f"importance:{count}", len(values), lambda: torch.tensor(values))
    assert kept == sorted(kept)
    assert sorted(values[i] for i in kept) == sorted(values)[len(values) - count :]


def test_importance_keeps_half_rounded_up_if_no_number_is_given():
    assert kept_layers("importance", 5, lambda: torch.tensor([3.0, 0.0, 2.0, 0.5, 1.0])) == [0, 2, 4]


def test_importance_is_measured_for_its_own_rule_alone():
    def measure() -> torch.Tensor:
        raise AssertionError("measured")

    for rule in ("every-other", "first", "first:2", "0,2"):
        kept_layers(rule, 4, measure)
    with pytest.raises(AssertionError, match="measured"):
        kept_layers("importance", 4, measure)


@pytest.mark.parametrize(
    "rule",
    ["3,1", "0,0", "0,4", "-1", "most", "", "1,", "first:0", "first:5", "importance:5", "importance:", "first: 2"],
)
def test_impossible_layers_are_refused(rule):
    with pytest.raises(UsageError, match="--student-layers"):
        kept_layers(rule, 4, lambda: torch.arange(4.0))


def test_importance_without_text_is_refused():
    with pytest.raises(UsageError, match="--student-layers importance: importance is measured on text"):
        kept_layers("importance", 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_what_the_loss_rises_by_when_a_layer_is_left_out(family):
    model = make(FAMILIES[family]).train()
    with torch.no_grad():
        measured = layer_importance(model, IDS)
    assert model.training
    assert not any(block._forward_hooks for block in parts(model).blocks)

    def loss(skipped: int | None) -> torch.Tensor:
        own = make(FAMILIES[family])
        if skipped is not None:
            leave_out(own, skipped)
        with torch.no_grad():
            return F.cross_entropy(own(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())

    expected = torch.stack([loss(skipped) - loss(None) for skipped in range(4)])
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.01


def test_a_layer_that_does_nothing_is_not_important():
    model = make(FAMILIES["llama"])
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            parts(model).blocks[2].get_parameter(f"{name}.weight").zero_()
    importance = layer_importance(model, IDS)
    assert importance[2] == 0
    assert importance.count_nonzero() == 3


def test_importance_needs_no_gradients_and_takes_half_precision():
    model = make(FAMILIES["llama"])
    exact = layer_importance(model, IDS)
    assert not exact.requires_grad
    assert exact.dtype == torch.float32
    half = layer_importance(model.to(torch.bfloat16), IDS)
    torch.testing.assert_close(half, exact, rtol=0.2, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_layers_is_the_teacher(family):
    teacher = make(FAMILIES[family])
    student = build_student(teacher, range(4)).eval()
    with torch.no_grad():
        assert torch.equal(student(input_ids=IDS).logits, teacher(input_ids=IDS).logits)


@pytest.mark.parametrize("kept", [[0, 2], [1, 3], [0, 2, 3]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_some_layers_is_the_teacher_without_the_others(family, kept, tmp_path):
    teacher = make(FAMILIES[family])
    student = build_student(teacher, kept).eval()
    with torch.no_grad():
        leave_out(teacher, *set(range(4)) - set(kept))
        assert torch.equal(student(input_ids=IDS).logits, teacher(input_ids=IDS).logits)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == len(kept)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert torch.equal(again(input_ids=IDS).logits, student(input_ids=IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_a_student_know_their_new_numbers(family):
    student: Any = build_student(make(FAMILIES[family]), [1, 3])
    numbers = [
        [module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")]
        for block in parts(student).blocks
    ]
    assert all(all(number == i for number in found) for i, found in enumerate(numbers))
    generated = student.eval().generate(
        IDS[:1, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False
    )  # with a cache
    with torch.no_grad():
        logits = student(input_ids=generated[:, :-1]).logits
    logits[..., 0] = -torch.inf  # the end of text, which the minimum forbids
    assert torch.equal(logits.argmax(-1)[0, -4:], generated[0, -4:])


def test_what_a_configuration_says_of_layers_is_said_of_the_kept_ones():
    sliding = build_student(make(FAMILIES["gemma3, sliding"]), [1, 2, 3]).config
    assert sliding.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert build_student(make(FAMILIES["smollm3"]), [0, 1]).config.no_rope_layers == [1, 0]
    assert build_student(make(FAMILIES["qwen2-moe"]), [0, 1, 3]).config.mlp_only_layers == [1, 2]


def test_lists_of_token_ids_are_not_taken_for_lists_of_layers():
    teacher = make(LlamaConfig(**{**GROUPED, "eos_token_id": [0, 1, 2, 3]}))
    assert build_student(teacher, [1, 2]).config.eos_token_id == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_student_holds_float32_whatever_its_teacher_holds(dtype):
    teacher = make(FAMILIES["qwen2, tied, sliding"]).to(dtype)
    student: Any = build_student(teacher, [0, 3])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight.float())


def test_changing_the_student_leaves_the_teacher_alone():
    teacher = make(GPT2)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student = build_student(teacher, [1, 3])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.config.eos_token_id = student.generation_config.eos_token_id = 7
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert teacher.config.eos_token_id == teacher.generation_config.eos_token_id == 0


@pytest.mark.parametrize(
    ("config", "kept", "why"),
    [
        (
            Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=8, decoder_sparse_step=2),
            [1, 3],
            "mlp",
        ),
        (
            DeepseekV3Config(
                **SMALL, **LATENT, first_k_dense_replace=2, n_routed_experts=4, n_group=1, topk_group=1,
                num_experts_per_tok=2, moe_intermediate_size=8,
            ),
            [0, 3],
            "mlp",
        ),
        (GPT2Config(**{**GPT2.to_dict(), "scale_attn_by_inverse_layer_idx": True}), [1, 3], r"attn\.scaling"),
    ],
    ids=["every second layer sparse", "first layers dense", "attention scaled by number"],
)  # fmt: skip
def test_layers_whose_number_matters_are_refused(config, kept, why):
    teacher = make(config)
    with pytest.raises(UsageError, match=f"layers depend on their number, so {kept[0]},{kept[1]} cannot .*{why}"):
        build_student(teacher, kept)
    build_student(teacher, range(4))


def test_quantised_layers_are_refused():
    teacher = make(FAMILIES["llama"])
    teacher.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UsageError, match="a student cannot be made of quantised layers"):
        build_student(teacher, [0, 1])
