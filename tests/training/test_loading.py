"""Models loaded from folders and GGUF files, in each number format; what cannot be loaded is named with its cure."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from fastdistill.training import gguf_file
from fastdistill.training.blocks import Inputs
from fastdistill.training.capture import Wanted
from fastdistill.training.config import UsageError
from fastdistill.training.demo import train_tokenizer
from fastdistill.training.loading import DTYPES, load
from fastdistill.training.models import parts
from fastdistill.training.teacher import Teacher
from tests.training.families import GROUPED, IDS, make

CONFIG = LlamaConfig(**{**GROUPED, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}, rms_norm_eps=1e-5)
TEXT = ["a\n\n12  345 and 6", "tokens of 2024"]
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
KNOWN_BY_NAME = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="this transformers does not know the name, so it is refused",
)
NEEDS_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


@pytest.fixture(scope="module")
def model() -> Any:
    return make(CONFIG)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    model.save_pretrained(path)
    train_tokenizer(TEXT * 4, 300).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_loaded_in_the_format_that_is_asked_for(model, folder, dtype):
    loaded, tokenizer = load(str(folder), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {DTYPES[dtype]}
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(DTYPES[dtype]))
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.03), (4, 0.3)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_quantised_teacher_gives_nearly_the_models_own_states(model, folder, bits, tolerance, dtype):
    quantised = load(str(folder), dtype=dtype, bits=bits)[0]
    assert parts(quantised).head.weight.dtype == DTYPES[dtype]
    assert not parts(quantised).blocks[0].get_parameter("mlp.up_proj.weight").is_floating_point()
    states = Teacher(quantised)(Inputs(IDS, None), Wanted(outputs=frozenset({0}))).captured.outputs[0].float()
    exact = Teacher(model)(Inputs(IDS, None), Wanted(outputs=frozenset({0}))).captured.outputs[0]
    assert 1e-4 < (states - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: shutil.rmtree(path), "there is no such folder"),
        (lambda path: (path / "config.json").unlink(), "the folder has no config.json"),
        (lambda path: (path / "model.safetensors").unlink(), "the folder has no weights"),
        (
            lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
            r"its weights are pickled \(pytorch_model.bin\), .* save them as safetensors",
        ),
        (lambda path: (path / "model.safetensors").write_bytes(b"cut"), "model [^:]*: .*[Hh]eader"),
        (
            lambda path: [file.unlink() for file in path.glob("tokenizer*")],
            "tokenizer",
        ),
        (lambda path: (path / "config.json").write_text('{"model_type": "unheard-of"}'), "unheard-of"),
        (
            lambda path: (path / "config.json").write_text('{"auto_map": {"AutoConfig": "code.Config"}}'),
            "trust_remote_code|model_type",
        ),
    ],
    ids=["folder", "config", "weights", "pickled", "damaged", "tokenizer", "kind", "code"],
)
def test_what_a_folder_lacks_is_named(folder, tmp_path, change, message):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    change(path)
    with pytest.raises(UsageError, match=message) as error:
        load(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_name_that_cannot_be_looked_up_is_told_from_a_wrong_one(name):
    with pytest.raises(UsageError, match=f"cannot load the model {name}: .*the hub cannot be reached .*hf download"):
        load(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "fp8"}, "one of fp32, bf16, fp16, got 'fp8'"), ({"bits": 3}, "4 or 8 bits, got 3")],
    ids=["dtype", "bits"],
)
def test_formats_that_are_not_known_are_refused(folder, options, message):
    with pytest.raises(UsageError, match=message):
        load(str(folder), **options)


def test_a_package_that_is_missing_is_named_with_its_command(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdistill.training.loading.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="in 4 bits is done by bitsandbytes: pip install bitsandbytes"):
        load(str(folder), bits=4)
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="pip install gguf"):
        load(str(tmp_path / "x.gguf"))


def embedding(model: PreTrainedModel) -> torch.Tensor:
    return model.state_dict()["model.embed_tokens.weight"]


def write_gguf(path: Path, model: Any, *, pre: str | None = "smollm", architecture: str = "llama") -> None:
    """The model as llama.cpp's converter writes it: rows of query and key paired for its own rotary embedding."""
    from gguf import GGUFWriter

    config, weights = model.config, model.state_dict()
    tokenizer: Any = train_tokenizer(TEXT * 4, 300)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(len(tokens), config.vocab_size)]
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(4)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)

    def add_tensor(name: str, weight: str, heads: int | None = None) -> None:
        value = weights[weight].numpy()
        if heads:
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(name, numpy.ascontiguousarray(value))

    add_tensor("token_embd.weight", "model.embed_tokens.weight")
    add_tensor("output_norm.weight", "model.norm.weight")
    add_tensor("output.weight", "lm_head.weight")
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(4):
        for name, weight in names.items():
            add_tensor(f"blk.{layer}.{name}.weight", f"model.layers.{layer}.{weight}.weight", heads.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_path(model, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    write_gguf(path, model)
    return path


@NEEDS_GGUF
def test_a_gguf_file_is_the_model_and_the_tokenizer_that_it_was_made_of(model, gguf_path):
    loaded, tokenizer = load(str(gguf_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not getattr(loaded, "is_quantized", False)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    for text in TEXT:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@NEEDS_GGUF
def test_a_gguf_file_is_unpacked_once_for_each_content_and_format(gguf_path, tmp_path, monkeypatch):
    first = load(str(gguf_path))[0]
    half = load(str(gguf_path), dtype="bf16")[0]
    assert half.dtype == torch.bfloat16
    kept = sorted((tmp_path / "cache").iterdir())
    assert [folder.name.split("-")[-1] for folder in kept] == ["bfloat16", "float32"]
    assert {weight.dtype for weight in load_file(kept[0] / "model.safetensors").values()} == {torch.bfloat16}

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "find_spec", lambda name: None)  # the file is not even read
        again = load(str(gguf_path))[0]
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in first.state_dict().items())

    (kept[1] / "model.safetensors").unlink()  # not written over: loaded weights are mapped to the file
    (kept[1] / "model.safetensors").write_bytes(b"damaged")
    repaired = load(str(gguf_path))[0]
    assert torch.equal(embedding(repaired), embedding(first))

    other = make(CONFIG)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    write_gguf(gguf_path, other)
    changed = load(str(gguf_path))[0]
    torch.testing.assert_close(embedding(changed), 2 * embedding(first))


@NEEDS_GGUF
def test_an_unpacked_gguf_can_be_trained_and_saved_as_any_model(gguf_path, tmp_path):
    loaded, tokenizer = load(str(gguf_path))
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(embedding(again), embedding(loaded))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode(TEXT[0]) == tokenizer.encode(TEXT[0])


def words(path: Path, text: str) -> list[str]:
    """What the file's tokenizer merges within."""
    tokenizer: Any = load(str(path))[1]
    return [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@NEEDS_GGUF
@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("smollm", ["a", "ĊĊ", "1", "2", "ĠĠ", "3", "4", "5"]),
        ("gpt-2", ["a", "Ċ", "Ċ", "12", "Ġ", "Ġ345"]),
        pytest.param("qwen2", ["a", "ĊĊ", "1", "2", "Ġ", "Ġ", "3", "4", "5"], marks=KNOWN_BY_NAME),
        pytest.param("llama-bpe", ["a", "ĊĊ", "12", "Ġ", "Ġ", "345"], marks=KNOWN_BY_NAME),
    ],
)
def test_a_gguf_files_text_is_cut_as_it_says(model, gguf_path, pre, cut):
    write_gguf(gguf_path, model, pre=pre)
    assert words(gguf_path, "a\n\n12  345") == cut


@NEEDS_GGUF
@pytest.mark.parametrize("pre", ["unheard-of", "default", None])
def test_a_gguf_file_that_does_not_say_how_text_is_cut_is_refused(model, gguf_path, pre):
    write_gguf(gguf_path, model, pre=pre)
    with pytest.raises(UsageError, match=f"model.gguf: its pre-tokenizer {pre!r} is not known .* original folder"):
        load(str(gguf_path))


@NEEDS_GGUF
def test_what_is_no_gguf_file_or_of_no_known_architecture_is_named(model, gguf_path, tmp_path):
    with pytest.raises(UsageError, match=r"absent\.gguf: there is no such file"):
        load(str(tmp_path / "absent.gguf"))
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(UsageError, match=r"text\.gguf: .*GGUF"):
        load(str(tmp_path / "text.gguf"))
    write_gguf(gguf_path, model, architecture="unheard-of")
    with pytest.raises(UsageError, match=r"model\.gguf: .*unheard-of") as error:
        load(str(gguf_path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()
