"""A model in one GGUF file, llama.cpp's format, made an ordinary model folder."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastdistill.training.cache import cache_folder
from fastdistill.training.config import UsageError
from fastdistill.training.whole import is_whole, write_folder

_KIND_AND_NAME = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
_DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_LIKE_GPT2 = {"gpt-2", "phi-2", "roberta-bpe", "mpt", "olmo", "jais"}
"""Values of `tokenizer.ggml.pre`, which names how text is cut before merges apply; as llama.cpp groups them."""


def model_folder(path: Path, dtype: torch.dtype) -> Path:
    """A folder of the file's model, its weights unpacked to `dtype`, and its tokenizer.

    Unpacking takes many seconds, so the folder is kept, known by the file's content.

    Raises:
        UsageError: the file cannot be read, or holds a model or tokenizer that is not known.
    """
    if not path.is_file():
        raise UsageError(f"cannot load the model {path}: there is no such file")
    with path.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder(f"gguf-{key}-{str(dtype).removeprefix('torch.')}")
    if is_whole(folder):
        return folder
    if find_spec("gguf") is None:
        raise UsageError(f"cannot load the model {path}: GGUF files are read by the package gguf: pip install gguf")
    # A transformers that can compute on packed weights calls them quantised, trained or saved by nobody, unless told.
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        _mend(tokenizer, path)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **unpack)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, ImportError) as error:
        raise UsageError(f"cannot load the model {path}: {' '.join(str(error).split())}") from error

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    write_folder(folder, write)
    return folder


def _mend(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give it the special tokens that the file names, and cut text as the file says, which transformers does for some
    of the names and passes over for others.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for token in ("bos", "eos", "padding"):
        if field := fields.get(f"tokenizer.ggml.{token}_token_id"):
            name = tokenizer.convert_ids_to_tokens(int(field.contents()))
            setattr(tokenizer, f"{token.removesuffix('ding')}_token", name)
    kind, name = (fields[key].contents() if key in fields else None for key in _KIND_AND_NAME)
    if kind != "gpt2":  # byte-level BPE; other kinds cut text in one way each
        return
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    backend: Any = tokenizer.backend_tokenizer
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGIT_BY_DIGIT:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_words])
    elif name in _LIKE_GPT2:
        backend.pre_tokenizer = bytes_of_words
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):  # GPT-2's, which stands for "not known"
        raise UsageError(
            f"cannot load the model {path}: its pre-tokenizer {name!r} is not known to transformers "
            f"{transformers.__version__}, and another would give other ids: load the model from its original folder"
        )
