"""Writes anew what README and docs show of kept results: tables, figures and lists.

python -m bench.pages            # writes
python -m bench.pages --check    # names what differs from what it would write, and exits with 1

A part that begins with `<!-- bench/results/NAME.json: WORDS -->` and ends with `<!-- end -->` is the table of the
file's rows that `bench.rows.chosen` finds; with `as docs/bench/NAME.svg` after the file's name it is their figure. Of
a run's report.md the WORDS `seed 0` show that seed's rows and the comparison of all seeds; other WORDS, of any .md, are
a heading of it, and show the first table below.

Pages that belong to a file of numbers (`TIED`) need no marks: a table there is found by its head. Their sentences and
lists, which have none, are compared alone and are for the author to write. A figure keeps the digest of what it was
drawn of, and is checked by that, as its bytes depend on the version of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bench import attention, compile_table, layerwise, memory_law, objectives, objectives_run, plot, presets
from bench.rows import chosen, read, rows
from bench.table import table

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end -->"
PART = re.compile(r"<!-- (\S+\.(?:json|md))(?: as (\S+))?(?:: (.+?))? -->\n((?:(?!<!--).)*?)" + END, re.DOTALL)
BEGIN = re.compile(r"<!-- \S+\.(?:json|md)\b")
TABLE = re.compile(r"^(?:\|.*\n)+", re.MULTILINE)


class Tied(NamedTuple):
    """A page, the numbers that it shows, and how."""

    page: str
    kept: str
    table: Callable[[Any], str]
    image: str = ""
    draw: Callable[[Any, Path], None] | None = None


TIED = (
    Tied(
        "docs/memory.md",
        "docs/memory-law.json",
        lambda kept: memory_law.table(kept["results"]),
        "docs/memory-law.png",
        lambda kept, path: memory_law.draw(kept["results"], path),
    ),
    Tied("docs/attention.md", "docs/attention.json", attention.table, "docs/attention.png", attention.draw),
    Tied("docs/layerwise.md", "docs/layerwise.json", layerwise.table, "docs/layerwise.png", layerwise.draw),
    Tied("docs/objectives.md", "docs/objectives.json", objectives.table),
    Tied("docs/objectives.md", "docs/objectives-run.json", objectives_run.table),
    Tied("docs/presets.md", "docs/presets.json", presets.table),
    Tied("kernels/README.md", "docs/compile-check.json", compile_table.tables),
)


class Figure(NamedTuple):
    path: str
    source: str
    """What it is drawn of: a file, words and the digest of the file."""
    draw: Callable[[Path, str], None]


class Page:
    """What a page would be, and how that differs from what it is."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.figures: list[Figure] = []
        self.stale: list[str] = []
        self.unmended: list[str] = []
        """Differences that are not mended by writing."""
        self.text = (root / name).read_text(encoding="utf-8")
        if len(BEGIN.findall(self.text)) != len(PART.findall(self.text)):
            self.unmended.append(f"a part has no {END}")
        self.text = PART.sub(self._part, self.text)
        for tied in TIED:
            if tied.page == name:
                self._tie(tied)
        self.stale += [f"{figure.path} is not of {figure.source}" for figure in self.figures if not is_of(root, figure)]

    def write(self) -> None:
        (self.root / self.name).write_text(self.text, encoding="utf-8")
        for figure in self.figures:
            path = self.root / figure.path
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.draw(path, figure.source)

    def _part(self, found: re.Match[str]) -> str:
        mark, (kept, image, what, body) = found[0].split("\n", 1)[0], found.groups(default="")
        try:
            if image:
                new = self._figure(kept, image, what)
            elif kept.endswith(".md"):
                text = (self.root / kept).read_text(encoding="utf-8")
                new = comparison(text, what) if what.startswith("seed ") else below(text, what)
            else:
                new = table(read(self.root / kept), what)
        except (OSError, ValueError) as error:
            self.unmended.append(f"{mark}: {error}")
            return found[0]
        new = f"\n{new}\n\n"
        if new != body:
            self.stale.append(mark)
        return f"{mark}\n{new}{END}"

    def _figure(self, kept: str, image: str, what: str) -> str:
        result = read(self.root / kept)
        picked = chosen(rows(result), what)
        draw = partial(plot.draw, picked, plot.title(result))
        self.figures.append(Figure(image, source_of(self.root / kept, kept, what), draw))
        link = os.path.relpath(image, Path(self.name).parent)
        return f"![medians and quartiles of time, and peak memory, by case]({link})"

    def _tie(self, tied: Tied) -> None:
        kept = json.loads((self.root / tied.kept).read_text(encoding="utf-8"))
        start = 0
        for part in tied.table(kept).split("\n\n"):
            head, *lines = part.split("\n")
            place = self.text.find(f"{head}\n" if lines and head.startswith("|") else part, start)
            if place < 0:
                self.unmended.append(f"of {tied.kept} it lacks: {head}")
                continue
            if head.startswith("|"):
                old = TABLE.match(self.text, place)
                assert old
                if old[0] != f"{part}\n":
                    self.stale.append(f"{tied.kept}: {head}")
                self.text = f"{self.text[:place]}{part}\n{self.text[old.end() :]}"
            start = place + len(part)
        if tied.draw:
            self.figures.append(
                Figure(tied.image, source_of(self.root / tied.kept, tied.kept), partial(stamped, tied.draw, kept))
            )


def source_of(path: Path, *names: str) -> str:
    return ", ".join([*filter(None, names), hashlib.sha256(path.read_bytes()).hexdigest()[:16]])


def is_of(root: Path, figure: Figure) -> bool:
    path = root / figure.path
    return path.is_file() and figure.source.encode() in path.read_bytes()


def stamped(draw: Callable[[Any, Path], None], kept: Any, path: Path, source: str) -> None:
    """A PNG that says what it is drawn of."""
    draw(kept, path)
    text = PngInfo()
    text.add_text("Source", source)
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=text, dpi=image.info["dpi"])


def below(text: str, heading: str) -> str:
    place = re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)
    found = TABLE.search(text, place.end()) if place else None
    if found is None:
        raise ValueError(f"there is no table below a heading {heading!r}")
    return found[0].rstrip("\n")


def comparison(text: str, what: str) -> str:
    """Of a report: the rows of a seed, and of models without one; and the list that compares seeds."""
    found = TABLE.search(text)
    assert found
    head, rule, *lines = found[0].splitlines()
    seeds = [line.split("|")[2].strip() for line in lines]
    if what.removeprefix("seed ") not in seeds:
        raise ValueError(f"no row is of {what!r}")
    picked = [line for line, seed in zip(lines, seeds, strict=True) if seed in ("", what.removeprefix("seed "))]
    return "\n".join([head, rule, *picked, "", *re.findall(r"^- seed .*$", text, re.MULTILINE)])


def main(arguments: list[str], root: Path = ROOT) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    failed = False
    for path in (root / "README.md", root / "kernels" / "README.md", *sorted((root / "docs").glob("*.md"))):
        page = Page(root, path.relative_to(root).as_posix())
        differing = page.unmended
        if arguments:
            differing = page.stale + differing
        else:
            page.write()
        for what in differing:
            print(f"{page.name}: {what}")
        failed |= bool(differing)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
