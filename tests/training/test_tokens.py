"""Documents to ids: the same whatever is encoded at once, and ends that count every byte."""

from __future__ import annotations

import pytest
import torch

from fastdistill.training import tokens
from fastdistill.training.config import UsageError
from fastdistill.training.demo import train_tokenizer
from fastdistill.training.tokens import tokenize

DOCUMENTS = ["one two", "", "naïve — 漢字", "x" * 300]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 290)


def test_documents_are_joined_whatever_is_encoded_at_once(tokenizer, monkeypatch):
    whole = tokenize(DOCUMENTS, tokenizer, with_ends=True)
    monkeypatch.setattr(tokens, "DOCUMENTS_AT_ONCE", 3)
    pieces = tokenize(iter(DOCUMENTS), tokenizer, with_ends=True)
    for name in ("ids", "starts", "ends"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name))
    texts = [
        tokenizer.decode(whole.ids[start:end], skip_special_tokens=True)
        for start, end in zip(whole.starts[:-1], whole.starts[1:], strict=True)
    ]
    assert texts == DOCUMENTS


def test_ends_count_the_bytes_of_each_document_its_beginning_and_its_end(tokenizer):
    made = tokenize(DOCUMENTS, tokenizer, with_ends=True)
    assert made.ends is not None
    sizes = torch.tensor([len(document.encode()) + 2 for document in DOCUMENTS])
    assert torch.equal(made.ends[made.starts[1:] - 1], sizes.cumsum(0))
    assert (made.ends.diff() > 0).all()


def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer):
    endless = train_tokenizer(DOCUMENTS, 290)
    endless.eos_token = None
    with pytest.raises(UsageError, match="has no end-of-text token to put between documents"):
        tokenize(DOCUMENTS, endless)


def test_no_documents_are_no_tokens(tokenizer):
    made = tokenize([], tokenizer, with_ends=True)
    assert (len(made.ids), made.starts.tolist()) == (0, [0])
