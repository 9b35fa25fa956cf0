"""Text to blocks: nothing lost, nothing twice, nothing of the held-out part in training."""

from __future__ import annotations

import pytest
import torch

from fastdistill.training.config import UsageError
from fastdistill.training.data import (
    Blocks,
    check_same_tokenizer,
    draw,
    load_corpus,
    make_blocks,
    sample_order,
    train_tokenizer,
)

DOCUMENTS = ["one two three", "four", "", "five six seven eight nine ten", "naïve — 漢字 \x00"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 270)


@pytest.mark.parametrize("seq_len", [2, 3, 7, 64, 1000])
def test_every_token_but_the_first_is_a_target_once_and_in_order(tokenizer, seq_len):
    blocks = make_blocks(DOCUMENTS, tokenizer, seq_len)
    batch = blocks.batch(torch.arange(len(blocks)), torch.device("cpu"))
    targets = batch["targets"][batch["targets"] != -100].tolist()
    stream = [i for document in DOCUMENTS for i in (*tokenizer.encode(document), tokenizer.eos_token_id)]
    assert targets == stream[1:]
    assert blocks.num_targets() == len(targets)


def test_text_survives_the_tokenizer(tokenizer):
    assert [tokenizer.decode(tokenizer.encode(document)) for document in DOCUMENTS] == DOCUMENTS


def test_each_epoch_is_a_permutation_and_the_walk_does_not_depend_on_how_it_is_cut():
    whole = sample_order(10, 0, 35, seed=3)
    assert [sorted(epoch.tolist()) for epoch in whole[:30].split(10)] == [list(range(10))] * 3
    assert not torch.equal(whole[:10], whole[10:20])
    pieces = [sample_order(10, start, count, seed=3) for start, count in ((0, 1), (1, 13), (14, 21))]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(sample_order(10, 0, 35, seed=4), whole)


def test_a_share_is_drawn_by_seed():
    blocks = Blocks(torch.arange(100)[:, None], torch.ones(100, 1, dtype=torch.bool))
    drawn = [draw(blocks, 0.2, seed).ids.flatten().tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20
    assert len(draw(blocks, 0.001, 0)) == 1


def test_the_embedded_corpus_holds_out_every_tenth_document():
    corpus = load_corpus("pydoc")
    assert abs(len(corpus.held_out) - (len(corpus.train) + len(corpus.held_out)) / 10) <= 1
    assert sum(map(len, corpus.held_out)) > 20_000
    assert sum(map(len, corpus.train)) > 250_000


@pytest.mark.parametrize("name", ["pydoc", "file"])
def test_no_paragraph_is_both_held_out_and_learned_from(name, tmp_path):
    file = tmp_path / "repeats.txt"
    file.write_text("\n\n".join(f"line {i % 12}" for i in range(40)))
    corpus = load_corpus("pydoc" if name == "pydoc" else str(file))
    parts = [{p.strip() for d in part for p in d.split("\n\n")} for part in (corpus.train, corpus.held_out)]
    assert not parts[0] & parts[1]
    assert corpus.repeated > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb", "has 2 different documents"),
        (b"a\n\n" * 20, "has 1 different documents"),
        (b"", "has 0 different documents"),
        (b"caf\xe9 " * 9, "is not UTF-8 text: byte 3 is 0xe9"),
    ],
)
def test_text_that_cannot_be_used_is_refused(tmp_path, content, message):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_corpus(str(file))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.txt: No such file"):
        load_corpus(str(tmp_path / "absent.txt"))


def test_different_tokenizers_are_refused(tokenizer):
    check_same_tokenizer(tokenizer, train_tokenizer(DOCUMENTS, 270))
    with pytest.raises(UsageError, match="different tokenizers"):
        check_same_tokenizer(tokenizer, train_tokenizer(DOCUMENTS[:2], 262))
