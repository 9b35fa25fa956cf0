"""Local files to documents: plain text of any length and encoding, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import itertools
import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdistill.training.config import UsageError

DOCUMENT_SIZE = 2_000  # characters that a document cut from a text has at least
CHUNK = 1 << 20
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

LINE_END = r"(?>\r\n|\n|\r)"
EMPTY_LINE = re.compile(rf"{LINE_END}(?:[ \t]*{LINE_END})+")
BOUNDARIES = (EMPTY_LINE, re.compile(LINE_END), re.compile(" +"))

# Bytes that are no part of UTF-8 decode to these under "surrogateescape".
FOREIGN = re.compile("[\udc80-\udcff]")
CP1252 = {
    0xDC00 + byte: bytes([byte]).decode("cp1252")
    for byte in range(0x80, 0x100)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # which cp1252 leaves undefined
}
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")


@contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a `UsageError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--data {error.filename or path}: {error.strerror or error}") from error


def cut_text(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Documents of at least `size` characters that, one after another, are the text exactly.

    A document ends after the first empty line that follows its first `size` characters; where neither that nor the
    end comes within four times as many, after a line end; else after a space; else anywhere. It does not matter how the
    text comes in chunks.
    """
    text = ""
    for chunk in chunks:
        text += chunk
        start = 0
        while len(text) - start >= 5 * size:
            end = _boundary(text, start + size, start + 4 * size)
            yield text[start:end]
            start = end
        text = text[start:]
    # What is left is one document, or two or more if each is long enough.
    while match := EMPTY_LINE.search(text, size, max(0, len(text) - size)):
        yield text[: match.end()]
        text = text[match.end() :]
    if text:
        yield text


def _boundary(text: str, first: int, last: int) -> int:
    """The best place in `first .. last` to cut."""
    for boundary in BOUNDARIES:
        if match := boundary.search(text, first, last):
            return match.end()
    return first


class TextFile:
    """A .txt file, its encoding found out: UTF-8, UTF-16 with its byte-order mark, or bytes read as cp1252.

    Bytes that are no part of UTF-8 are read as cp1252, one by one. At 0x80-0x9f it has quotes, dashes and the euro,
    where Latin-1, the same from 0xa0 on, has control codes that no text uses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.encoding = "utf-8-sig"
        self.note = ""
        with _reasons(path), path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if not self.size:
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    self._check_utf16(raw[:])
                else:
                    self._check_bytes(raw)

    def documents(self) -> Iterator[str]:
        """The text, cut; none if it is blank."""
        chunks = self._decoded()
        size = DOCUMENT_SIZE
        if self.size < 5 * 50 * DOCUMENT_SIZE:  # so small, in bytes, that a fiftieth of its characters may be less
            chunks = ["".join(chunks)]
            size = max(1, min(size, len(chunks[0]) // 50))
        return (document for document in cut_text(chunks, size) if not document.isspace())

    def _decoded(self) -> Iterator[str]:
        foreign = "surrogateescape" if self.note else "strict"
        with _reasons(self.path), self.path.open(encoding=self.encoding, errors=foreign, newline="") as file:
            while chunk := file.read(CHUNK):
                yield chunk.translate(CP1252) if self.note else chunk

    def _check_utf16(self, raw: bytes) -> None:
        self.encoding = "utf-16"
        try:
            nul = raw.decode("utf-16").find("\0")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--data {self.path} begins with the byte-order mark of UTF-16 but is not UTF-16 text: "
                f"{error.reason} at byte {error.start}"
            ) from error
        if nul >= 0:
            raise UsageError(f"--data {self.path} is not text: character {nul} is NUL")

    def _check_bytes(self, raw: mmap.mmap) -> None:
        self._refuse(raw, raw.find(b"\0"))
        count, first, undefined = _foreign_bytes(raw)
        if count:
            control = CONTROL.search(raw)
            self._refuse(raw, control.start() if control else undefined)
        if count > len(raw) / 2:
            raise UsageError(
                f"--data {self.path} is not UTF-8 (byte {first} is {raw[first]:#04x}), nor cp1252: no text has "
                f"{count / len(raw):.0%} of its bytes outside ASCII in it; convert it to UTF-8 first"
            )
        if count:
            self.note = f"{self.path} is not UTF-8 (byte {first} is {raw[first]:#04x}): {count:,} bytes read as cp1252"

    def _refuse(self, raw: mmap.mmap, wrong: int) -> None:
        if wrong >= 0:
            raise UsageError(
                f"--data {self.path} is not text: byte {wrong} is {raw[wrong]:#04x} "
                "(text is UTF-8, UTF-16 with its byte-order mark, or cp1252)"
            )


def _foreign_bytes(raw: mmap.mmap) -> tuple[int, int, int]:
    """How many bytes are no part of UTF-8 text, where the first is, and where the first unknown to cp1252 is or -1."""
    count, first, undefined, position = 0, -1, -1, 0
    while position < len(raw):
        part = raw[position : position + CHUNK]
        text, used = codecs.utf_8_decode(part, "surrogateescape", position + CHUNK >= len(raw))
        for match in FOREIGN.finditer(text):
            known = ord(match[0]) in CP1252
            if first < 0 or (undefined < 0 and not known):
                where = position + len(text[: match.start()].encode("utf-8", "surrogateescape"))
                first = where if first < 0 else first
                undefined = undefined if known else where
            count += 1
        position += used
    return count, first, undefined


class LocalData:
    """The documents of a file, or of all files that can be read below a folder, in the order of their paths."""

    def __init__(self, name: str, text_field: str) -> None:
        self.name, self.text_field = name, text_field
        self.notes: list[str] = []
        self.left_out: Counter[str] = Counter()
        path = Path(name)
        if path.is_dir():
            self.files = self._below(path)
        elif path.suffix.lower() in SUFFIXES:
            self.files = [path]
        else:
            raise UsageError(f"--data {name}: the file's kind is not known; known are {', '.join(SUFFIXES)}")
        self._texts = {path: TextFile(path) for path in self.files if path.suffix.lower() == ".txt"}
        self.notes += [text.note for text in self._texts.values() if text.note]

    def identity(self) -> list[Any]:
        """What tells these files from others without reading them: names within the folder, sizes, the text's field."""
        root = Path(self.name)
        with _reasons(root):
            return [self.text_field, *((str(path.relative_to(root)), path.stat().st_size) for path in self.files)]

    def held_out(self) -> Iterator[str]:
        """Files have no part of their own for evaluation."""
        return iter(())

    def documents(self, position: dict[str, int] | None = None) -> Iterator[tuple[str, dict[str, int]]]:
        """Each document with the position after it, from which a later call goes on."""
        first, done = (position["file"], position["document"]) if position else (0, 0)
        for i, path in enumerate(self.files[first:], first):
            before = done if i == first else 0
            count = before
            for document in itertools.islice(self._read(path), before, None):
                count += 1
                yield document, {"file": i, "document": count}
            note = f"{path} has no text"
            if not count and len(self.files) > 1 and note not in self.notes:
                self.notes.append(note)

    def _read(self, path: Path) -> Iterator[str]:
        if path in self._texts:
            return self._texts[path].documents()
        rows = parquet_rows(path, self.text_field) if path.suffix.lower() == ".parquet" else json_rows(path)
        texts = (text_of(row, self.text_field, where, self.left_out) for row, where in rows)
        return (text for text in texts if text)

    def _below(self, folder: Path) -> list[Path]:
        def refuse(error: OSError) -> None:
            raise error

        files, others, walked = [], 0, set()
        with _reasons(folder):
            for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
                if (real := os.path.realpath(parent)) in walked:
                    folders.clear()  # a link led back
                    continue
                walked.add(real)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                shown = [Path(parent, name) for name in names if not name.startswith(".")]
                known = [path for path in shown if path.suffix.lower() in SUFFIXES]
                files += known
                others += len(shown) - len(known)
        if not files:
            raise UsageError(f"--data {self.name}: no {', '.join(SUFFIXES)} file is in this folder or below it")
        if others:
            self.notes.append(f"{self.name}: {others:,} files of another kind are left out")
        return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def text_of(row: dict[str, Any], text_field: str, where: str, left_out: Counter[str]) -> str | None:
    """The text of a row, None and counted if it has none; `UsageError` unless it is a string."""
    if text_field not in row:
        raise UsageError(
            f"--data {where} has no field {text_field!r}; its fields are {', '.join(map(repr, row)) or 'none'}: "
            "name the one that holds the text by --text-field"
        )
    text = row[text_field]
    if text is None or (isinstance(text, str) and (not text or text.isspace())):
        left_out["rows without text"] += 1
        return None
    if not isinstance(text, str):
        raise UsageError(f"--data {where}: the field {text_field!r} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can hold half a surrogate pair, where a text was cut in the middle of an emoji; it is no character.
        left_out["texts with half a character, read as U+FFFD"] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each JSON object of a file of one a line, with its place in the file."""
    with _reasons(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            line = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
            if not line:
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise UsageError(f"--data {where} is not JSON (one object a line is expected): {error}") from error
            if not isinstance(row, dict):
                raise UsageError(f"--data {where} must be a JSON object, got {type(row).__name__}")
            yield row, where


def parquet_rows(path: Path, text_field: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row of a Parquet file, its text alone where it has one, with its place in the file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"--data {path}: Parquet files need pyarrow: pip install pyarrow ({error})") from error

    with _reasons(path):
        try:
            with path.open("rb") as raw, parquet.ParquetFile(raw) as file:
                names = file.schema_arrow.names
                number = 0
                for batch in file.iter_batches(256, columns=[text_field] if text_field in names else names):
                    for row in batch.to_pylist():
                        number += 1
                        yield row, f"{path} row {number}"
        except pyarrow.ArrowException as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"--data {path} is not a Parquet file that can be read: {reason}") from error
