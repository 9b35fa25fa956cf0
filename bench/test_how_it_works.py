"""What the snippets of a page print is what stands beneath them."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "how-it-works.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"(?s)```python\n(.*?)```\n\n```\n(.*?)```", PAGE)


def test_every_snippet_is_followed_by_what_it_prints():
    assert len(SNIPPETS) == PAGE.count("```python") == 3


@pytest.mark.parametrize(("code", "printed"), SNIPPETS)
def test_a_snippet_prints_what_stands_beneath_it(code, printed):
    out = StringIO()
    with redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed
