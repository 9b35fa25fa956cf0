"""A model taken apart: base and head give its own logits, blocks what they put out, documents of a row stay apart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BloomConfig, FalconConfig, Gemma2Config, GPT2Config, GraniteConfig

from fastdistill.training.blocks import Inputs
from fastdistill.training.capture import Wanted, capturing
from fastdistill.training.config import UsageError
from fastdistill.training.models import check_document_masks, parts
from fastdistill.training.teacher import Teacher
from tests.training.families import FAMILIES, GPT2, GROUPED, IDS, OPT, make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_base_is_the_models_own_logits(family, dtype):
    model = make(FAMILIES[family]).to(dtype)
    own = parts(model)
    with capturing(own.blocks, Wanted(outputs=frozenset({0, 2, 3}))) as seen, torch.no_grad():
        logits = own.head(own.base(input_ids=IDS).last_hidden_state)
        whole = model(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(logits, whole.logits)
    assert sorted(seen.outputs) == [0, 2, 3]
    # hidden_states are the embeddings, what each block but the last puts out, and the final norm of the last.
    assert torch.equal(seen.outputs[0], whole.hidden_states[1])
    assert torch.equal(seen.outputs[2], whole.hidden_states[3])
    assert seen.outputs[3].shape == (2, 12, 16)
    assert not torch.equal(seen.outputs[3], seen.outputs[2])


def test_nothing_is_captured_when_capturing_has_ended():
    model = make(GPT2)
    with capturing(parts(model).blocks, Wanted(outputs=frozenset({0}))) as seen:
        model(input_ids=IDS)
    before = seen.outputs[0]
    model(input_ids=IDS)
    assert seen.outputs[0] is before
    assert not any(block._forward_hooks for block in parts(model).blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=30.0, sliding_window=8),
        GraniteConfig(**GROUPED, logits_scaling=8.0),
    ],
    ids=["soft-capped", "scaled"],
)
def test_a_head_that_does_more_is_refused(config, dtype):
    model = make(config).to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.01)  # logits far below the cap, as an untrained model's are
    with pytest.raises(UsageError, match="ForCausalLM: its logits are not its head's output"):
        parts(model)


def test_a_quantised_head_is_refused():
    model = make(FAMILIES["llama"])
    weight = model.get_output_embeddings().weight.to(torch.int8)
    model.get_output_embeddings().weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UsageError, match=r"its output head holds torch\.int8 numbers"):
        parts(model)


def test_a_model_is_probed_once_and_found_in_the_mode_it_was():
    model = make(GPT2).train()
    runs = []
    model.base_model.register_forward_hook(lambda module, *_: runs.append(module.training))
    parts(model)
    assert runs == [False, False]  # the model's own logits, and base and head's
    assert model.training
    parts(model)
    assert len(runs) == 2
    parts(copy.deepcopy(model))
    assert len(runs) == 4


KEEP_DOCUMENTS_APART = [family for family in FAMILIES if family != "opt"]


@pytest.mark.parametrize("family", KEEP_DOCUMENTS_APART)
def test_packed_documents_are_read_as_if_each_were_alone(family):
    model = make(FAMILIES[family])
    check_document_masks(model, "teacher")
    base, lengths = parts(model).base, [2, 6, 3]
    ids = torch.randint(61, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        alone = [base(input_ids=document, use_cache=False).last_hidden_state for document in ids.split(lengths, 1)]
        stream = base(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    assert (packed - stream).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_half_precision_is_no_reason_to_see_documents_in_each_other(family, dtype):
    check_document_masks(make(FAMILIES[family]).to(dtype), "teacher")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_sees_earlier_documents_is_refused(dtype):
    model = make(OPT).to(dtype).train()
    with pytest.raises(UsageError, match=r"OPTForCausalLM sees a document in those after it .* student .* stream"):
        check_document_masks(model, "student")
    assert model.training


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=61, hidden_size=16, n_layer=4, n_head=2), "takes no position_ids"),
        (FalconConfig(vocab_size=61, hidden_size=16, num_hidden_layers=4, num_attention_heads=2), "sees a document"),
    ],
    ids=["bloom", "falcon"],
)
def test_models_that_cannot_be_told_where_documents_start_are_refused(config, reason):
    with pytest.raises(UsageError, match=f"{reason}.*--packing stream"):
        check_document_masks(make(config), "teacher")


def test_the_teacher_is_frozen_and_the_same_twice():
    model = make(GPT2Config(**{**GPT2.to_dict(), "resid_pdrop": 0.5, "embd_pdrop": 0.5})).train()
    teacher = Teacher(model)
    wanted = Wanted(outputs=frozenset({1, 3}))
    first, second = teacher(Inputs(IDS, None), wanted), teacher(Inputs(IDS, None), wanted)
    assert torch.equal(first.hidden, second.hidden)
    assert first.captured.outputs.keys() == {1, 3}
    assert all(torch.equal(first.captured.outputs[i], second.captured.outputs[i]) for i in (1, 3))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not first.hidden.requires_grad
