"""What the snippets of pages print is what stands beneath them."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
SNIPPETS = {"how-it-works.md": 3, "postmortem.md": 2}
"""How many each page has."""


def snippets(page: str) -> list[tuple[str, str]]:
    """Code and what is printed."""
    return re.findall(r"(?s)```python\n(.*?)```\n\n```\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", SNIPPETS)
def test_every_snippet_is_followed_by_what_it_prints(page):
    assert len(snippets(page)) == (DOCS / page).read_text(encoding="utf-8").count("```python") == SNIPPETS[page]


@pytest.mark.parametrize(
    ("code", "printed"),
    [pytest.param(*snippet, id=f"{page}-{i}") for page in SNIPPETS for i, snippet in enumerate(snippets(page))],
)
def test_a_snippet_prints_what_stands_beneath_it(code, printed):
    out = StringIO()
    with redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed
