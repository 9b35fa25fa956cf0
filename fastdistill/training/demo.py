"""The demo's teacher: a small model of a small vocabulary, trained here once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from fastdistill.training.cache import cache_folder
from fastdistill.training.config import Config, UsageError
from fastdistill.training.sources import DocumentStream, Source

END_OF_TEXT = "<|endoftext|>"


def teacher_recipe(config: Config) -> Config:
    """The run that makes the teacher of `config`: cross-entropy on all of the text."""
    return dataclasses.replace(
        config.without_teacher(), batch_size=8, grad_accum=1, seed=0, stop_at=None,
        max_steps=config.teacher_steps, lr=config.teacher_lr, eval_steps=100, log_steps=100, save_steps=100,
    )  # fmt: skip


def kept_teacher(recipe: Config, sources: Sequence[Source]) -> Path:
    """Where the teacher of this recipe and of these texts is kept."""
    matters = [getattr(recipe, name) for name in _OF_THE_TEACHER]
    texts = [[source.fingerprint, source.weight] for source in sources]
    return cache_folder(f"teacher-{hashlib.sha256(json.dumps([matters, texts]).encode()).hexdigest()[:16]}")


_OF_THE_TEACHER = (
    "max_steps", "lr", "schedule", "warmup_steps", "weight_decay", "clip", "precision", "batch_size", "grad_accum",
    "seq_len", "packing", "seed", "vocab_size", "teacher_depth", "teacher_width",
)  # fmt: skip
"""The fields of a recipe that its weights depend on."""


def tokenizer_of(sources: Sequence[Source], vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer trained on what there is to learn from."""
    documents: list[str] = []
    for source in sources:
        if isinstance(source.train, DocumentStream):
            raise UsageError(
                f"--data {source.name} is a stream, and the demo's teacher learns from whole text: name one"
            )
        documents += source.train
    return train_tokenizer(documents, vocab_size)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of `vocab_size` ids, which covers any text; `END_OF_TEXT` ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def untrained_teacher(tokenizer: PreTrainedTokenizerBase, config: Config) -> PreTrainedModel:
    """A Llama of the depth and width asked for: tried beside a GPT-2 of this size, it learned markedly more in the same
    few hundred steps.
    """
    width = config.teacher_width
    if width % 32:
        raise UsageError(f"--teacher-width must be a multiple of 32, the width of a head, got {width}")
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert isinstance(end, int)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 11 // 4,
        num_hidden_layers=config.teacher_depth, num_attention_heads=width // 32,
        max_position_embeddings=config.seq_len, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(shape)
