"""From sources to what a run is trained and evaluated on: shares, streams, and tokens that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastdistill.training import data, sources, tokens
from fastdistill.training.blocks import IGNORED, Blocks, collate
from fastdistill.training.config import UsageError
from fastdistill.training.data import Cutter, TrainingText, prepare
from fastdistill.training.demo import train_tokenizer
from fastdistill.training.sources import open_sources
from fastdistill.training.tokens import Tokens

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    """Two files of rows whose words tell them apart."""
    folder = tmp_path_factory.mktemp("texts")
    files = {}
    for name, count in (("apple", 60), ("pear", 30)):
        file = folder / f"{name}.jsonl"
        rows = [f"{name} {WORDS[i % 10]} {WORDS[i // 10]} {name}" for i in range(count)]
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        files[name] = str(file)
    return files


@pytest.fixture
def small_portions(monkeypatch):
    """Streams for small texts."""
    monkeypatch.setattr(data, "PORTION_CHARACTERS", 300)
    monkeypatch.setattr(sources, "STREAM_HELD_OUT_DOCUMENTS", 10)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"apple pear {' '.join(WORDS)}"] * 5, 320)


def words_of(blocks, tokenizer) -> list[str]:
    return [tokenizer.decode(block[0].ids) for block in blocks]


def opened(names: str, tokenizer, *, streaming: bool = False, packing: str = "padded"):
    return prepare(open_sources(names, streaming=streaming), Cutter((tokenizer,), 16, packing))


def tokens_of(training: TrainingText) -> Tokens:
    (part,) = training.parts
    assert isinstance(part, Blocks)
    return part.sides[0]


def test_everything_is_either_learned_from_or_held_out(texts, tokenizer):
    training, held_out = opened(f"{texts['apple']},{texts['pear']}", tokenizer)
    rows = words_of(training.walk(0).take(0, training.num_blocks()), tokenizer)
    rows += words_of([held_out[i] for i in range(len(held_out))], tokenizer)
    assert len(rows) == len(set(rows)) == 90
    assert len(held_out) == 9
    assert words_of(training.walk(1).take(0, 9), tokenizer) != rows[:9]


def test_without_weights_each_text_is_seen_as_often_as_it_is_long(texts, tokenizer):
    training, _ = opened(f"{texts['apple']},{texts['pear']}", tokenizer)
    rows = words_of(training.walk(0).take(0, 81), tokenizer)
    assert sum(row.startswith("apple") for row in rows) == 54


def test_weights_are_shares_of_what_is_seen(texts, tokenizer):
    training, _ = opened(f"{texts['apple']}=0.2,{texts['pear']}=0.8", tokenizer)
    rows = words_of(training.walk(0).take(0, 400), tokenizer)
    assert abs(sum(row.startswith("pear") for row in rows) - 320) <= 3


def test_a_share_is_drawn_by_seed(texts, tokenizer):
    training, _ = opened(texts["apple"], tokenizer)
    drawn = [set(words_of(training.draw(0.2, seed).walk(0).take(0, 11), tokenizer)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 11 == training.draw(0.2, 0).num_blocks()
    assert training.draw(0.001, 0).num_blocks() == 1


def test_a_stream_is_read_portion_by_portion_and_goes_on_where_it_was(texts, tokenizer, small_portions):
    training, held_out = opened(texts["apple"], tokenizer, streaming=True)
    assert len(held_out) == 10
    rows = words_of(training.walk(0).take(0, 100), tokenizer)
    assert len(set(rows[:50])) == 50  # all of them before any again
    assert not set(rows) & set(words_of([held_out[i] for i in range(10)], tokenizer))
    walk = training.walk(0)
    walk.take(0, 33)
    again = opened(texts["apple"], tokenizer, streaming=True)[0].walk(0)
    again.seek(json.loads(json.dumps(walk.state())))
    assert words_of(again.take(33, 67), tokenizer) == rows[33:]


def test_what_a_stream_cannot_do_is_said(texts, tokenizer, small_portions):
    training, _ = opened(texts["apple"], tokenizer, streaming=True)
    with pytest.raises(UsageError, match=r"--epochs counts passes over the text, and a stream has no end.*--max-steps"):
        training.num_blocks()
    with pytest.raises(UsageError, match="--data-share"):
        training.draw(0.5, 0)
    with pytest.raises(UsageError, match=r"mixes the stream .*apple\.jsonl with other text: give each its share"):
        opened(f"{texts['apple']},pydoc", tokenizer, streaming=True)


def test_tokens_are_made_once_for_a_text_and_a_tokenizer(texts, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDISTILL_CACHE", str(tmp_path))
    made = []
    encode = tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda *a: made.append(1) or encode(*a))
    first = opened(texts["apple"], tokenizer)[0]
    assert len(made) == 2  # training and held-out text
    second = opened(texts["apple"], tokenizer)[0]
    assert len(made) == 2
    made_then, found = (tokens_of(training) for training in (first, second))
    assert torch.equal(made_then.ids, found.ids)
    assert torch.equal(made_then.starts, found.starts)
    expected = made_then.ids.clone()  # what is kept is mapped into memory, not read
    opened(texts["apple"], train_tokenizer(["other words"], 270))
    opened(texts["pear"], tokenizer)
    assert len(made) == 6
    for file in tmp_path.glob("tokens-*/tokens.safetensors"):
        Path(file).write_bytes(b"damaged")
    assert torch.equal(tokens_of(opened(texts["apple"], tokenizer)[0]).ids, expected)
    assert len(made) == 8


def test_a_sample_is_of_the_teachers_tokenizer(texts, tokenizer):
    other = train_tokenizer(["pear apple"] * 3, 262)
    training, _ = prepare(open_sources(texts["apple"]), Cutter((tokenizer, other), 16, "stream"))
    sample = training.sample(64)
    assert sample.shape[0] == 4
    expected = collate(training.walk(0).take(0, 4), torch.device("cpu")).teacher.input_ids
    assert torch.equal(sample, expected[:, : sample.shape[1]])
    assert (expected != IGNORED).all()
