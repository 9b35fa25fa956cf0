"""Named data sets of the Hugging Face hub to documents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastdistill.training.config import UsageError
from fastdistill.training.text_files import DOCUMENT_SIZE, text_of

HELD_OUT_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Named:
    path: str
    config: str | None = None
    revision: str | None = None
    streamed: bool = False
    """Too large to be loaded whole."""


NAMED = {
    "wikitext-2": Named("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": Named("Salesforce/wikitext", "wikitext-103-raw-v1"),
    # Its main branch is a script, which datasets 4 no longer runs; the hub keeps the rows as Parquet beside it.
    "bookcorpus": Named("bookcorpus/bookcorpus", revision="refs/convert/parquet", streamed=True),
    "openwebtext": Named("Skylion007/openwebtext", "plain_text", streamed=True),
    "c4": Named("allenai/c4", "en", streamed=True),
    "fineweb-edu": Named("HuggingFaceFW/fineweb-edu", "sample-10BT", streamed=True),
}

ARTICLE = re.compile(r" = (?!= ).* = \n")


def _begins_article(line: str, before: list[str]) -> bool:
    return bool(ARTICLE.fullmatch(line)) and not (before and before[-1].strip())


def _begins_passage(line: str, before: list[str]) -> bool:
    return sum(map(len, before)) >= DOCUMENT_SIZE


LINES: dict[str, Callable[[str, list[str]], bool]] = {
    "Salesforce/wikitext": _begins_article,
    "bookcorpus/bookcorpus": _begins_passage,
}
"""Data sets whose rows are lines of one text, and whether a line begins a document, given the lines before it."""


def find_named(name: str) -> Named | None:
    """What `owner/name`, `owner/name:config` or a short name of `NAMED` stands for."""
    if name in NAMED:
        return NAMED[name]
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+))?", name)
    return Named(match[1], match[2]) if match else None


class HubData:
    """The documents of a data set's training split, and of its validation or else test split where it has one."""

    def __init__(self, name: str, named: Named, text_field: str, streaming: bool) -> None:
        self.name, self.named, self.text_field = name, named, text_field
        self.left_out: Counter[str] = Counter()
        with _explained(name, named.path):
            splits = _load(name, named, streaming)
        if "train" not in splits:
            raise UsageError(f"--data {name}: {named.path} has no split 'train'; its splits are {', '.join(splits)}")
        own = next((split for split in HELD_OUT_SPLITS if split in splits), None)
        self._info = splits["train"].info
        self._held_out = splits[own] if own else None
        self._train = splits["train"] if streaming else splits["train"].to_iterable_dataset()
        self._beginning = self._train.state_dict()
        parts = f"split train, held out from its split {own}" if own else "split train"
        self.notes = [f"{name} is {named.path}, configuration {self._info.config_name}, {parts}"]

    def identity(self) -> list[Any]:
        """What tells this data set from others without reading it."""
        version = str(self._info.version)
        return [self.named.path, self._info.config_name, version, self.named.revision, self.text_field]

    def held_out(self) -> Iterator[str]:
        """Documents of the data set's own held-out split; none where it has no such split."""
        if self._held_out is not None:
            yield from (document for document, _ in self._read(self._held_out, lambda: None, ""))

    def documents(self, position: dict[str, Any] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each document with the position after it, from which a later call goes on."""
        self._train.load_state_dict(position["rows"] if position else self._beginning)
        return self._read(self._train, self._train.state_dict, position["line"] if position else "")

    def _read(
        self, rows: Iterable[dict[str, Any]], state: Callable[[], Any], line: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """`state`: of the rows, where they stand; `line`: one that was read before and belongs to the next document."""
        begins = LINES.get(self.named.path)
        if begins is None:
            for row in self._rows(rows):
                if text := text_of(row, self.text_field, f"{self.name}: a row", self.left_out):
                    yield text, {"rows": state(), "line": ""}
            return
        lines = [line]
        for row in self._rows(rows):
            # Blank lines are part of the text here, and so is the end of a line, which some sets leave out.
            text = text_of(row, self.text_field, f"{self.name}: a row", Counter()) or ""
            line = text if text.endswith("\n") else text + "\n"
            if begins(line, lines) and (document := "".join(lines)).strip():
                yield document, {"rows": state(), "line": line}
                lines = []
            lines.append(line)
        if (document := "".join(lines)).strip():
            yield document, {"rows": state(), "line": ""}

    def _rows(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        with _explained(self.name, self.named.path):
            yield from rows


def _load(name: str, named: Named, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"--data {name} needs the package datasets: pip install datasets ({error})") from error

    return datasets.load_dataset(named.path, named.config, revision=named.revision, streaming=streaming)


@contextmanager
def _explained(name: str, path: str) -> Iterator[None]:
    """What the package datasets or the network refuses becomes a `UsageError` that says what to do."""
    try:
        yield
    except UsageError:
        raise
    except ConnectionError as error:
        raise UsageError(
            f"--data {name}: {path} is not in the cache and the hub is not reached ({_line(error)}): load it once "
            "while online (HF_HUB_OFFLINE not set), or name a local file or folder"
        ) from error
    except FileNotFoundError as error:
        raise UsageError(
            f"--data {name} is no file or folder here, and {path} is no data set on the hub that can be read: "
            f"{_line(error)}"
        ) from error
    except Exception as error:
        # datasets and its readers raise many kinds; the reason is in the message of each.
        reasons = ": ".join(_line(e) for e in (error, error.__cause__) if e)
        raise UsageError(
            f"--data {name}: {path} cannot be read: {reasons} (a configuration is named as {path}:CONFIGURATION)"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
