"""Articles of a dump come out as prose."""

from __future__ import annotations

import bz2
import json
import sys
from importlib.util import find_spec

import pytest

from bench import wikipedia

LEFT = """'''Anarchism''' is a ''political'' philosophy ( ; ,) of <br/> kinds.

==Terms==
* first point [http://example.org outer] link
|}

__NOTOC__

Last
"""
PROSE = "Anarchism is a political philosophy of kinds.\n\nTerms\nfirst point outer link\n\nLast"

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>One</title><ns>0</ns><id>1</id><revision><id>1</id><text>{{box}} It is [[one|'''one''']].</text></revision></page>
<page><title>Two</title><ns>0</ns><id>2</id><revision><id>2</id><text>#REDIRECT [[One]]</text></revision></page>
<page><title>Talk:One</title><ns>1</ns><id>3</id><revision><id>3</id><text>No.</text></revision></page>
</mediawiki>
"""  # noqa: E501


def test_what_is_left_of_markup_goes():
    assert wikipedia.prose(LEFT) == PROSE


def test_wrong_arguments_are_told_the_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wikipedia", "dump"])
    assert wikipedia.main() == 2
    assert "python -m bench.wikipedia DUMP.xml.bz2 articles.jsonl" in capsys.readouterr().err


@pytest.mark.skipif(
    find_spec("gensim") is None, reason="gensim reads the dump, and is none of the development packages"
)
def test_articles_are_rows(monkeypatch, tmp_path):
    dump, rows = tmp_path / "dump.xml.bz2", tmp_path / "rows.jsonl"
    dump.write_bytes(bz2.compress(DUMP.encode()))
    monkeypatch.setattr(sys, "argv", ["wikipedia", str(dump), str(rows)])
    assert wikipedia.main() == 0
    assert [json.loads(row) for row in rows.read_text().splitlines()] == [{"title": "One", "text": "It is one."}]
