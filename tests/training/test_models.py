"""Models taken apart and built: base and head give the model's own logits, a student is the teacher's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config

from fastdistill.training.config import UsageError
from fastdistill.training.models import build_student, captured_outputs, kept_layers, load, parts
from fastdistill.training.objective import Teacher

GPT2 = GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=4, n_head=2)
SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
FAMILIES = {
    "gpt2": GPT2,
    "llama": LlamaConfig(**SMALL),
    "qwen2, tied": Qwen2Config(**SMALL, tie_word_embeddings=True, use_sliding_window=True, max_window_layers=2),
}
IDS = torch.arange(24).reshape(2, 12)


def make(config: PreTrainedConfig):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_base_is_the_models_own_logits(family):
    model = make(FAMILIES[family])
    own = parts(model)
    with captured_outputs(own.blocks, [0, 3]) as outputs, torch.no_grad():
        logits = own.head(own.base(input_ids=IDS).last_hidden_state)
        whole = model(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(logits, whole.logits)
    assert torch.equal(outputs[0], whole.hidden_states[1])
    assert sorted(outputs) == [0, 3]


def test_a_head_that_does_more_is_refused():
    with pytest.raises(UsageError, match=r"Gemma2ForCausalLM: its logits differ from head\(hidden\) by up to"):
        parts(make(Gemma2Config(**SMALL, final_logit_softcapping=0.01, sliding_window=8)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_layers_is_the_teacher(family):
    teacher = make(FAMILIES[family])
    student = build_student(teacher, range(4)).eval()
    with torch.no_grad():
        assert torch.equal(student(input_ids=IDS).logits, teacher(input_ids=IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_some_layers_is_the_teacher_without_the_others(family, tmp_path):
    teacher = make(FAMILIES[family])
    student = build_student(teacher, [0, 2]).eval()
    with torch.no_grad():
        for skipped in (1, 3):
            parts(teacher).blocks[skipped].forward = lambda states, *_, **__: states
        assert torch.equal(student(input_ids=IDS).logits, teacher(input_ids=IDS).logits)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 2
    assert torch.equal(again(input_ids=IDS).logits, student(input_ids=IDS).logits)


def test_changing_the_student_leaves_the_teacher_alone():
    teacher = make(GPT2)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in build_student(teacher, [1, 3]).parameters():
            parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


@pytest.mark.parametrize(("depth", "kept"), [(4, [1, 3]), (5, [0, 2, 4]), (1, [0]), (2, [1])])
def test_every_other_keeps_the_last(depth, kept):
    assert kept_layers("every-other", depth) == kept


@pytest.mark.parametrize("rule", ["3,1", "0,0", "0,4", "-1", "most", ""])
def test_impossible_layers_are_refused(rule):
    with pytest.raises(UsageError, match="--student-layers must"):
        kept_layers(rule, 4)


def test_the_teacher_is_frozen_and_the_same_twice():
    model = make(GPT2Config(**{**GPT2.to_dict(), "resid_pdrop": 0.5, "embd_pdrop": 0.5})).train()
    teacher = Teacher(model)
    first, second = teacher(IDS, [1, 3]), teacher(IDS, [1, 3])
    assert torch.equal(first.hidden, second.hidden)
    assert all(map(torch.equal, first.layers, second.layers))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not first.hidden.requires_grad


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"cannot load the model {tmp_path}/absent"):
        load(str(tmp_path / "absent"))
