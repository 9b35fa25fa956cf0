"""Two tokenizers beside each other: whether they cut text alike, what each id stands for, where each token ends.

Ends are byte offsets in a document's UTF-8, which is what any two tokenizers have in common: a token may end inside a
character, and the first may hold a space that the text lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastdistill.align import shared_vocabulary
from fastdistill.training.config import UsageError

# No token of text holds these: 0xFF is in no UTF-8. Both tokenizers predict that the text ends, each by its own id.
END_OF_TEXT_STRING = b"\xffend of text"
BEGINNING_OF_TEXT_STRING = b"\xffbeginning of text"

_SPACE = "▁"  # in SentencePiece
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Relation:
    kind: Literal["same", "padded", "different"]
    why: str
    """What decided it, for the log."""


def relation(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Relation:
    """How two tokenizers compare, decided by what they do: names, paths, padding and templates do not matter.

    - "same": every text has the same ids, and the same id ends it.
    - "padded": alike, but one has added tokens, whose ids lie above all of the other's. The ids of the smaller one are
      valid for both models; the larger one differs where a text holds the string of such a token.
    - "different": anything else, down to one merge, the pre-tokenizer, or the token that ends a text.

    Raises:
        UsageError: a tokenizer without a fast form, whose rules cannot be read, or different ones of which
            `token_strings` does not know one.
    """
    if student is teacher:
        return Relation("same", "one tokenizer")
    ours, theirs = _content(student), _content(teacher)
    sizes = f"{len(ours.ids)} and {len(theirs.ids)} ids"
    differ = [name for name in ours.rules if ours.rules[name] != theirs.rules[name]]
    if ours.ids == theirs.ids and ours.added == theirs.added and not differ:
        return Relation("same", f"{len(ours.ids)} ids, cut by the same rules")

    small, large = sorted((ours, theirs), key=lambda content: len(content.ids))
    extra = large.ids.keys() - small.ids.keys()
    shared_are_equal = small.ids.items() <= large.ids.items() and small.added.items() <= large.added.items()
    if extra and not differ and shared_are_equal and large.added.keys() - small.added.keys() == extra:
        first = min(extra, key=large.ids.__getitem__)
        if large.ids[first] > max(small.ids.values()):
            owner = "student" if large is ours else "teacher"
            return Relation("padded", f"{sizes}; the {owner}'s last {len(extra)} are added tokens from {first!r} on")
    if ours.ids == theirs.ids:
        differ += [] if ours.added == theirs.added else ["added tokens"]
        return Relation("different", f"the same {len(ours.ids)} ids, but not the same {' and '.join(differ)}")
    shared, _ = shared_vocabulary(token_strings(student), token_strings(teacher))
    return Relation("different", f"{sizes}; {len(shared)} strings in both")


def token_strings(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each id stands for, by id.

    Pieces of byte-level BPE and of SentencePiece (`▁` is a space, `<0xE4>` a byte) give what they decode to, added
    tokens the UTF-8 of their content. The token that ends a text is `END_OF_TEXT_STRING` whatever it is called, the one
    that begins it `BEGINNING_OF_TEXT_STRING` if that is another. Every other special token, the unknown one and ids
    that are not used are None.

    Raises:
        UsageError: a tokenizer of another kind (WordPiece, words, characters), or without a fast form.
    """
    rules = _rules(tokenizer)
    strings = _strings(rules, tokenizer)
    for token_id in (token["id"] for token in rules["added_tokens"] if token["special"]):
        strings[token_id] = None
    unknown = _unknown_id(rules)
    if unknown is not None:
        strings[unknown] = None
    # The end comes last: a token that has both roles is predicted for that one.
    roles = ((tokenizer.bos_token_id, BEGINNING_OF_TEXT_STRING), (tokenizer.eos_token_id, END_OF_TEXT_STRING))
    for token_id, string in roles:
        if isinstance(token_id, int):
            strings[token_id] = string
    return strings


def encode_with_ends(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """The ids of each document, none added to them, and the byte of its UTF-8 where each token ends, -1 if unknown.

    Ends that are known never fall, and the tokens up to one of them have read exactly the bytes before it, leaving
    aside a space that the tokenizer sets before the text. Where tokens are not the bytes of the text, because it was
    normalised or a character has no token, ends come from the tokenizer's offsets as far as these can be checked
    against the text.

    A special token written out in a document is that token, as for `tokenizer.encode`, and has read its name.

    Raises:
        UsageError: a tokenizer that `token_strings` does not know, or one that changes text so much that most ends are
            unknown; text that is no Unicode.
    """
    # Its size too: a tokenizer may be given more tokens.
    reader = _reader(tokenizer, len(tokenizer))
    reader.backend.encode_special_tokens = tokenizer.split_special_tokens
    texts = [_utf8(document) for document in documents]
    encoded = []
    for document, text, encoding in zip(
        documents, texts, reader.backend.encode_batch_fast(list(documents), add_special_tokens=False), strict=True
    ):
        ids = encoding.ids
        ends = reader.ends_by_bytes(ids, text)
        encoded.append((ids, reader.ends_by_offsets(document) if ends is None else ends))

    total = sum(len(ids) for ids, _ in encoded)
    unknown = [ends.count(-1) for _, ends in encoded]
    if 2 * sum(unknown) > total:
        worst = documents[unknown.index(max(unknown))]
        raise UsageError(
            f"{_named(tokenizer)} changes text: where in it {sum(unknown)} of {total} tokens end cannot be told, most "
            f"in {worst[:60]!r}"
        )
    return encoded


@dataclass(frozen=True)
class _Reader:
    """A tokenizer that adds, pads and cuts nothing, and what its ids are in a text."""

    backend: Tokenizer
    strings: list[bytes]
    """By id, special tokens by their names."""
    lengths: list[int]
    unknown: int | None
    """The id of whatever has no token."""
    literal: frozenset[int]
    """Other tokens that are found in the text before it is normalised: nothing shifts their offsets."""
    byte_level: bool

    def ends_by_bytes(self, ids: list[int], text: bytes) -> list[int] | None:
        """Where tokens end in `text`, if their bytes are its bytes, one space set before it allowed; else None."""
        ends = accumulate(map(self.lengths.__getitem__, ids))
        read = b"".join(map(self.strings.__getitem__, ids))
        if read == text:
            return list(ends)
        if read == b" " + text:
            return [max(end - 1, 0) for end in ends]
        return None

    def ends_by_offsets(self, document: str) -> list[int]:
        """Where tokens end in the UTF-8 of `document` by the tokenizer's offsets, -1 where these cannot be checked.

        A token that reads like the text at its offsets, none of which the next token shares, is an anchor. What lies
        between two anchors must read alike too; where it does not, the offsets have lost the text, and what follows is
        unknown.
        """
        encoding = self.backend.encode(document, add_special_tokens=False)
        ids = encoding.ids
        byte_at = [0, *accumulate(len(character.encode()) for character in document)]
        ends = [-1] * len(ids)
        anchor, anchor_start, read = -1, 0, 0  # in tokens and characters: the last anchor and where it starts and ends
        stop = len(document)
        spans = [*encoding.offsets, (stop, stop), (stop, stop)]
        for i, (start, end) in enumerate(spans[:-1]):
            is_read = (
                i == len(ids) or ids[i] in self.literal or self._reads_like(document[start:end], self.strings[ids[i]])
            )
            if end > spans[i + 1][0] or not is_read:
                continue
            between = ids[anchor + 1 : i]
            found = self._ends_between(between, document[read:start])
            if found is None:
                # A normaliser may treat a part otherwise than within its surroundings.
                around = b"".join(self.strings[token] for token in ids[max(anchor, 0) : i + 1])
                if not self._reads_like(document[anchor_start:end], around):
                    break
                found = [-1] * len(between)
            ends[anchor + 1 : i] = [known if known < 0 else byte_at[read] + known for known in found]
            if i < len(ids):
                ends[i] = byte_at[end]
            anchor, anchor_start, read = i, start, end
        return ends

    def _ends_between(self, ids: list[int], text: str) -> list[int] | None:
        """Ends in the UTF-8 of `text` of all the tokens that read it, -1 if unknown; None if they do not read it."""
        utf8 = text.encode()
        ends = self.ends_by_bytes(ids, utf8)
        if ends is not None or not ids:
            return ends
        is_read = self.unknown in ids or self._reads_like(text, b"".join(map(self.strings.__getitem__, ids)))
        return [-1] * (len(ids) - 1) + [len(utf8)] if is_read else None

    def _reads_like(self, text: str, read: bytes) -> bool:
        """Whether tokens that are the bytes `read` stand for `text`, one space before either aside."""
        utf8 = text.encode()
        if read == utf8 or read == b" " + utf8:
            return True
        normalizer = self.backend.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        if not self.byte_level:  # SentencePiece takes its own sign in a text for a space
            normal = normal.replace(_SPACE, " ")
        utf8 = normal.encode()
        return read in (utf8, b" " + utf8) or b" " + read == utf8


@lru_cache(maxsize=2)  # a student's and a teacher's
def _reader(tokenizer: PreTrainedTokenizerBase, size: int) -> _Reader:
    rules = _rules(tokenizer)
    strings = [string or b"" for string in _strings(rules, tokenizer)]
    vocabulary, unknown = _vocabulary(rules), _unknown_id(rules)
    literal = {t["id"] for t in rules["added_tokens"] if t["special"] or t["content"] not in vocabulary}
    bare = rules | {"truncation": None, "padding": None, "post_processor": None}
    return _Reader(
        backend=Tokenizer.from_str(json.dumps(bare)),
        strings=strings,
        lengths=list(map(len, strings)),
        unknown=unknown,
        literal=frozenset(literal - {unknown}),
        byte_level=_piece_decoder(rules, tokenizer) is _byte_level_bytes,
    )


def _utf8(document: str) -> bytes:
    try:
        return document.encode()
    except UnicodeEncodeError as error:
        near = document[max(0, error.start - 20) : error.start + 20]
        raise UsageError(f"a document is no Unicode text: half a surrogate pair stands in {near!r}") from error


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `tokenizer.json` would hold: all that decides ids, and more."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageError(
            f"{_named(tokenizer)} ({type(tokenizer).__name__}) has no fast form, a tokenizer.json, so what it does to "
            "text cannot be read"
        )
    try:
        return json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the only type that tokenizers raises
        raise UsageError(f"{_named(tokenizer)} cannot be written as a tokenizer.json: {error}") from error


def _vocabulary(rules: dict[str, Any]) -> dict[str, int]:
    """Id of each of the model's pieces, without tokens that are only added."""
    vocab = rules["model"]["vocab"]
    return {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def _unknown_id(rules: dict[str, Any]) -> int | None:
    model = rules["model"]
    return model["unk_id"] if model["type"] == "Unigram" else _vocabulary(rules).get(model["unk_token"])


def _components(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder in their order, sequences within sequences undone."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    steps = next(value for value in part.values() if isinstance(value, list))
    return [component for step in steps for component in _components(step)]


@dataclass(frozen=True)
class _Content:
    """All that decides which ids a text gets."""

    ids: dict[str, int]
    added: dict[str, tuple]
    """How each added token is found in a text."""
    rules: dict[str, Any]
    """Everything else, by the name that a reader knows it by."""


def _content(tokenizer: PreTrainedTokenizerBase) -> _Content:
    rules = _rules(tokenizer)
    tokens, vocab = rules["added_tokens"], rules["model"]["vocab"]
    added = {t["content"]: (t["single_word"], t["lstrip"], t["rstrip"], t["normalized"]) for t in tokens}
    settings = {key: value for key, value in rules["model"].items() if key not in ("vocab", "merges")}
    return _Content(
        ids=_vocabulary(rules) | {token["content"]: token["id"] for token in tokens},
        added=added,
        rules={
            "merges": rules["model"].get("merges"),
            "scores": [piece for piece in vocab if piece[0] not in added] if isinstance(vocab, list) else None,
            "model settings": _stated(settings),
            "normaliser": [_stated(component) for component in _components(rules["normalizer"])],
            "pre-tokenizer": [_stated(component) for component in _components(rules["pre_tokenizer"])],
            "reading of special tokens": tokenizer.split_special_tokens,
            "token that ends a text": tokenizer.eos_token_id,
        },
    )


def _stated(settings: dict[str, Any]) -> dict[str, Any]:
    """Without fields that say nothing, which one file leaves out and another sets to null, and offsets' own."""
    return {
        key: value
        for key, value in settings.items()
        if key != "trim_offsets" and value is not None and value is not False and value != ""
    }


def _strings(rules: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes of each id in a text, by id, special tokens by their names; None for ids that are not used."""
    vocabulary = _vocabulary(rules)
    decode = _piece_decoder(rules, tokenizer)
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in rules["added_tokens"])])
    strings: list[bytes | None] = [None] * size
    for piece, i in vocabulary.items():
        strings[i] = decode(piece)
    for token in rules["added_tokens"]:
        if token["special"] or strings[token["id"]] is None:
            strings[token["id"]] = token["content"].encode()
    return strings


def _piece_decoder(rules: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes | None]:
    model = rules["model"]
    parts = [c for part in ("normalizer", "pre_tokenizer", "decoder") for c in _components(rules[part])]
    # Pieces that are marked as parts of words, CLIP's and BERT's, have lost the spaces between words.
    if not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        if any(component["type"] == "ByteLevel" for component in parts):
            return _byte_level_bytes
        if any(_SPACE in (component.get("replacement"), component.get("content")) for component in parts):
            return _sentencepiece_bytes if model.get("byte_fallback") else _spaced_bytes
    raise UsageError(
        f"{_named(tokenizer)}: its {model['type']} pieces are neither byte-level nor SentencePiece's, and what text "
        "other kinds stand for is not known"
    )


def _byte_level_bytes(piece: str) -> bytes | None:
    """None for a piece outside the alphabet, which the model cannot meet."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, piece))
    except KeyError:
        return None


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else _spaced_bytes(piece)


def _spaced_bytes(piece: str) -> bytes:
    return piece.replace(_SPACE, " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each character of GPT-2's alphabet: printable ones are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
