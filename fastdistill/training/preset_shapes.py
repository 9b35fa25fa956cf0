"""The models of each preset as shapes, to be had without a network: what estimates of a preset are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from fastdistill.training.config import Config
from fastdistill.training.estimate import Device, Estimate, estimate
from fastdistill.training.presets import PRESETS


class Pair(NamedTuple):
    """The last two are arguments of `estimate`."""

    student: PreTrainedConfig
    teacher: PreTrainedConfig
    two_tokenizers: bool = False
    rows: int | None = None


def _smollm(layers: int, positions: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=positions, tie_word_embeddings=True,
    )  # fmt: skip


def _demo(layers: int) -> LlamaConfig:
    """As `demo.untrained_teacher` makes it."""
    config = Config(**PRESETS["demo"].settings)
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.teacher_width,
        intermediate_size=config.teacher_width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=config.teacher_width // 32, max_position_embeddings=config.seq_len,
        tie_word_embeddings=True,
    )  # fmt: skip


_HEADS: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}

STAND_IN = Qwen3MoeConfig(
    vocab_size=151936, hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=16, num_experts=32,
    num_experts_per_tok=4, tie_word_embeddings=True, **_HEADS,
)  # fmt: skip
"""For the founding run's teacher, of which no more is known than a vocabulary of 152k and 1B parameters in experts."""

FOUNDING_ROWS = 24_914 * 2
"""The steps of its epoch times the rows of each."""

PAIRS = {
    "demo": Pair(_demo(2), _demo(4)),
    "gpt2": Pair(GPT2Config(n_layer=6), GPT2Config()),
    "postmortem": Pair(_smollm(30, 2048), STAND_IN, two_tokenizers=True, rows=FOUNDING_ROWS),
    "smollm": Pair(_smollm(15, 8192), _smollm(30, 8192)),
}


def estimate_preset(name: str, device: Device, config: Config | None = None) -> Estimate:
    """`estimate` of a preset as it stands, or of its models with the settings of `config`."""
    pair = PAIRS[name]
    config = config or Config(**PRESETS[name].settings)
    return estimate(config, pair.student, pair.teacher, device, two_tokenizers=pair.two_tokenizers, rows=pair.rows)
