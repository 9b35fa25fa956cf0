"""Estimates: sizes counted on the models themselves, arithmetic by hand, and the figures that presets print."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fastdistill.training.config import Config
from fastdistill.training.demo import teacher_recipe, untrained_teacher
from fastdistill.training.estimate import CPU, H200, P100, Device, Estimate, _Memory, estimate
from fastdistill.training.preset_shapes import PAIRS, STAND_IN, estimate_preset
from fastdistill.training.presets import PRESETS
from fastdistill.training.shapes import Shape, kept_bytes
from tests.training.families import FAMILIES, IDS, SMALL

ROOT = Path(__file__).resolve().parents[2]
LLAMA = LlamaConfig(**SMALL, tie_word_embeddings=True)
WIDER = LlamaConfig(**{**SMALL, "hidden_size": 32, "num_hidden_layers": 8})


def of(config: Config, device: Device = CPU, student: Any = LLAMA, teacher: Any = LLAMA, **arguments: Any) -> Estimate:
    return estimate(config, student, teacher, device, **arguments)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_model(name):
    model = AutoModelForCausalLM.from_config(FAMILIES[name])
    shape = Shape.of(FAMILIES[name])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.matrices >= shape.active > 0
    assert (shape.matrices > shape.active) == ("moe" in name or name == "mixtral")


def test_sizes_of_a_llama_by_hand():
    shape = Shape.of(LLAMA)
    block = 4 * 16 * 16 + 3 * 16 * 24
    assert (shape.depth, shape.width, shape.vocab_size, shape.tied) == (4, 16, 61, True)
    assert (shape.matrices, shape.active, shape.widest, shape.attention_width) == (4 * block, 4 * block, 24, 16)
    assert shape.parameters == 4 * block + 61 * 16 + 9 * 16
    assert shape.block_flops(positions=10) == 2 * 4 * block + 4 * 4 * 10 * 16
    assert shape.head_flops() == 2 * 61 * 16


def test_of_experts_those_count_that_a_token_is_sent_to():
    shape = Shape.of(STAND_IN)
    attention = 1024 * 64 * (16 + 4 + 4 + 16)
    router, expert = 1024 * 32, 3 * 1024 * 512
    assert shape.matrices == 16 * (attention + router + 32 * expert)
    assert shape.active == 16 * (attention + router + 4 * expert)
    assert shape.widest == 4 * 2 * 512


@pytest.mark.parametrize("positions", [12, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gpt-neox", "gemma"])
def test_what_is_kept_is_what_autograd_keeps(name, positions):
    """In a real forward pass, without a mask. With 8 positions a head's states have the shape of scores."""
    model = AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x

    def bytes_of(rows: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.base_model(input_ids=IDS[:, :positions].repeat(rows, 1), use_cache=False)
        return sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in own)

    expected = bytes_of(2) - bytes_of(1)
    assert kept_bytes(FAMILIES[name], 2, positions, half=False, masks=False) == pytest.approx(expected, rel=0.02)


def test_masks_and_half_precision_change_what_is_kept():
    bare, masked, half = (
        kept_bytes(LLAMA, 2, 12, half=half, masks=masks)
        for half, masks in ((False, False), (False, True), (True, False))
    )
    assert masked - bare == 4 * 2 * 12 * 12 * 4
    assert 0.5 * bare < half < bare


def test_a_student_of_experts_is_refused():
    with pytest.raises(ValueError, match="qwen3_moe keeps cannot be counted"):
        of(Config(), student=FAMILIES["qwen3-moe"])


def test_memory_by_hand():
    """One micro-batch of 2 x 16 tokens in float32, where a chunk takes all tokens."""
    config = Config(batch_size=2, seq_len=16, layerwise_weight=0.5, packing="stream")
    found, shape = of(config), Shape.of(LLAMA)
    state = 32 * 16 * 4
    assert found.moment == "loss"
    assert found.memory == {
        "student's weights": 4 * shape.parameters,
        "Adam's two means": 8 * shape.parameters,
        "teacher's weights": 4 * shape.parameters,
        "teacher's states": 5 * state,
        "student's activations": kept_bytes(LLAMA, 2, 16, half=False, masks=False),
        "a chunk of logits": 32 * 4 * ((2 + 3) * 61 + 3 * 16),
        "gradients of the losses": 4 * 16 * (32 + 61),
    }
    assert found.peak == sum(found.memory.values())


def test_each_setting_has_its_part():
    base = Config(batch_size=2, seq_len=16, layerwise_weight=0.5)
    shape, wide = Shape.of(LLAMA), Shape.of(WIDER)

    def memory(device=P100, teacher=LLAMA, two_tokenizers=False, **settings) -> dict[str, int]:
        return of(dataclasses.replace(base, **settings), device, teacher=teacher, two_tokenizers=two_tokenizers).memory

    assert memory(ema_decay=0.9)["averaged weights"] == 4 * shape.parameters
    assert memory(grad_accum=2)["gradients"] == 4 * shape.parameters
    assert memory()["teacher's weights"] == 2 * shape.parameters
    assert memory(teacher_dtype="fp32")["teacher's weights"] == 4 * shape.parameters
    assert memory(teacher_bits=4)["teacher's weights"] == 2 * shape.parameters - 3 * shape.matrices // 2
    assert memory(teacher_device="cpu")["teacher's weights"] == 2 * 61 * 16
    assert memory(kd_weight=0.0, layerwise_weight=0.0).get("teacher's states") is None
    assert memory(teacher=WIDER)["student's weights"] == 4 * (shape.parameters + 4 * 16 * 32)
    assert memory(teacher=WIDER)["states compared"] == 4 * 32 * 2 * (16 + 32)
    assert memory(teacher=WIDER, projection="fixed")["student's weights"] == 4 * shape.parameters
    crossed = memory(teacher=WIDER, two_tokenizers=True)
    assert crossed["half-precision copies"] == 2 * shape.matrices + 4 * 61 * 32
    assert crossed["states compared"] == 32 * (5 * (4 * 16 + 2 * 32) + 4 * 2 * (16 + 32))
    assert crossed["gradients of the losses"] == 2 * 4 * 16 * (32 + 61)
    assert wide.parameters > shape.parameters


def test_attention_takes_maps_only_where_heads_are_averaged_or_squares_taken():
    base = Config(batch_size=2, seq_len=512, packing="stream", kd_weight=0.0, lm_weight=1e-9, attention_weight=1.0)
    map_bytes, row = 4 * 2 * 512**2, 4 * 2 * 512
    shape, fewer = Shape.of(LLAMA), LlamaConfig(**{**SMALL, "num_attention_heads": 1, "num_key_value_heads": 1})

    def memory(device=P100, teacher=LLAMA, **settings) -> tuple[int, int]:
        config = dataclasses.replace(base, **settings)
        found = _Memory(config, shape, Shape.of(teacher), LLAMA, device, False).components()
        return found["attention maps"], found["attention without maps"]

    heads, depth = shape.heads, shape.depth
    rows = depth * 4 * heads * row
    assert memory() == (0, rows + 3 * heads * map_bytes)
    assert memory(H200) == (0, rows)
    assert memory(H200, precision="fp32") == (0, rows + 3 * heads * map_bytes)
    assert memory(attention_loss="mse") == ((3 * heads * depth + 5 * heads) * map_bytes, 0)
    assert memory(teacher=fewer) == (((heads + 1) * depth + 5 * heads) * map_bytes, 0)
    assert memory(teacher=fewer, head_map="0:0,1:0") == (0, rows + 3 * heads * map_bytes)
    kept = depth * (4 * heads + 2 * shape.width) * row
    aligned: dict[str, Any] = {"attention_weight": 0.0, "attention_alignment_weight": 1.0}
    assert memory(H200, **aligned) == (0, kept + 3 * heads * map_bytes)
    assert memory(CPU, seq_len=8192)[1] == 16 * rows + 3 * heads * 16 * map_bytes // 32


def test_contrast_has_cosines_of_tokens_where_texts_are_few():
    def cosines(batch_size: int, negatives: str, weight: float = 0.1) -> int:
        config = Config(batch_size=batch_size, seq_len=64, contrastive_weight=weight, contrastive_negatives=negatives)
        shape = Shape.of(LLAMA)
        return _Memory(config, shape, shape, LLAMA, CPU, False).components().get("cosines of tokens", 0)

    table = 4 * 64**2
    assert [cosines(2, "auto"), cosines(31, "auto"), cosines(32, "auto")] == [8 * 2 * table, 8 * 31 * table, 0]
    assert [cosines(2, "texts"), cosines(64, "tokens"), cosines(2, "tokens", 0.0)] == [0, 8 * 64 * table, 0]


def test_a_chunk_is_as_long_as_the_device_takes_it():
    config = Config(batch_size=64, seq_len=128, packing="stream", gradient_checkpointing=True)
    vocab = LlamaConfig(**{**SMALL, "vocab_size": 50_000})
    devices = P100, H200, Device("a later GPU", 12, "bf16"), CPU
    chunks = {device.name: of(config, device, vocab, vocab).memory["a chunk of logits"] for device in devices}
    assert chunks == {
        "P100": 256 * (10 * 50_000 + 8 * 16),
        "H200": 2048 * (10 * 50_000 + 8 * 16),
        "a later GPU": 2048 * (10 * 50_000 + 8 * 16),
        "CPU": cpu_chunk(50_000),
    }
    assert of(config, P100, vocab, vocab).chunk_tokens == 256


def cpu_chunk(vocab: int) -> int:
    """Bytes of two models' logits and, of 2 MB's worth of tokens, a thread having at least one, three buffers more."""
    threads = torch.get_num_threads()
    block = max(1, (2 << 20) // (4 * vocab * threads)) * threads
    return ((256 << 20) - 12 * vocab * block) // (8 * vocab) * (8 * vocab + 12 * 16) + 12 * vocab * block


def test_checkpointing_trades_memory_for_operations():
    config = Config(batch_size=8, seq_len=32)
    saving = dataclasses.replace(config, gradient_checkpointing=True)
    plain, saved, shape = of(config, student=WIDER), of(saving, student=WIDER), Shape.of(WIDER)
    assert saved.memory["student's activations"] < plain.memory["student's activations"] / 3
    assert saved.step_flops - plain.step_flops == 8 * 32 * shape.block_flops(32)


def test_operations_of_a_run_by_hand():
    config = Config(batch_size=2, grad_accum=3, seq_len=16, max_steps=5, seeds=2, baseline=True)
    student, teacher = Shape.of(LLAMA), Shape.of(WIDER)
    alone = 2 * 3 * 16 * 3 * (student.block_flops(16) + student.head_flops())
    taught = alone + 2 * 3 * 16 * (teacher.block_flops(16) + teacher.head_flops())
    found = of(config, teacher=WIDER)
    assert (found.step_flops, found.run_flops) == (taught, 2 * 5 * (taught + alone))
    longer = dataclasses.replace(config, baseline_steps=7)
    assert of(longer, teacher=WIDER).run_flops == 2 * (5 * taught + 7 * alone)
    by_epochs = dataclasses.replace(config, max_steps=None, epochs=2.0, seeds=1, baseline=False)
    assert of(by_epochs, teacher=WIDER, rows=16).run_flops == 6 * taught  # 32 rows by 6
    assert of(by_epochs, teacher=WIDER).run_flops is None


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "demo"])
def test_figures_of_a_preset_are_its_estimate(name):
    found = estimate_preset(name, P100)
    assert found.run_flops is not None
    hours = P100.seconds(found.run_flops) / 3600
    flops = f"{found.run_flops:.1e}".replace("e+", "e")
    figures = f"{found.peak / 1e9:.1f} GB at fp16; {flops} FLOP, {hours:.1f} h on a P100 at a third of its 9.3 TFLOP/s"
    assert "By arithmetic, not measured" in PRESETS[name].about
    assert figures in PRESETS[name].about
    assert (P100.peak, P100.share) == (9.3e12, 1 / 3)


def test_figures_of_the_demo_are_its_estimates_and_the_time_that_it_took():
    about, config, teacher = PRESETS["demo"].about, Config(**PRESETS["demo"].settings), PAIRS["demo"].teacher
    found, alone = estimate_preset("demo", CPU), of(teacher_recipe(config), student=teacher, teacher=teacher)
    learning = alone.peak - alone.memory["teacher's weights"]  # there is none yet
    assert f"{found.peak / 1e6:.0f} MB of memory for tensors, and {learning / 1e6:.0f} MB while" in about
    run = json.loads((ROOT / "docs" / "runs" / "demo" / "results.json").read_text())
    assert f"Measured: {run['seconds']:.0f} s for three seeds" in about
    assert run["config"]["seeds"] == 3
    assert {name: run["config"][name] for name in PRESETS["demo"].settings} == PRESETS["demo"].settings


def test_the_demo_has_the_shape_of_its_teacher(teacher_folder):
    config = Config(**PRESETS["demo"].settings)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    teacher = untrained_teacher(tokenizer, config)
    shape = dataclasses.replace(Shape.of(teacher.config), vocab_size=0, parameters=0)
    assert shape == dataclasses.replace(Shape.of(PAIRS["demo"].teacher), vocab_size=0, parameters=0)
    assert Shape.of(PAIRS["postmortem"].student).parameters == 134_515_008  # what its name calls 135M
    assert Shape.of(STAND_IN).parameters == pytest.approx(1e9, rel=0.01)
