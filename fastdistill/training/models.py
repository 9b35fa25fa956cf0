"""A causal language model as the losses need it: its base, blocks and output head."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from fastdistill.training.config import Config, UsageError

_PROBED: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose logits were seen to be those of base and head."""


@dataclass(frozen=True)
class Parts:
    """A causal language model as the losses need it: logits = base(ids) @ head.weight.T + head.bias."""

    base: nn.Module
    blocks: nn.ModuleList
    head: nn.Linear


def parts(model: PreTrainedModel) -> Parts:
    """Base, transformer blocks and head of any model whose head is a plain linear map.

    The first call for a model runs it on eight tokens, to see that there is no more to its logits.

    Raises:
        UsageError: where there is no such structure, where the head's weights are quantised, or where base and head do
            not give the model's own logits (soft-capped or scaled ones, say).
    """
    name, base, head = type(model).__name__, model.base_model, model.get_output_embeddings()
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if base is model or not lists or not isinstance(head, nn.Linear):
        raise UsageError(f"{name}: no base model, list of {depth} blocks and linear head found in it")
    if not head.weight.is_floating_point():
        raise UsageError(f"{name}: its output head holds {head.weight.dtype} numbers, and the losses need its weights")
    if model not in _PROBED:
        _check_logits(model, base, head)
        _PROBED.add(model)
    return Parts(base, lists[0], head)


def hidden_width(model: PreTrainedModel) -> int:
    """How many channels the states have that its blocks put out."""
    return model.config.get_text_config().hidden_size


def context_length(model: PreTrainedModel) -> int:
    """How many positions the model can take."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)


def check_fit(model: PreTrainedModel, config: Config, name: str) -> None:
    """Raise `UsageError` unless the model, "teacher" or "student", can read blocks as `config` asks for them."""
    if config.seq_len > context_length(model):
        raise UsageError(f"--seq-len {config.seq_len} is more than the {context_length(model)} positions of the {name}")
    if config.packing == "documents":
        check_document_masks(model, name)


@torch.no_grad()
def check_document_masks(model: PreTrainedModel, name: str) -> None:
    """Raise `UsageError` unless documents that share a row, told apart by their `position_ids` alone, each starting at
    0, are read as if each were alone. `name` is "teacher" or "student".

    Two rows that differ in their first document are compared on the others. Shapes are the same, so in any precision
    most models give the same bits; some experts' sums have another order.
    """
    base = parts(model).base
    advice = f"so the {name} cannot keep the documents of a row apart: use --packing stream"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UsageError(f"{type(model).__name__} takes no position_ids, {advice}")
    lengths, vocab_size = [4, 2, 3], model.config.get_text_config().vocab_size
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])[None]
    row = torch.arange(sum(lengths), device=model.device)[None]
    other = torch.where(row < lengths[0], row + sum(lengths), row)
    with evaluating(model):
        one, two = (
            base(input_ids=ids % vocab_size, position_ids=positions, use_cache=False).last_hidden_state.float()
            for ids in (row, other)
        )
    seen = (one - two)[:, lengths[0] :].norm() / one[:, lengths[0] :].norm()
    if not seen <= torch.finfo(model.dtype).eps ** 0.5:
        raise UsageError(
            f"{type(model).__name__} sees a document in those after it ({seen:.1%} of their states), {advice}"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) while it lasts, then the mode that was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def _check_logits(model: PreTrainedModel, base: nn.Module, head: nn.Linear) -> None:
    """The head's output is made large in both, so that a soft cap shows in an untrained model and in half precision."""
    probe = torch.arange(8, device=model.device)[None] % head.out_features
    handle = head.register_forward_hook(lambda module, inputs, logits: logits.float() * 1e4)
    try:
        with evaluating(model):
            own = model(input_ids=probe, use_cache=False).logits
            ours = head(base(input_ids=probe, use_cache=False).last_hidden_state)
    finally:
        handle.remove()
    difference = (own - ours).abs().max() / ours.abs().max()
    if not difference <= 0.01:  # equal but for the order of sums, and not NaN
        raise UsageError(
            f"{type(model).__name__}: its logits are not its head's output (soft-capped or scaled: {difference:.1%} "
            "away), so a loss on head and hidden states would be another model's"
        )
