"""fastdistill: losses that distil a causal language model into a smaller one, on the machine that you have."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").is_dir():
    raise ImportError(
        "fastdistill/kernels is not a folder: the link to ../kernels was lost, as a ZIP download or a checkout "
        "without symbolic links loses it. Use `git clone` (on Windows with core.symlinks=true) or install the wheel."
    )

from fastdistill.align import shift_targets
from fastdistill.attention import attention_kl
from fastdistill.cross_vocab import linear_cross_vocab_kl
from fastdistill.fused_linear import linear_softmax_kl
from fastdistill.hidden_states import layer_loss
from fastdistill.losses import softmax_kl
from fastdistill.outputs import AttentionKLOutput, CrossVocabOutput, LayerLossOutput, LossOutput

__version__ = "0.1.0"

__all__ = [
    "AttentionKLOutput",
    "CrossVocabOutput",
    "LayerLossOutput",
    "LossOutput",
    "attention_kl",
    "layer_loss",
    "linear_cross_vocab_kl",
    "linear_softmax_kl",
    "shift_targets",
    "softmax_kl",
]
