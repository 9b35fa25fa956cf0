"""Text to blocks to batches: nothing lost, nothing predicted twice, the same text for both models."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from tokenizers import processors

from fastdistill.training.blocks import IGNORED, Blocks, collate, cut
from fastdistill.training.config import UsageError
from fastdistill.training.demo import train_tokenizer
from fastdistill.training.tokens import tokenize

CPU = torch.device("cpu")
DOCUMENTS = ["one two three", "four", "", "five six seven eight nine ten", "naïve — 漢字 \x00", "a b c d e f g " * 9]
TEXTS = [document for document in DOCUMENTS if document]
PACKINGS = ("stream", "documents", "padded")


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer(DOCUMENTS, 270)


@pytest.fixture(scope="module")
def coarse():
    return train_tokenizer([*DOCUMENTS, "three four five six seven"], 330)


@pytest.fixture(scope="module")
def with_beginning():
    """A tokenizer that begins a text by itself, as Llama's and Gemma's do."""
    tokenizer = train_tokenizer(DOCUMENTS, 280)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin  # type: ignore[attr-defined]
    return tokenizer


def batches(blocks: Blocks, size: int = 3, **how):
    return [
        collate([blocks[i] for i in range(first, min(first + size, len(blocks)))], CPU, **how)
        for first in range(0, len(blocks), size)
    ]


def predicted(blocks: Blocks) -> list[int]:
    """Every target, in order."""
    return [target for batch in batches(blocks) for target in batch.targets[batch.targets != IGNORED].tolist()]


def documents_as_ids(tokenizer, documents=DOCUMENTS) -> list[list[int]]:
    return [[*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id] for text in documents]


@pytest.mark.parametrize("seq_len", [3, 4, 7, 64, 1000])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("which", ["plain", "with_beginning"])
def test_every_token_is_predicted_once_and_in_order(request, which, packing, seq_len):
    tokenizer = request.getfixturevalue(which)
    blocks = cut((tokenize(DOCUMENTS, tokenizer),), seq_len, packing)
    documents = documents_as_ids(tokenizer)
    if packing == "stream" and which == "plain":
        expected = list(chain(*documents))[1:]  # only the very first has nothing before it
    else:
        expected = [i for document in documents for i in document[1:]]
    assert predicted(blocks) == expected
    assert blocks.num_targets() == len(expected)
    assert max(len(reading.ids) for i in range(len(blocks)) for reading in blocks[i]) <= seq_len


def test_a_tokenizer_that_begins_texts_begins_every_block(with_beginning):
    blocks = cut((tokenize(DOCUMENTS, with_beginning),), 8, "stream")
    assert len(blocks) > 5
    assert all(int(blocks[i][0].ids[0]) == with_beginning.bos_token_id for i in range(len(blocks)))


def test_the_end_of_text_is_predicted_though_it_also_pads(plain):
    assert plain.pad_token_id == plain.eos_token_id
    for packing in PACKINGS:
        blocks = cut((tokenize(DOCUMENTS, plain),), 16, packing)
        ends = [target for target in predicted(blocks) if target == plain.eos_token_id]
        # An empty document is its end alone: without a document before it in sight there is nothing to predict.
        assert len(ends) == len(DOCUMENTS) - (packing != "stream")


def test_padding_is_no_target_and_no_part_of_the_mask(plain):
    blocks = cut((tokenize(DOCUMENTS, plain),), 16, "padded")
    for batch in batches(blocks, size=len(blocks)):
        lengths = batch.mask.sum(1)
        assert lengths.min() < lengths.max() == batch.student.input_ids.shape[1]
        assert not (batch.targets != IGNORED)[~batch.mask].any()
        assert (batch.targets[torch.arange(len(lengths)), lengths - 1] == IGNORED).all()


@pytest.mark.parametrize("which", ["plain", "with_beginning"])
def test_positions_begin_anew_with_each_document_where_it_is_masked(request, which):
    tokenizer = request.getfixturevalue(which)
    blocks = cut((tokenize(DOCUMENTS, tokenizer),), 24, "documents")
    (batch,) = batches(blocks, size=len(blocks))
    assert batch.student.position_ids is not None
    begun = 0
    for ids, positions, mask in zip(batch.student.input_ids, batch.student.position_ids, batch.mask, strict=True):
        assert positions[0] == 0
        for place in range(1, int(mask.sum())):
            if ids[place - 1] == tokenizer.eos_token_id:
                assert positions[place] == 0
                begun += 1
            else:
                assert positions[place] == positions[place - 1] + 1
    assert begun >= 2
    (stream,) = batches(cut((tokenize(DOCUMENTS, tokenizer),), 24, "stream"), size=100)
    assert stream.student.position_ids is None


def test_a_padded_row_is_of_one_document(plain):
    blocks = cut((tokenize(DOCUMENTS, plain),), 1000, "padded")
    rows = [blocks[i][0].ids.tolist() for i in range(len(blocks))]
    assert rows == [ids for ids in documents_as_ids(plain) if len(ids) > 1]


@pytest.mark.parametrize("seq_len", [4, 9, 33, 1000])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("which", ["coarse", "with_beginning"])
def test_two_tokenizers_blocks_are_of_the_same_text(request, plain, which, packing, seq_len):
    other = request.getfixturevalue(which)
    sides = (tokenize(TEXTS, plain, with_ends=True), tokenize(TEXTS, other, with_ends=True))
    blocks = cut(sides, seq_len, packing)
    if seq_len > 9:  # in less there may be no place at which both end a token
        for i in range(len(blocks)):
            last = [int(reading.ends[-1]) for reading in blocks[i] if reading.ends is not None]
            assert last[0] == last[1]
    # Neither loses anything by the company.
    assert predicted(blocks) == predicted(cut(sides[:1], seq_len, packing))
    assert predicted(blocks.side(1)) == predicted(cut(sides[1:], seq_len, packing))


@pytest.mark.parametrize("packing", PACKINGS)
def test_paired_positions_have_read_the_same_text(plain, coarse, packing):
    sides = (tokenize(DOCUMENTS, plain, with_ends=True), tokenize(DOCUMENTS, coarse, with_ends=True))
    blocks, found = cut(sides, 20, packing), 0
    for batch in batches(blocks):
        assert batch.pairs is not None
        for row, i, j in zip(*(index.tolist() for index in batch.pairs), strict=True):
            texts = [
                bytes(tokenizer.decode(side.input_ids[row, : last + 1]), "utf-8")
                for tokenizer, side, last in ((plain, batch.student, i), (coarse, batch.teacher, j))
            ]
            assert texts[0] == texts[1]
            assert batch.targets[row, i] != IGNORED
        found += len(batch.pairs.row)
    assert found > 0.4 * blocks.num_targets()


def test_cut_to_the_shorter_pairs_positions_by_number(plain, coarse):
    texts = ["three four five six seven", "four three"]
    sides = (tokenize(texts, plain, with_ends=True), tokenize(texts, coarse, with_ends=True))
    (batch,) = batches(cut(sides, 100, "padded"), align="cut")
    assert batch.pairs is not None
    lengths = batch.mask.sum(1), torch.tensor([len(ids) for ids in documents_as_ids(coarse, texts)])
    assert (lengths[1] < lengths[0]).all()
    # The student's last position predicts nothing; the shorter is the teacher's.
    expected = [(row, i) for row, length in enumerate(lengths[1].tolist()) for i in range(length)]
    assert list(zip(batch.pairs.row.tolist(), batch.pairs.student.tolist(), strict=True)) == expected
    assert torch.equal(batch.pairs.student, batch.pairs.teacher)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_stretch_without_a_common_end_is_cut_and_not_lost(plain, packing):
    """300 tokens of one tokenizer, and three of the other: at a document's beginning, and within it."""
    spaces = train_tokenizer([" " * 400] * 20, 257 + 10)
    documents = [" " * 300 + "x", "one", "x" + " " * 300 + "y", "two"]
    sides = (tokenize(documents, plain, with_ends=True), tokenize(documents, spaces, with_ends=True))
    blocks = cut(sides, 16, packing)
    assert predicted(blocks) == predicted(cut(sides[:1], 16, packing))
    assert all(len(reading.ids) > 0 for i in range(len(blocks)) for reading in blocks[i])


def test_blocks_too_short_for_anything_are_refused(with_beginning):
    with pytest.raises(UsageError, match="--seq-len 2 leaves no two tokens"):
        cut((tokenize(DOCUMENTS, with_beginning),), 2, "stream")


@pytest.mark.parametrize("context", [1, 2, 5, 9])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("which", ["plain", "with_beginning"])
def test_a_token_is_predicted_from_as_much_context_as_asked_for(request, which, packing, context):
    tokenizer = request.getfixturevalue(which)
    tokens = tokenize(DOCUMENTS, tokenizer)
    blocks = cut((tokens,), 12, packing, context)
    assert predicted(blocks) == predicted(cut((tokens,), 12, packing))
    assert blocks.num_targets() == len(predicted(blocks))
    begun = tokens.starts if packing != "stream" else torch.tensor([0, len(tokens.ids)])
    for ((first, end, reread),) in blocks.spans.tolist():
        assert end - first + (tokens.beginning is not None) <= 12
        new = first + reread
        document = int(begun[torch.searchsorted(begun, new, right=True) - 1])
        assert reread == min(context, new - document)


def test_two_models_read_again_what_both_have_room_for(plain, coarse):
    tokens = tuple(tokenize(DOCUMENTS, each, with_ends=True) for each in (plain, coarse))
    for context in (1, 3, 6):
        blocks = cut(tokens, 14, "documents", context)
        assert predicted(blocks) == predicted(cut(tokens, 14, "documents"))
        assert (blocks.spans[..., 1] - blocks.spans[..., 0]).max() <= 14
    assert blocks.spans[..., 2].double().mean() > 3


def test_more_context_than_a_row_has_is_an_error(plain):
    with pytest.raises(UsageError, match="of --seq-len 12, 1 to 11 tokens may be read again, got 12"):
        cut((tokenize(DOCUMENTS, plain),), 12, "stream", 12)
