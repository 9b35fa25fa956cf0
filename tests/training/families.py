"""Tiny random models of the families that users bring, four layers each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
GPT2 = GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0)
OPT = OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16)
IDS = torch.arange(24).reshape(2, 12)

FAMILIES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2,
    "llama": LlamaConfig(**GROUPED),
    "qwen2, tied, sliding": Qwen2Config(
        **GROUPED, tie_word_embeddings=True, use_sliding_window=True, max_window_layers=2, sliding_window=4
    ),
    "qwen3": Qwen3Config(**HEADS),
    "mistral, sliding": MistralConfig(**GROUPED, sliding_window=4),
    "gemma": GemmaConfig(**HEADS),
    "gemma3, sliding": Gemma3TextConfig(
        **HEADS, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "phi": PhiConfig(**SMALL),
    "phi3": Phi3Config(**GROUPED),
    "smollm3": SmolLM3Config(**GROUPED, no_rope_layer_interval=2),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "opt": OPT,
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=8, mlp_only_layers=[1, 3]),
    "qwen3-moe": Qwen3MoeConfig(**HEADS, **EXPERTS, mlp_only_layers=[0]),
    "olmoe": OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
}


def make(config: PreTrainedConfig) -> Any:
    """Weights far from 0, so that every layer changes what comes out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return model
