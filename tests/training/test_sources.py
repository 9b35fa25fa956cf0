"""Any text becomes documents: nothing lost, nothing twice, a part held out, and what was done to it is said."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.training import hub_data, text_files
from fastdistill.training.config import UsageError
from fastdistill.training.sources import DocumentStream, Source, open_sources
from fastdistill.training.text_files import cut_text

WORDS = "a quick look at the reference shows that every paragraph of it says something else about a name"


def open_one(data: object, **options) -> Source:
    (source,) = open_sources(str(data), **options)
    return source


def documents_of(source: Source) -> list[str]:
    """All documents of a source that is not large, in their order."""
    train, held_out = iter(source.train), iter(source.held_out)
    return [next(train if i % 10 else held_out) for i in range(len(list(source.train)) + len(source.held_out))]


def paragraph(i: int, characters: int = 300) -> str:
    """Text that no other number has."""
    return (f"{i}: " + f"{WORDS} {i}. " * (1 + characters // len(WORDS)))[:characters]


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    return path


# The embedded reference


def test_the_language_reference_gives_each_paragraph_once_and_holds_out_every_tenth_topic():
    from pydoc_data.topics import topics

    seen, documents = {""}, []
    for topic in sorted(topics):
        kept = []
        for part in topics[topic].split("\n\n"):
            if part.strip() not in seen and part not in kept:
                kept.append(part)
        seen |= {part.strip() for part in kept}
        if kept:
            documents.append("\n\n".join(kept))
    source = open_one("pydoc")
    assert source.held_out == documents[::10]
    assert source.train == [document for i, document in enumerate(documents) if i % 10]
    if hashlib.sha256(repr(sorted(topics.items())).encode()).hexdigest().startswith("6061bdb5e47e53fb"):
        assert source.fingerprint == "0dfe0eae62c321b1c783e586bc2c26c9e64fd8b6cb4bf68540f24dfa2f70c7de"
    assert "characters left out" in source.notes[0]
    assert len(source.notes) == 1


# Cutting a text


@given(
    st.text(alphabet="ab \n\r\t.", max_size=400),
    st.integers(1, 40),
    st.lists(st.integers(0, 400), max_size=6),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_documents_of_a_text_are_the_text_and_none_is_short_however_it_comes(text, size, places):
    documents = list(cut_text([text], size))
    assert "".join(documents) == text
    assert all(size <= len(document) < 5 * size for document in documents) or len(text) < size
    starts = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    assert list(cut_text([text[i:j] for i, j in itertools.pairwise(starts)], size)) == documents


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12345 78\n\nab de\n\ncd ef gh ij kl mn op", ["12345 78\n\n", "ab de\n\n", "cd ef gh ij kl mn op"]),
        ("12345 78\r\n\r\nab de\r\n \r\n\r\ncd ef gh ij", ["12345 78\r\n\r\n", "ab de\r\n \r\n\r\n", "cd ef gh ij"]),
        ("12345678 ab\ncdefgh ijklmnopqrstuvwxyz", ["12345678 ab\n", "cdefgh ", "ijklmnopqrstuvwxyz"]),
        ("12345678 abcdefgh ijklmnopqrstuvwxyz", ["12345678 ", "abcdefgh ", "ijklmnopqrstuvwxyz"]),
        ("1234567890abcdefghijklmnopqrstuvwxyz", ["12345", "67890", "abcde", "fghijklmnopqrstuvwxyz"]),
    ],
)
def test_a_text_is_cut_at_an_empty_line_else_a_line_end_else_a_space_else_anywhere(text, expected):
    assert list(cut_text([text], 5)) == expected


def test_a_line_of_ten_megabytes_is_cut_into_documents_without_losing_a_character(tmp_path):
    line = " ".join(str(i) for i in range(1_450_000))
    assert len(line) > 10_000_000
    (tmp_path / "line.txt").write_text(line)
    source = open_one(tmp_path / "line.txt")
    documents = [*source.train, *source.held_out]
    documents.sort(key=lambda document: int(document.split()[0]))
    assert "".join(documents) == line
    assert max(map(len, documents[:-1])) < 2_020
    assert 900_000 < sum(map(len, source.held_out)) < 1_100_000


def test_a_book_without_a_space_or_an_empty_line_is_cut_too(tmp_path):
    choose = random.Random(0)
    text = "".join(chr(choose.randrange(0x4E00, 0x9E00)) for _ in range(300_000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    source = open_one(tmp_path / "book.txt")
    assert "".join(documents_of(source)) == text
    assert len(source.held_out) == 15


def test_a_file_of_one_line_still_gives_fifty_documents(tmp_path):
    text = " ".join(str(i) for i in range(1_500))
    (tmp_path / "one.txt").write_text(text)
    documents = documents_of(open_one(tmp_path / "one.txt"))
    assert "".join(documents) == text
    assert 45 <= len(documents) <= 50


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_file_is_cut_at_its_empty_lines(tmp_path, end):
    text = (end + end).join(paragraph(i, 1_500) for i in range(100))
    (tmp_path / "text.txt").write_bytes(text.encode())
    documents = documents_of(open_one(tmp_path / "text.txt"))
    assert "".join(documents) == text
    assert len(documents) == 50
    assert all(document.endswith(end + end) for document in documents[:-1])


# Encodings


@pytest.mark.parametrize(
    ("encoding", "note"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", None),
        ("utf-16-be-bom", None),
        ("cp1252", r"text\.txt is not UTF-8 \(byte 5 is 0xe9\): 2,000 bytes read as cp1252"),
    ],
)
def test_a_text_is_the_same_in_any_encoding(tmp_path, encoding, note):
    text = "\n".join(f"{i} café “{i}” — {i} €" for i in range(400))
    raw = b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-bom" else text.encode(encoding)
    (tmp_path / "text.txt").write_bytes(raw)
    source = open_one(tmp_path / "text.txt")
    assert "".join(documents_of(source)) == text
    assert [note is not None and re.search(note, line) is not None for line in source.notes] == [True] * bool(note)


def test_latin_1_bytes_within_utf_8_text_are_read_beside_it(tmp_path):
    text = "\n".join(f"naïve 漢字 {i}" for i in range(40))
    (tmp_path / "mixed.txt").write_bytes(text.encode() + b"\nd\xe9j\xe0 vu")
    source = open_one(tmp_path / "mixed.txt")
    assert "".join(documents_of(source)) == text + "\ndéjà vu"
    assert source.notes == (
        f"{tmp_path}/mixed.txt is not UTF-8 (byte {len(text.encode()) + 2} is 0xe9): 2 bytes read as cp1252",
    )


def test_where_a_large_file_is_read_in_parts_does_not_show(tmp_path, monkeypatch):
    text = "\n\n".join(f"{i} naïve — 漢字 🙂 " * 9 for i in range(3_000))
    raw = text.encode() + b" \x93caf\xe9\x94 " * 5
    (tmp_path / "large.txt").write_bytes(raw)
    monkeypatch.setattr(text_files, "CHUNK", 1_021)
    assert len(raw) > 500_000
    source = open_one(tmp_path / "large.txt")
    assert "".join(documents_of(source)) == text + " “café” " * 5
    assert f"(byte {len(text.encode()) + 1} is 0x93): 15 bytes" in source.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 9, r"x\.txt is not text: byte 8 is 0x00"),
        (b"plain and UTF-8 but for one \0 in it" * 9, r"x\.txt is not text: byte 28 is 0x00"),
        (b"caf\xe9 \x07 bell" * 9, r"x\.txt is not text: byte 5 is 0x07"),
        (b"caf\xe9 \x81 and" * 9, r"x\.txt is not text: byte 5 is 0x81"),
        ("привет мир ".encode("cp1251") * 9, r"is not UTF-8 \(byte 0 is 0xef\), nor cp1252: .* 82% of its bytes"),
        ("漢字かな".encode("utf-16") + b"\x00", r"begins with the byte-order mark of UTF-16 but .* at byte 10"),
        ("a\0b".encode("utf-16"), r"is not text: character 1 is NUL"),
    ],
)
def test_what_is_no_text_is_refused_by_its_first_wrong_byte(tmp_path, content, message):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        open_one(tmp_path / "x.txt")


# Files and folders


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \n" * 3_000])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UsageError, match=r"^--data \S*empty\.txt has no text$"):
        open_one(tmp_path / "empty.txt")


def test_a_folder_gives_its_files_in_the_order_of_their_paths_and_counts_the_others(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    write_jsonl(tmp_path / "c.jsonl", [{"text": paragraph(i)} for i in range(20, 30)])
    write_jsonl(tmp_path / "a.JSON", [{"text": paragraph(i)} for i in range(10)])
    write_parquet(tmp_path / "b" / "deep" / "b.parquet", [{"text": paragraph(i)} for i in range(10, 20)])
    for other in ("read.me", "b/picture.png", ".hidden.txt", ".git/x.txt"):
        (tmp_path / other).write_text("not this")
    (tmp_path / "b" / "empty.txt").write_text("")
    source = open_one(tmp_path)
    assert documents_of(source) == [paragraph(i) for i in range(30)]
    assert source.notes == (
        f"{tmp_path}: 2 files of another kind are left out",
        f"{tmp_path}/b/empty.txt has no text",
    )


def test_a_folder_that_links_back_to_itself_is_read_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "elsewhere" / "x.jsonl", [{"text": paragraph(i)} for i in range(30)])
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "folder")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "elsewhere")
    source = open_one(tmp_path / "folder")
    assert documents_of(source) == [paragraph(i) for i in range(30)]
    assert not source.notes


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no \.txt, \.jsonl, \.json, \.parquet file is in this folder"):
        open_one(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UsageError, match=r"has no text; .*blank\.txt has no text; .*empty\.txt has no text"):
        open_one(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.txt", r"absent\.txt: No such file or directory"),
        ("loop.txt", r"loop\.txt: Too many levels of symbolic links"),
        ("a", r"a/gone\.txt: No such file or directory"),
        ("b", r"b/gone\.jsonl: No such file or directory"),
        ("c", r"c/gone\.parquet: No such file or directory"),
        ("page.html", r"page\.html: the file's kind is not known; known are \.txt, \.jsonl, \.json, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, message):
    if name == "c":
        pytest.importorskip("pyarrow")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "page.html").write_text("text")
    for link in ("a/gone.txt", "b/gone.jsonl", "c/gone.parquet"):
        (tmp_path / link).parent.mkdir()
        (tmp_path / link).symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=message):
        open_one(tmp_path / name)


# Rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut sh', r"x\.jsonl:3 is not JSON \(one object a line is expected\): Unterminated"),
        (b'{"text": "caf\xe9"}', r"x\.jsonl:3 is not JSON .*0xe9"),
        (b'["a", "list"]', r"x\.jsonl:3 must be a JSON object, got list"),
        (b'{"id": 3, "body": "b"}', r"x\.jsonl:3 has no field 'text'; its fields are 'id', 'body': .*--text-field"),
        (b'{"text": ["a"]}', r"x\.jsonl:3: the field 'text' must be a string, got list"),
    ],
)
def test_a_line_that_is_no_row_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "four"}\n')
    with pytest.raises(UsageError, match=message):
        open_one(tmp_path / "x.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_is_a_document_and_one_without_text_is_counted(tmp_path, kind):
    rows = [{"body": paragraph(i) + "\n\n\nend", "id": i} for i in range(30)]
    empty = [{"body": None, "id": 30}, {"body": "", "id": 31}, {"body": " \n", "id": 32}]
    write = write_jsonl if kind == "jsonl" else write_parquet
    path = write(tmp_path / f"rows.{kind}", rows[:7] + empty + rows[7:])
    source = open_one(path, text_field="body")
    assert documents_of(source) == [row["body"] for row in rows]
    assert source.notes == (f"{path}: 3 rows without text",)
    with pytest.raises(UsageError, match=r"has no field 'text'; its fields are 'body', 'id': .*--text-field"):
        open_one(path)


def test_half_a_character_in_json_is_read_as_the_replacement_character(tmp_path):
    rows = [{"text": paragraph(i) + "🙂"} for i in range(20)] + [{"text": "cut \ud83d"}]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + write_jsonl(tmp_path / "x.jsonl", rows).read_bytes())
    source = open_one(tmp_path / "rows.jsonl")
    assert documents_of(source) == [row["text"] for row in rows[:-1]] + ["cut \ufffd"]
    assert source.notes == (f"{tmp_path}/rows.jsonl: 1 texts with half a character, read as U+FFFD",)


def test_a_damaged_parquet_file_and_a_missing_reader_are_named(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UsageError, match=r"x\.parquet is not a Parquet file that can be read"):
        open_one(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"x\.parquet: Parquet files need pyarrow: pip install pyarrow"):
        open_one(tmp_path / "x.parquet")


# The split


def test_a_document_is_kept_once_and_every_tenth_different_one_is_held_out(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": paragraph(i % 35)} for i in range(50)])
    source = open_one(path)
    assert source.held_out == [paragraph(i) for i in (0, 10, 20, 30)]
    assert source.train == [paragraph(i) for i in range(35) if i % 10]
    assert source.notes == (f"{path}: 15 documents left out that are the same as another",)
    assert source.fingerprint == open_one(path).fingerprint
    write_jsonl(path, [{"text": paragraph(i)} for i in range(36)])
    assert source.fingerprint != open_one(path).fingerprint


def test_a_large_text_holds_out_about_a_million_characters(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": paragraph(i, 20_000)} for i in range(1_000)])
    assert 900_000 < sum(map(len, open_one(path).held_out)) <= 1_000_000


@pytest.mark.parametrize("count", [1, 9])
def test_too_few_documents_are_refused(tmp_path, count):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"document {i % count}"} for i in range(30)])
    message = rf"x\.jsonl has {count} different documents \({10 * count} characters\), .*at least 10 are needed"
    with pytest.raises(UsageError, match=message):
        open_one(path)


def test_held_out_paragraphs_that_are_also_learned_from_are_measured(tmp_path):
    notice = "This paragraph is the licence that stands at the end of each document of the set."
    texts = [f"{paragraph(i, 320 - len(notice))}\r\n \r\n  {notice}\r\n" for i in range(40)]
    source = open_one(write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts]))
    share = len(notice) / len(texts[0])
    assert f"{share:.1%} of the held-out characters are in paragraphs that the training text has too" in source.notes[0]
    short = [text.replace(notice, notice[:60]) for text in texts]
    assert not open_one(write_jsonl(tmp_path / "y.jsonl", [{"text": text} for text in short])).notes


# Names and weights


def test_items_are_weighted_all_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b=1.jsonl", "c,d.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name + paragraph(i)} for i in range(10)])
    assert [(s.name, s.weight) for s in open_sources("a.jsonl=3, pydoc=0.5")] == [("a.jsonl", 3), ("pydoc", 0.5)]
    assert [(s.name, s.weight) for s in open_sources("b=1.jsonl,a.jsonl")] == [("b=1.jsonl", None), ("a.jsonl", None)]
    assert [(s.name, s.weight) for s in open_sources("b=1.jsonl=2")] == [("b=1.jsonl", 2)]
    assert [(s.name, s.weight) for s in open_sources("c,d.jsonl")] == [("c,d.jsonl", None)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("pydoc,", "has an empty item"),
        ("", "has an empty item"),
        ("pydoc=0", "greater than 0 are expected, got 'pydoc' and '0'"),
        ("pydoc=-1", "got 'pydoc' and '-1'"),
        ("pydoc=much", "got 'pydoc' and 'much'"),
        ("pydoc=inf", "got 'pydoc' and 'inf'"),
        ("=1", "got '' and '1'"),
        ("pydoc=1,wikitext-2", "wikitext-2 has no weight and others have one; all need one, or none"),
        ("pydoc=1,pydoc=2", "names pydoc 2 times"),
        ("wikitext", "no known name: there are pydoc, wikitext-2, wikitext-103, bookcorpus, openwebtext, c4,"),
        ("../up", r"\.\./up: No such file or directory"),
        ("some/file.jsonl", r"some/file\.jsonl: No such file or directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(data, message):
    with pytest.raises(UsageError, match=message):
        open_sources(data)


# Streams


@pytest.fixture
def folder(tmp_path) -> Path:
    """620 documents in three files of three kinds, the text being one of a little over 2,000 characters each."""
    path = tmp_path / "folder"
    path.mkdir()
    write_jsonl(path / "a.jsonl", [{"text": paragraph(i)} for i in range(300)])
    write_parquet(path / "b.parquet", [{"text": paragraph(i) if i % 7 else None} for i in range(300, 600)])
    (path / "c.txt").write_text("\n\n".join(paragraph(i, 2_100) for i in range(600, 700)))
    return path


def test_a_stream_gives_the_documents_that_loading_gives_but_those_it_holds_out(folder):
    whole = open_one(folder)
    stream = open_one(folder, streaming=True)
    assert isinstance(stream.train, DocumentStream)
    assert len(stream.held_out) == 200
    documents = [*stream.held_out, *stream.train]
    assert sorted(documents) == sorted([*whole.train, *whole.held_out])
    assert [int(document.split(":")[0]) for document in documents] == sorted({*range(700)} - {*range(301, 600, 7)})
    with pytest.raises(StopIteration):
        next(stream.train)
    stream.train.seek(None)
    assert next(stream.train) == documents[200]


@pytest.mark.parametrize("done", [0, 1, 99, 100, 101, 357, 358, 400])
def test_a_stream_goes_on_from_a_position_exactly(folder, done):
    stream = open_one(folder, streaming=True).train
    assert isinstance(stream, DocumentStream)
    for _ in range(done):
        next(stream)
    position = json.loads(json.dumps(stream.position()))
    rest = list(stream)
    again = open_one(folder, streaming=True).train
    assert isinstance(again, DocumentStream)
    again.seek(position)
    assert again.position() == position
    assert list(again) == rest
    assert len(rest) > 40


def test_a_stream_says_what_it_is_and_never_gives_what_is_held_out(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": paragraph(i % 300)} for i in range(600)])
    source = open_one(path, streaming=True)
    assert [*source.train] == [paragraph(i) for i in range(200, 300)] * 2
    assert source.notes == (f"{path} is streamed: 200 documents are held out; other repeats are not looked for",)
    assert source.fingerprint == open_one(path, streaming=True).fingerprint
    write_jsonl(path, [{"text": paragraph(i)} for i in range(601)])
    assert source.fingerprint != open_one(path, streaming=True).fingerprint


def test_a_stream_holds_out_half_a_million_characters_of_long_documents(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": paragraph(i, 50_000)} for i in range(15)])
    assert len(open_one(path, streaming=True).held_out) == 10


def test_a_stream_too_short_to_hold_out_a_part_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": paragraph(i)} for i in range(200)])
    with pytest.raises(
        UsageError, match=r"ends within the 200 documents \(60,000 characters\) .*leave out --streaming"
    ):
        open_one(path, streaming=True)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_does_not_grow_with_a_stream(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(text_files, "CHUNK", 1 << 16)
    rows = [paragraph(i, 2_500) for i in range(4_000)]
    path = tmp_path / f"large.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(rows))
    else:
        write_jsonl(path, [{"text": row} for row in rows])
    del rows
    tracemalloc.start()
    stream = open_one(path, streaming=True).train
    assert sum(map(len, stream)) > 9_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


# Named data sets: a folder of that name stands in for the hub, which no test may ask


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    monkeypatch.setattr("fastdistill.training.sources._is_on_disk", lambda name: False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wikitext(first: int, articles: int) -> list[str]:
    """Lines as the hub has them, blank ones empty; headings of sections, and lines amid text, begin no article."""
    lines = []
    for i in range(first, first + articles):
        lines += ["", f" = Article {i} = \n", "", f" {paragraph(i)} \n", "", " = = Section = = \n", ""]
        lines += [f" x {i} \n", " = y = \n"]
    return lines


def configured(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_dir: {name}\n---\n")


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_of_wikitext_become_articles_and_its_validation_split_is_held_out(hub, streaming):
    configured(hub / "Salesforce/wikitext", "wikitext-2-raw-v1")
    root = hub / "Salesforce/wikitext/wikitext-2-raw-v1"
    for split, first, count in (("train", 0, 30), ("validation", 30, 4), ("test", 40, 2)):
        write_parquet(root / f"{split}-00000-of-00001.parquet", [{"text": line} for line in wikitext(first, count)])
    source = open_one("wikitext-2", streaming=streaming)
    train = list(source.train)
    assert "".join(train) == "".join(line or "\n" for line in wikitext(0, 30))
    assert [document.split("=")[1].strip() for document in train] == [f"Article {i}" for i in range(30)]
    assert [document.split("=")[1].strip() for document in source.held_out] == [f"Article {i}" for i in range(30, 34)]
    assert source.notes[0] == (
        "wikitext-2 is Salesforce/wikitext, configuration wikitext-2-raw-v1, split train, "
        "held out from its split validation"
    )
    if isinstance(source.train, DocumentStream):
        for done in (0, 1, 17, 29, 30):
            source.train.seek(None)
            assert [next(source.train) for _ in range(done)] == train[:done]
            position = json.loads(json.dumps(source.train.position()))
            again = open_one("wikitext-2", streaming=True).train
            assert isinstance(again, DocumentStream)
            again.seek(position)
            assert list(again) == train[done:]


@pytest.mark.parametrize("done", [0, 49, 100, 399])
def test_a_large_named_set_is_streamed_and_goes_on_exactly(hub, done):
    configured(hub / "Skylion007/openwebtext", "plain_text")
    root = hub / "Skylion007/openwebtext/plain_text"
    for k in range(3):
        rows = [{"text": paragraph(200 * k + i), "id": i} for i in range(200)]
        write_parquet(root / f"train-{k:05d}-of-00003.parquet", rows)
    source = open_one("openwebtext")
    assert isinstance(source.train, DocumentStream)
    assert source.held_out == [paragraph(i) for i in range(200)]
    assert [next(source.train) for _ in range(done)] == [paragraph(i) for i in range(200, 200 + done)]
    position = json.loads(json.dumps(source.train.position()))
    again = open_one("openwebtext").train
    assert isinstance(again, DocumentStream)
    again.seek(position)
    assert list(again) == [paragraph(i) for i in range(200 + done, 600)]
    again.seek(None)
    assert next(again) == paragraph(200)


def test_sentences_of_bookcorpus_become_passages(hub):
    sentences = [paragraph(i, 100) for i in range(6_000)]
    write_parquet(hub / "bookcorpus/bookcorpus/train.parquet", [{"text": sentence} for sentence in sentences])
    source = open_one("bookcorpus")
    documents = [*source.held_out, *source.train]
    assert "".join(documents) == "".join(sentence + "\n" for sentence in sentences)
    assert all(2_000 <= len(document) < 2_101 for document in documents[:-1])


def test_a_set_of_the_hub_may_name_its_configuration(hub):
    folder = hub / "some/set"
    folder.mkdir(parents=True)
    configs = "".join(f"- config_name: {c}\n  data_files: {c}.jsonl\n" for c in "ab")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for c in "ab":
        write_jsonl(folder / f"{c}.jsonl", [{"body": c + paragraph(i)} for i in range(20)])
    assert documents_of(open_one("some/set:b", text_field="body")) == ["b" + paragraph(i) for i in range(20)]
    for name, message in (
        ("some/set", r"Config name is missing.*\['a', 'b'\].*named as some/set:CONFIGURATION"),
        ("some/set:c", r"'c' not found. Available: \['a', 'b'\]"),
        ("some/set:a", r"some/set:a: a row has no field 'text'; its fields are 'body': .*--text-field"),
    ):
        with pytest.raises(UsageError, match=message):
            open_one(name)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_set_holds_out_is_not_learned_from(hub, streaming):
    rows = [{"text": paragraph(i)} for i in range(40)]
    write_parquet(hub / "some/set/train-00000-of-00001.parquet", rows)
    write_parquet(hub / "some/set/test-00000-of-00001.parquet", rows[10:15])
    source = open_one("some/set", streaming=streaming)
    assert source.held_out == [row["text"] for row in rows[10:15]]
    assert list(source.train) == [row["text"] for row in rows[:10] + rows[15:]]


def test_a_set_without_a_training_split_is_refused(hub):
    write_parquet(hub / "only/tests/test-00000-of-00001.parquet", [{"text": "one"}])
    with pytest.raises(UsageError, match=r"only/tests has no split 'train'; its splits are test"):
        open_one("only/tests")


@pytest.mark.parametrize("name", [*hub_data.NAMED, "some/set", "some/set:config"])
def test_without_a_network_a_named_set_is_refused_and_no_other_is_taken(hub, name):
    with pytest.raises(UsageError, match=r"not in the cache and the hub is not reached .*HF_HUB_OFFLINE.*local file"):
        open_one(name)


def test_a_name_that_the_hub_does_not_know_is_refused(hub, monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    def refuse(path, *arguments, **options):
        raise DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UsageError, match=r"some/set is no file or folder here, and some/set is no data set on the hub"):
        open_one("some/set")


def test_without_the_package_datasets_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"c4 needs the package datasets: pip install datasets"):
        open_one("c4")
