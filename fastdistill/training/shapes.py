"""What a model's configuration alone tells of its size: parameters, arithmetic, and what a forward pass keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model."""

    depth: int
    width: int
    vocab_size: int
    parameters: int
    """All numbers that are stored; a matrix that is embedding and head at once is stored once."""
    tied: bool
    """Whether it has such a matrix."""
    matrices: int
    """Numbers in the matrices of its blocks: without embeddings, head, biases and norms."""
    active: int
    """Those that a token is multiplied with: of experts, the ones it is sent to."""
    widest: int
    """Channels of the widest state inside a block, of the experts that a token is sent to together."""
    heads: int
    """Of attention, those of its queries."""
    attention_width: int
    """Heads times their width."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """Counted on a model that has shapes and no memory."""
        with torch.device("meta"):
            model = _model(config)
        text = config.get_text_config()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head.weight)}
        matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
        share = text.num_experts_per_tok / _experts(text) if _experts(text) else 1.0
        # A matrix of each expert is a slice of one tensor.
        active = [round(p.numel() * (share if p.ndim == 3 else 1.0)) for p in matrices]
        heads = text.num_attention_heads
        return cls(
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            vocab_size=text.vocab_size,
            parameters=sum(p.numel() for p in model.parameters()),
            tied=head.weight is embedding.weight,
            matrices=sum(p.numel() for p in matrices),
            active=sum(active),
            widest=max(active) // text.hidden_size,
            heads=heads,
            attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        )

    def block_flops(self, positions: int) -> int:
        """Floating-point operations of all blocks, forward, for one token of a row of `positions`.

        Two for each number of a matrix, and 4 L S W for attention's two products of every position with every other
        (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, which like this leaves out that half of it is masked).
        """
        return 2 * self.active + 4 * self.depth * positions * self.attention_width

    def head_flops(self) -> int:
        """Those of its output head, forward, for one token."""
        return 2 * self.vocab_size * self.width


def kept_bytes(config: PreTrainedConfig, batch: int, positions: int, *, half: bool, masks: bool) -> int:
    """Bytes that the base of a dense model keeps of `[batch, positions]` ids for its backward pass.

    Its forward pass is made with tensors that have no memory, and what autograd keeps is added up, parameters and
    their half-precision copies left out. Attention is PyTorch's, which keeps no scores; nothing is dropped out.

    Args:
        half: matrix products in a half precision, by autocast; the weights are float32.
        masks: each layer keeps a mask `[B, 1, S, S]`, as it does for documents in a row that do not see each other.

    Raises:
        ValueError: for experts, whose tokens are sent here or there by numbers that are not known.
    """
    if _experts(config.get_text_config()):
        raise ValueError(f"what {config.model_type} keeps cannot be counted: it depends on where tokens are sent")
    with FakeTensorMode():
        model = _model(config).eval()
        one, two = (_kept(model, rows, positions, half=half, masks=masks) for rows in (batch, 2 * batch))
    return two - one  # the copies of weights do not grow with the batch


def _kept(model: PreTrainedModel, batch: int, positions: int, *, half: bool, masks: bool) -> int:
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        is_mask = x.shape == (batch, 1, positions, positions)
        if x.untyped_storage()._cdata not in own and (masks or not is_mask):
            kept[x.untyped_storage()._cdata] = x
        return x

    ids = torch.empty(batch, positions, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        _PowersInFloat32(),
    ):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


class _PowersInFloat32(TorchFunctionMode):
    """As a GPU's autocast takes them, and a CPU's does not: in GPT-2's activation it doubles what is kept."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.pow and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def _model(config: PreTrainedConfig) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _experts(text: PreTrainedConfig) -> int | None:
    return getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
