"""What doctor finds: a line each, with what mends it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

GOOD, NOTE, FAULT = "✓", "!", "✗"

_TOPIC, _WIDTH = 12, 118


@dataclass(frozen=True)
class Finding:
    """`mark` is GOOD, NOTE (worth knowing; nothing must be done) or FAULT (`cure` says what mends it).

    `numbers` are what `text` tells, for programs.
    """

    mark: str
    topic: str
    text: str
    cure: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Aligned lines; the cure on its own, whole, to be copied."""
        indent = " " * (_TOPIC + 4)
        head = f"{self.mark} {self.topic:<{_TOPIC}}  "
        lines = textwrap.fill(self.text, _WIDTH, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)
        return lines + (f"\n{indent}→ {self.cure}" if self.cure else "")
