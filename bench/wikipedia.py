"""Articles of a MediaWiki dump as rows of text, for a run on real prose:

pip install gensim
python -m bench.wikipedia DUMP.xml.bz2 articles.jsonl

gensim 4.4.0 carries some hundred articles of the English Wikipedia (CC BY-SA) among its test data. Its parser takes
tables, references and templates out; what it leaves of the markup goes here, and pages that only send on to others.
"""

from __future__ import annotations

import bz2
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REMAINS = [
    (r"\[https?://\S+ ?([^\]]*)\]", r"\1"),  # outer links
    (r"<[^<>\n]{0,200}>|__[A-Z]+__|'{2,}", ""),  # tags, switches, bold and italics
    (r"(?m)^[ \t]*[*#:;|!{}=]+[ \t]*|[ \t]*=+[ \t]*$", ""),  # bullets, headings, what is left of tables
    (r"\([ ,;]*\)", ""),  # of a parenthesis all that a template held
    (r"[ \t]+", " "),
    (r"(?m) +$", ""),
    (r"\n{3,}", "\n\n"),
]


def prose(text: str) -> str:
    """An article without the markup that gensim leaves."""
    for pattern, replacement in REMAINS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and text of each."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki  # pyright: ignore[reportMissingImports]

    with bz2.open(dump, "rb") as pages:
        for title, markup, _ in extract_pages(pages, filter_namespaces=("0",)):
            text = "" if markup.lstrip().lower().startswith("#redirect") else prose(filter_wiki(markup))
            if text:  # a page of another kind comes without
                yield title, text


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    count = characters = 0
    with Path(sys.argv[2]).open("w", encoding="utf-8") as rows:
        for title, text in articles(Path(sys.argv[1])):
            rows.write(json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n")
            count, characters = count + 1, characters + len(text)
    print(f"{count:,} articles, {characters:,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
