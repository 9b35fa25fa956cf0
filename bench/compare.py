"""Are the kernels of one result slower or hungrier than those of another?

python -m bench.compare OLD.json NEW.json [--threshold 1.1] [--across-machines]

Prints the cases that both have, and exits with 1 where an implementation of fastdistill's has become

- slower beside eager: its time over eager's is beyond the spread of the rounds, and more than the threshold times what
  it was. Beyond the spread is a lower quartile above the old upper quartile, or, of fewer than 8 rounds, whose
  quartiles say little, a least above the old most. A machine that is busy or hot on the second day makes everything
  slower, the yardstick as well; that is shown as "slower as eager is" and fails nothing. `bench` times eager before
  each round; in a file that has it apart, its own spread counts too. Where a file has none, times decide;
- hungrier: by more than 5 % and 2 MB.

Eager, torch.compile and other projects' kernels are shown, and fail nothing. Exits with 2 where files cannot be
compared: no case in common, or another machine, number of threads or torch. `--across-machines` compares these
nevertheless, and then nothing but ratios to eager.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.rows import BASELINE, OTHERS, Case, Row, Spread, read, rows
from bench.table import markdown, number

THRESHOLD = 1.1
MEMORY_SHARE, MEMORY_MB = 1.05, 2.0
MACHINE = ("cpu", "gpu", "cores", "threads", "system", "torch")

Key = tuple[Case, str]


class Pair(NamedTuple):
    """One implementation at one case, in both files."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        return self.new.seconds.median / self.old.seconds.median

    @property
    def of_eager(self) -> tuple[Spread, Spread] | None:
        """The old and the new time over eager's."""
        if self.old.of_eager is None or self.new.of_eager is None or self.new.implementation == BASELINE:
            return None
        return self.old.of_eager, self.new.of_eager

    @property
    def beside_eager(self) -> float | None:
        """How the time has changed against eager's."""
        if self.of_eager is None:
            return None
        old, new = self.of_eager
        return new.median / old.median

    @property
    def is_ours(self) -> bool:
        return self.new.by not in OTHERS


def change_beyond(threshold: float, old: Spread, new: Spread) -> str:
    """ "slower" or "faster", or nothing where it is noise or less than the threshold."""
    for word, less, more in (("slower", old, new), ("faster", new, old)):
        if more.ends[0] > less.ends[1] and more.median > threshold * less.median:
            return word
    return ""


def time_verdict(pair: Pair, threshold: float, across: bool) -> str:
    times = "" if across else change_beyond(threshold, pair.old.seconds, pair.new.seconds)
    if pair.of_eager is None:
        return "no eager" if across and pair.new.implementation != BASELINE else times
    return change_beyond(threshold, *pair.of_eager) or (times and f"{times} as eager is")


def is_hungrier(pair: Pair) -> bool:
    old, new = pair.old.peak_mb, pair.new.peak_mb
    return old is not None and new is not None and new > MEMORY_SHARE * old and new > old + MEMORY_MB


def by_key(result: Mapping[str, Any]) -> dict[Key, Row]:
    return {(row.case, row.implementation): row for row in rows(result)}


def unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How the machines of two results differ."""
    before, after = old["machine_info"], new["machine_info"]
    return [
        f"{name}: {before.get(name)} and {after.get(name)}" for name in MACHINE if before.get(name) != after.get(name)
    ]


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], threshold: float = THRESHOLD, across: bool = False
) -> tuple[str, list[str]]:
    """The report, and what fails.

    Raises:
        ValueError: of results that cannot be compared.
    """
    if not across and (found := unlike(old, new)):
        raise ValueError(f"not of one machine ({'; '.join(found)}); --across-machines compares ratios to eager")
    before, after = by_key(old), by_key(new)
    pairs = [Pair(before[key], after[key]) for key in before if key in after]
    if not pairs:
        raise ValueError("no case is in both files")
    verdicts = [[time_verdict(pair, threshold, across), "hungrier" if is_hungrier(pair) else ""] for pair in pairs]
    failures = [
        f"{pair.new.case}: {pair.new.implementation} is {word}, {change(pair, word)}"
        for pair, words in zip(pairs, verdicts, strict=True)
        for word in words
        if pair.is_ours and word in ("slower", "hungrier")
    ]
    parts = [table(pairs, verdicts), summary(verdicts)]
    for name, here, there in (("new", before, after), ("old", after, before)):
        missing = [
            f"- {case}: {implementation}" for case, implementation in here if (case, implementation) not in there
        ]
        if missing:
            parts.append("\n".join([f"Not in the {name} file:", "", *missing]))
    return "\n\n".join(parts), failures


def summary(verdicts: Sequence[Sequence[str]]) -> str:
    counts = Counter(", ".join(filter(None, words)) or "within noise" for words in verdicts)
    return f"Of {len(verdicts)}: {', '.join(f'{count} {words}' for words, count in counts.most_common())}."


def change(pair: Pair, word: str) -> str:
    if word == "hungrier":
        return f"{pair.old.peak_mb:,.1f} to {pair.new.peak_mb:,.1f} MB"
    beside = "" if pair.beside_eager is None else f", {pair.beside_eager:.2f} times beside eager"
    return f"{pair.ratio:.2f} times as long{beside}"


def table(pairs: Sequence[Pair], verdicts: Sequence[Sequence[str]]) -> str:
    heads = ["case", "implementation", "old, ms", "new, ms", "ratio", "beside eager", "noise", "old, MB", "new, MB", ""]
    lines = [heads]
    for pair, words in zip(pairs, verdicts, strict=True):
        spreads = pair.of_eager or (pair.old.seconds, pair.new.seconds)
        noise = max((high - low) / spread.median for spread in spreads for low, high in [spread.ends])
        lines.append(
            [
                str(pair.new.case),
                pair.new.implementation,
                f"{pair.old.seconds.median * 1e3:,.1f}",
                f"{pair.new.seconds.median * 1e3:,.1f}",
                f"{pair.ratio:.2f}",
                number(pair.beside_eager, ".2f"),
                f"{noise:.0%}",
                number(pair.old.peak_mb, ",.0f"),
                number(pair.new.peak_mb, ",.0f"),
                ", ".join(filter(None, words)),
            ]
        )
    return markdown(lines, texts=2)


def main() -> int:
    first_line, *_ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=first_line)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="ratio of medians (default: %(default)s)")
    parser.add_argument("--across-machines", action="store_true", help="compare ratios to eager alone")
    given = parser.parse_args()
    try:
        report, failures = compare(read(given.old), read(given.new), given.threshold, given.across_machines)
    except (OSError, ValueError) as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    print(report, end="\n\n")
    print("\n".join(failures) or "Nothing of ours is slower or hungrier beyond noise.")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
