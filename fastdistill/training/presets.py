"""Named base settings: what each is for, and what it is expected to need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Settings that differ from the defaults, by field of `Config`."""

    settings: dict[str, Any]
    about: str
    """A few lines for the user. A test holds its figures to what estimate.py computes."""


PRESETS = {
    "demo": Preset(
        {
            "data_share": 0.1, "student_layers": "0,3", "baseline": True, "max_steps": 200,
            "kd_weight": 0.9, "lm_weight": 0.1, "layerwise_weight": 0.5,
            "log_steps": 20, "detail_steps": 100, "eval_steps": 25, "save_steps": 50,
        },
        "a teacher trained here, and two of its four layers; no download, no GPU.\n"
        "Measured: 184 s for three seeds on two CPU cores. By arithmetic, not measured:\n"
        "53 MB of memory for tensors, and 71 MB while the teacher is trained",
    ),
    "gpt2": Preset(
        {
            "teacher": "openai-community/gpt2", "student_layers": "importance:6", "data": "wikitext-103",
            "batch_size": 8, "grad_accum": 4, "seq_len": 1024, "max_steps": 3000,
            "lr": 3e-4, "warmup_steps": 100, "kd_weight": 0.9, "lm_weight": 0.1,
            "eval_steps": 250, "save_steps": 500,
        },
        "GPT-2 (124M) into its 6 most important layers (82M), on WikiText-103.\n"
        "By arithmetic, not measured: 5.3 GB at fp16; 8.1e16 FLOP, 7.3 h on a P100 at a third of its 9.3 TFLOP/s",
    ),
    # The founding run's seven losses. Its layerwise one, the bare squared error of all positions, is logged and not
    # trained on.
    "postmortem": Preset(
        {
            "batch_size": 2, "grad_accum": 8, "seq_len": 512, "epochs": 1.0,
            "kd_weight": 0.5, "lm_weight": 0.5, "layerwise_weight": 0.05, "attention_weight": 0.1,
            "attention_alignment_weight": 0.3, "routing_feature_weight": 0.1, "contrastive_weight": 0.05,
            "curriculum": "founding",
            "layerwise_loss": "layer_norm", "layerwise_skip_first": 1, "layer_map": "auto",
            "log_steps": 100, "detail_steps": 1000, "eval_steps": 500, "save_steps": 1000,
        },
        "the founding run's settings; name its --teacher and --student HuggingFaceTB/SmolLM-135M.\n"
        "By arithmetic, not measured, with a stand-in of 1.0B for the teacher:\n"
        "9.7 GB at fp16; 3.9e16 FLOP, 3.5 h on a P100 at a third of its 9.3 TFLOP/s",
    ),
    "smollm": Preset(
        {
            "teacher": "HuggingFaceTB/SmolLM2-135M", "student_layers": "importance:15", "data": "fineweb-edu",
            "batch_size": 8, "grad_accum": 8, "seq_len": 1024, "max_steps": 1500,
            "lr": 3e-4, "warmup_steps": 100,
            "kd_weight": 0.7, "lm_weight": 0.3, "layerwise_weight": 0.5, "layerwise_skip_first": 1,
            "eval_steps": 250, "save_steps": 250,
        },
        "SmolLM2 (135M) into its 15 most important layers (81M), on FineWeb-Edu.\n"
        "By arithmetic, not measured: 6.5 GB at fp16; 9.2e16 FLOP, 8.2 h on a P100 at a third of its 9.3 TFLOP/s",
    ),
}  # fmt: skip
