"""Measurements that are kept as JSON, and what a page shows of them: the command line of the modules that make such."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(
    usage: str | None,
    *,
    measure: Callable[[], Any],
    table: Callable[[Any], str],
    draw: Callable[[Any, Path], None] | None = None,
) -> int:
    """`measure FILE` writes what is to be kept, `table FILE` prints its tables, `draw FILE IMAGE` draws it."""
    match sys.argv[1:]:
        case ["measure", path]:
            Path(path).write_text(json.dumps(measure(), indent=1) + "\n")
        case ["table", path]:
            print(table(_kept(path)))
        case ["draw", path, image] if draw:
            draw(_kept(path), Path(image))
        case _:
            print(usage, file=sys.stderr)
            return 2
    return 0


def _kept(path: str) -> Any:
    return json.loads(Path(path).read_text())
