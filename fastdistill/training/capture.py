"""What a forward pass of a model leaves for the losses: outputs of blocks, queries and keys, outputs of experts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdistill.training.config import UsageError


@dataclass(frozen=True)
class Wanted:
    """Of which blocks of a model what is wanted; blocks by number."""

    outputs: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    experts: frozenset[int] = frozenset()

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))


class QueriesKeys(NamedTuple):
    """Of one block's attention: `query` `[B, H, S, d]`, `key` `[B, Hkv, S, d]`, both as they are multiplied, after any
    rotary embedding; the softmax is of `scale` times their products.
    """

    query: Tensor
    key: Tensor
    scale: float


class ExpertOutputs(NamedTuple):
    """Of the K experts that a block's router gave each of N = B S tokens: what each puts out by itself, `outputs`
    `[N, K, D]`; its number, `experts` `[N, K]`; and the router's weight of it, `weights` `[N, K]`.
    """

    outputs: Tensor
    experts: Tensor
    weights: Tensor


@dataclass
class Captured:
    """What was wanted of one forward pass, by number of block; outputs are `[B, S, D]`."""

    outputs: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, QueriesKeys] = field(default_factory=dict)
    experts: dict[int, ExpertOutputs] = field(default_factory=dict)

    def to(self, device: torch.device) -> Captured:
        return Captured(
            {block: output.to(device) for block, output in self.outputs.items()},
            {
                i: QueriesKeys(seen.query.to(device), seen.key.to(device), seen.scale)
                for i, seen in self.attention.items()
            },
            {block: ExpertOutputs(*(part.to(device) for part in seen)) for block, seen in self.experts.items()},
        )


@contextmanager
def capturing(blocks: nn.ModuleList, wanted: Wanted) -> Iterator[Captured]:
    """While it lasts, what is `wanted` of the latest forward pass."""
    captured = Captured()
    with ExitStack() as stack:
        for block in wanted.outputs:
            handle = blocks[block].register_forward_hook(_keep_output(block, captured))
            stack.callback(handle.remove)
        for block in wanted.experts:
            handle = experts_of(blocks[block]).register_forward_hook(_keep_experts(block, captured), with_kwargs=True)
            stack.callback(handle.remove)
        if wanted.attention:
            stack.enter_context(watched_attention(blocks, wanted.attention, _keep_attention(captured)))
        yield captured


@contextmanager
def first_input(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """While it lasts, a list of the one thing that the first block was last given: the embedded tokens, `[B, S, D]`."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
        seen[:] = [inputs[0] if inputs else keywords["hidden_states"]]

    handle = blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def experts_of(block: nn.Module) -> nn.Module:
    """The module of a block that computes its experts.

    Raises:
        UsageError: there is none, or more than one.
    """
    found = [m for m in block.modules() if type(m).__name__.endswith("Experts") and hasattr(m, "num_experts")]
    if len(found) != 1:
        raise UsageError(f"{type(block).__name__}: {len(found)} modules of experts found in it, expected one")
    return found[0]


def _keep_output(block: int, captured: Captured):
    def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        captured.outputs[block] = output[0] if isinstance(output, tuple) else output

    return hook


def _keep_experts(block: int, captured: Captured):
    def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any], output: Tensor) -> None:
        states, experts, weights = (*arguments, *keywords.values())
        # Each in its place alone and with weight 1: their sum is what the module itself puts out.
        alone = [module.forward(states, chosen, torch.ones_like(weights[:, :1])) for chosen in experts.split(1, 1)]
        captured.experts[block] = ExpertOutputs(torch.stack(alone, 1), experts, weights)

    return hook


def _keep_attention(captured: Captured):
    def keep(block: int, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor) -> None:
        captured.attention[block] = QueriesKeys(query, key, scale)

    return keep


@contextmanager
def watched_attention(blocks: nn.ModuleList, wanted: Collection[int], see: Callable[..., None]) -> Iterator[None]:
    """While it lasts, `see(block, query, key, value, scale, output)` is called after each attention of those blocks.

    Whichever way a model computes attention, transformers has a function for it that is given queries and keys after
    the rotary embedding; these are wrapped. `output` is `[B, S, H, d]`.
    """
    block_of = {module: block for block in wanted for module in blocks[block].modules()}

    def wrapped(own: Callable | None):
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **how: Any) -> Any:
            # "eager" has no entry in the table: each file of models has its own.
            function = own or sys.modules[type(module).__module__].eager_attention_forward
            result = function(module, query, key, value, *others, **how)
            if module in block_of:
                scale = how.get("scaling")
                scale = query.shape[-1] ** -0.5 if scale is None else scale
                see(block_of[module], query, key, value, scale, result[0])
            return result

        return attention

    names = {*ALL_ATTENTION_FUNCTIONS, "eager"}
    for name, function in [(name, ALL_ATTENTION_FUNCTIONS.get(name)) for name in names]:
        ALL_ATTENTION_FUNCTIONS[name] = wrapped(function)
    try:
        yield
    finally:
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]
