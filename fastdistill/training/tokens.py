"""Documents to token ids: one tokenizer's view of a text, kept so that it is made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastdistill.training.cache import cache_folder
from fastdistill.training.config import UsageError
from fastdistill.training.tokenizers import encode_with_ends
from fastdistill.training.whole import is_whole, write_folder

DOCUMENTS_AT_ONCE = 256
LAYOUT = 1
"""Raised when the kept tensors change their meaning."""


@dataclass(frozen=True)
class Tokens:
    """Documents end to end: `[beginning] text end`, the beginning only where the tokenizer puts one.

    `ids` `[T]` int32; `starts` `[M + 1]` int64, the first token of each document, then T. `ends` `[T]` int64, where
    asked for: how far the text is read after each token, the same number for any two tokenizers that have read
    the same, -1 where it falls inside a character. It counts a document's UTF-8 bytes, one for its beginning
    and one for its end. `beginning` is the id of the beginning-of-text token or None.
    """

    ids: Tensor
    starts: Tensor
    ends: Tensor | None
    beginning: int | None


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, with_ends: bool = False, key: str | None = None
) -> Tokens:
    """All `documents` as ids. With `key`, which must name their content, they are kept and found again."""
    if key is None:
        return _tokens(documents, tokenizer, with_ends)
    folder = _kept(tokenizer, with_ends, key)
    if not is_whole(folder):
        made = _tokens(documents, tokenizer, with_ends)
        tensors = {name: tensor for name, tensor in vars(made).items() if isinstance(tensor, Tensor)}
        write_folder(folder, lambda path: save_file(tensors, path / "tokens.safetensors"))
    kept = load_file(folder / "tokens.safetensors")
    return Tokens(kept["ids"], kept["starts"], kept.get("ends"), beginning_id(tokenizer))


def beginning_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer by itself puts before a text, as Llama's and Gemma's do and GPT-2's does not."""
    begun = tokenizer("a", verbose=False)["input_ids"]
    assert isinstance(begun, list)
    return begun[0] if begun[:1] == [tokenizer.bos_token_id] else None


def _tokens(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, with_ends: bool) -> Tokens:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UsageError(f"the tokenizer {tokenizer.name_or_path} has no end-of-text token to put between documents")
    beginning = beginning_id(tokenizer)
    first = [] if beginning is None else [beginning]
    ids: list[Tensor] = []
    ends: list[Tensor] = []
    starts, read = [0], 0
    documents = iter(documents)
    while some := list(islice(documents, DOCUMENTS_AT_ONCE)):
        for document, (own_ids, own_ends) in zip(some, _encode(some, tokenizer, with_ends), strict=True):
            ids.append(torch.tensor([*first, *own_ids, end], dtype=torch.int32))
            starts.append(starts[-1] + len(ids[-1]))
            if with_ends:
                size = len(document.encode("utf-8", "surrogatepass"))
                own = torch.tensor([*(0 for _ in first), *own_ends, size + 1], dtype=torch.int64)
                ends.append(torch.where(own < 0, own, own + read + 1))
                read += size + 2
    return Tokens(
        torch.cat(ids or [torch.empty(0, dtype=torch.int32)]),
        torch.tensor(starts),
        torch.cat(ends or [torch.empty(0, dtype=torch.int64)]) if with_ends else None,
        beginning,
    )


def _encode(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, with_ends: bool
) -> Iterator[tuple[list[int], list[int]]]:
    if with_ends:
        yield from encode_with_ends(tokenizer, documents)
        return
    # verbose=False: a document longer than the model's context is expected, it is cut into blocks.
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    assert isinstance(encoded, list)
    for ids in encoded:
        yield ids, []


def _kept(tokenizer: PreTrainedTokenizerBase, with_ends: bool, key: str) -> Path:
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    content: list[Any] = [
        LAYOUT, key, with_ends, tokenizer.eos_token_id, beginning_id(tokenizer), type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str() if fast else sorted(tokenizer.get_vocab().items()),
    ]  # fmt: skip
    return cache_folder(f"tokens-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}")
