"""The text of a run: what `--data` names, as documents, with a part held out."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastdistill.training.config import UsageError
from fastdistill.training.hub_data import NAMED, HubData, Named, find_named
from fastdistill.training.text_files import EMPTY_LINE, SUFFIXES, LocalData

HELD_OUT_EVERY = 10
HELD_OUT_CHARACTERS = 1_000_000
STREAM_HELD_OUT_CHARACTERS = 500_000
STREAM_HELD_OUT_DOCUMENTS = 200
PARAGRAPH = 60  # characters above which the same paragraph twice is no accident


class Reader(Protocol):
    """What `LocalData` and `HubData` are: documents of a source in order, from any position on."""

    name: str
    notes: list[str]
    left_out: Counter[str]

    def documents(self, position: Any = None) -> Iterator[tuple[str, Any]]:
        """Each document with the position after it."""
        ...

    def held_out(self) -> Iterator[str]:
        """Documents that the source itself keeps for evaluation, if any."""
        ...

    def identity(self) -> list[Any]:
        """What tells the source from others without reading it."""
        ...


class DocumentStream(Iterator[str]):
    """Documents one after another, none of them kept; `position()` is where to go on from, in another process too.

    It raises `StopIteration` at the end of the text; `seek(None)` begins again.
    """

    def __init__(self, read: Callable[[Any], Iterator[tuple[str, Any]]], held_out: Sequence[str] = ()) -> None:
        """`read(position)` gives each document after a position (None: all), with the position after it."""
        self._read, self._held_out = read, frozenset(held_out)
        self.seek(None)

    def __next__(self) -> str:
        while True:
            document, self._position = next(self._documents)
            if document not in self._held_out:
                return document

    def position(self) -> Any:
        """Where the stream stands: JSON-serialisable, for `seek`."""
        return self._position

    def seek(self, position: Any) -> None:
        """Go on from a position, None being the beginning."""
        self._position = position
        self._documents = self._read(position)


@dataclass(frozen=True)
class Source:
    """The documents of one item of `--data`, split once and for all."""

    name: str
    """As the user wrote it, without its weight."""
    weight: float | None
    """Share of the training text that is drawn from it; None where the user gave none."""
    train: Sequence[str] | DocumentStream
    held_out: list[str]
    fingerprint: str
    """Hash of the text and its split; of a stream, what identifies it."""
    notes: tuple[str, ...]
    """Sentences to print: what was left out, assumed or measured."""


def open_sources(data: str, *, text_field: str = "text", streaming: bool = False) -> list[Source]:
    """The sources that `data` names, separated by commas, each as `NAME` or `NAME=WEIGHT` (all or none weighted).

    A name is 'pydoc' (Python's language reference, from the standard library), a file (.txt, .jsonl, .json, .parquet)
    or a folder of such files, one of `hub_data.NAMED`, or a data set of the hub as `owner/name` or `owner/name:config`.
    `text_field` names the text of a row. Streams are read as they are used: those data sets of `NAMED` that are too
    large to load, and with `streaming` every source but 'pydoc', which is in memory anyway.
    """
    sources = []
    for name, weight in _items(data):
        if name == "pydoc":
            source = _whole(name, *_pydoc())
        elif _is_on_disk(name):
            local = LocalData(name, text_field)
            source = _streamed(local) if streaming else _loaded(local)
        else:
            named = _named(name)
            hub = HubData(name, named, text_field, streaming or named.streamed)
            source = _streamed(hub) if streaming or named.streamed else _loaded(hub)
        sources.append(replace(source, weight=weight))
    return sources


def _items(data: str) -> list[tuple[str, float | None]]:
    """Names and weights. What follows the last '=' is a weight, unless the whole names a file; so with commas."""
    items = [_item(item.strip()) for item in ([data] if _is_on_disk(data) else data.split(","))]
    names = [name for name, _ in items]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--data {data} names {name} {names.count(name)} times")
    without = [name for name, weight in items if weight is None]
    if without and len(without) < len(items):
        raise UsageError(f"--data {data}: {without[0]} has no weight and others have one; all need one, or none")
    return items


def _item(item: str) -> tuple[str, float | None]:
    if not item:
        raise UsageError("--data has an empty item: NAME or NAME=WEIGHT, separated by commas, is expected")
    if "=" not in item or _is_on_disk(item):
        return item, None
    name, _, number = item.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not 0 < weight < math.inf:
        raise UsageError(f"--data {item}: a name and a weight greater than 0 are expected, got {name!r} and {number!r}")
    return name, weight


def _is_on_disk(name: str) -> bool:
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"--data {name}: {error.strerror}") from error
    return True


def _named(name: str) -> Named:
    named = None if name.lower().endswith(SUFFIXES) else find_named(name)
    if named is None:
        raise UsageError(
            f"--data {name}: No such file or directory, and no known name: there are pydoc, {', '.join(NAMED)}, and "
            "owner/name or owner/name:configuration for a data set of the Hugging Face hub"
        )
    return named


def _pydoc() -> tuple[list[str], list[str]]:
    """Topics of Python's language reference, each paragraph once, and what was left out.

    Topics quote each other at length, and text that is both held out and learned from would make every student look
    better than it is.
    """
    from pydoc_data.topics import topics

    seen: set[str] = {""}
    documents, repeated = [], 0
    for paragraphs in (topics[topic].split("\n\n") for topic in sorted(topics)):
        new = [p for p in dict.fromkeys(paragraphs) if p.strip() not in seen]
        repeated += sum(map(len, paragraphs)) - sum(map(len, new))
        seen.update(p.strip() for p in new)
        if new:
            documents.append("\n\n".join(new))
    return documents, [f"pydoc: {repeated:,} characters left out, of paragraphs that stand in the text before"]


def _loaded(reader: Reader) -> Source:
    documents = [document for document, _ in reader.documents()]
    own = list(_first(reader.held_out(), HELD_OUT_CHARACTERS))
    notes = [*reader.notes, *(f"{reader.name}: {n:,} {what}" for what, n in reader.left_out.items())]
    return _whole(reader.name, documents, notes, own)


def _whole(name: str, documents: list[str], notes: list[str], own: Sequence[str] = ()) -> Source:
    """`own`: the held-out documents of a source that has such; else every tenth document, or fewer of a large text."""
    if not documents:
        raise UsageError(f"--data {name} has no text{''.join(f'; {note}' for note in notes)}")
    held_out, different = list(dict.fromkeys(own)), list(dict.fromkeys(documents))
    characters = sum(map(len, different))
    if held_out:
        known = set(held_out)
        train = [document for document in different if document not in known]
    else:
        every = max(HELD_OUT_EVERY, math.ceil(characters / HELD_OUT_CHARACTERS))
        held_out = different[::every]
        train = [document for i, document in enumerate(different) if i % every]
    if len(different) < HELD_OUT_EVERY or not train:
        raise UsageError(
            f"--data {name} has {len(different)} different documents ({characters:,} characters), and a part is held "
            f"out: at least {HELD_OUT_EVERY} are needed"
        )
    if repeats := len(documents) + len(own) - len(train) - len(held_out):
        notes = [*notes, f"{name}: {repeats:,} documents left out that are the same as another"]
    if (leak := _leak(train, held_out)) > 0.01:
        notes = [
            *notes,
            f"{name}: {leak:.1%} of the held-out characters are in paragraphs that the training text has too: the "
            "held-out loss is lower than on new text",
        ]
    digest = hashlib.sha256()
    for document in (*train, "\0", *held_out):
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return Source(name, None, train, held_out, digest.hexdigest(), tuple(notes))


def _leak(train: list[str], held_out: list[str]) -> float:
    """Share of the held-out characters in paragraphs that also stand in the training text."""
    held = Counter(paragraph for document in held_out for paragraph in _paragraphs(document))
    shared = {paragraph for document in train for paragraph in _paragraphs(document) if paragraph in held}
    return sum(len(paragraph) * held[paragraph] for paragraph in shared) / sum(map(len, held_out))


def _paragraphs(document: str) -> Iterator[str]:
    return (part for part in map(str.strip, EMPTY_LINE.split(document)) if len(part) > PARAGRAPH)


def _streamed(reader: Reader) -> Source:
    """Held out: the source's own, else its first documents, which the stream then never gives."""
    held_out = list(_first(reader.held_out(), HELD_OUT_CHARACTERS)) or list(
        _first(DocumentStream(reader.documents), STREAM_HELD_OUT_CHARACTERS, STREAM_HELD_OUT_DOCUMENTS)
    )
    stream = DocumentStream(reader.documents, held_out)
    if next(stream, None) is None:
        raise UsageError(
            f"--data {reader.name} ends within the {len(held_out)} documents ({sum(map(len, held_out)):,} characters) "
            "that a stream holds out: leave out --streaming"
        )
    stream.seek(None)
    identity = json.dumps([reader.identity(), held_out])
    note = f"{reader.name} is streamed: {len(held_out):,} documents are held out; other repeats are not looked for"
    return Source(
        reader.name, None, stream, held_out, hashlib.sha256(identity.encode()).hexdigest(), (*reader.notes, note)
    )


def _first(documents: Iterator[str], characters: int, most: float = math.inf) -> Iterator[str]:
    """Documents until `characters` or `most` of them are reached."""
    count = 0
    for number, document in enumerate(documents, 1):
        yield document
        count += len(document)
        if count >= characters or number >= most:
            return
