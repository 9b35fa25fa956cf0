"""Are the kernels of one result slower or hungrier than those of another?

python -m bench.compare OLD.json NEW.json [--threshold 1.1] [--across-machines]

Prints the cases that both have, and exits with 1 where an implementation of fastdistill's has become

- slower: beyond the spread of the rounds, and by more than the threshold. Beyond the spread is a lower quartile above
  the old upper quartile, or, of fewer than 8 rounds, whose quartiles say little, a least time above the old largest;
- slower than eager, too: the same of times divided by eager's median, of the same case and file. A machine that is
  busy or hot on the second day makes everything slower, the yardstick as well; that is shown as "slower as eager is"
  and fails nothing. Each case has its own eager, since what slows a machine down need not slow products and passes
  over memory alike. Where a file has none, the first question decides alone;
- hungrier: by more than 5 % and 2 MB.

Eager, torch.compile and other projects' kernels are shown, and fail nothing. Exits with 2 where files cannot be
compared: no case in common, or another machine, number of threads or torch. `--across-machines` compares these
nevertheless, and then the ratio to eager alone, between the ends that the spreads of both leave it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.rows import BASELINE, OTHERS, Case, Row, read, rows
from bench.table import markdown, number

THRESHOLD = 1.1
FEW_ROUNDS = 8
MEMORY_SHARE, MEMORY_MB = 1.05, 2.0
MACHINE = ("cpu", "gpu", "cores", "threads", "system", "torch")

Key = tuple[Case, str]


class Pair(NamedTuple):
    """One implementation at one case, in both files, with eager of each file where it has it."""

    old: Row
    new: Row
    old_eager: Row | None
    new_eager: Row | None

    @property
    def ratio(self) -> float:
        return self.new.median / self.old.median

    @property
    def beside_eager(self) -> float | None:
        """How the time has changed against eager's."""
        if self.old_eager is None or self.new_eager is None or self.new.implementation == BASELINE:
            return None
        return self.ratio / (self.new_eager.median / self.old_eager.median)

    @property
    def is_ours(self) -> bool:
        return self.new.by not in OTHERS


def spread(row: Row) -> tuple[float, float]:
    """Seconds between which a round is expected."""
    return (row.least, row.most) if row.rounds < FEW_ROUNDS else (row.low, row.high)


def is_above(new: Row, old: Row, threshold: float, scale: float = 1.0) -> bool:
    """Whether `new`, divided by `scale`, is beyond the noise of `old`."""
    return spread(new)[0] / scale > spread(old)[1] and new.median / scale > threshold * old.median


def time_verdict(pair: Pair, threshold: float) -> str:
    """ "slower" or "faster", "as eager is" where only that is so, or nothing."""
    machine = 1.0 if pair.beside_eager is None else pair.ratio / pair.beside_eager
    for word, one, other, scale in (
        ("slower", pair.new, pair.old, machine),
        ("faster", pair.old, pair.new, 1 / machine),
    ):
        if is_above(one, other, threshold):
            return word if is_above(one, other, threshold, scale) else f"{word} as eager is"
    return ""


def verdict_across(pair: Pair, threshold: float) -> str:
    """Of two machines, of which eager is the yardstick."""
    if pair.beside_eager is None or pair.old_eager is None or pair.new_eager is None:
        return "" if pair.new.implementation == BASELINE else "no eager"
    old, new = beside(pair.old, pair.old_eager), beside(pair.new, pair.new_eager)
    if new[0] > old[1] and pair.beside_eager > threshold:
        return "slower"
    return "faster" if old[0] > new[1] and 1 / pair.beside_eager > threshold else ""


def beside(row: Row, eager: Row) -> tuple[float, float]:
    """Between which the ratio of a round to one of eager's is expected."""
    (low, high), (eager_low, eager_high) = spread(row), spread(eager)
    return low / eager_high, high / eager_low


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
    pairs = [
        Pair(before[key], after[key], before.get((key[0], BASELINE)), after.get((key[0], BASELINE)))
        for key in before
        if key in after
    ]
    if not pairs:
        raise ValueError("no case is in both files")
    of_time = verdict_across if across else time_verdict
    verdicts = [[of_time(pair, threshold), "hungrier" if is_hungrier(pair) else ""] for pair in pairs]
    failures = [
        f"{pair.new.case}: {pair.new.implementation} is {word}, {change(pair, word)}"
        for pair, words in zip(pairs, verdicts, strict=True)
        for word in words
        if pair.is_ours and word in ("slower", "hungrier")
    ]
    parts = [table(pairs, verdicts)]
    for name, here, there in (("new", before, after), ("old", after, before)):
        missing = [
            f"- {case}: {implementation}" for case, implementation in here if (case, implementation) not in there
        ]
        if missing:
            parts.append("\n".join([f"Not in the {name} file:", "", *missing]))
    return "\n\n".join(parts), failures


def change(pair: Pair, word: str) -> str:
    if word == "hungrier":
        return f"{pair.old.peak_mb:,.1f} to {pair.new.peak_mb:,.1f} MB"
    beside = "" if pair.beside_eager is None else f", {pair.beside_eager:.2f} times beside eager"
    return f"{pair.ratio:.2f} times as long{beside}"


def table(pairs: Sequence[Pair], verdicts: Sequence[Sequence[str]]) -> str:
    heads = ["case", "implementation", "old, ms", "new, ms", "ratio", "beside eager", "noise", "old, MB", "new, MB", ""]
    lines = [heads]
    for pair, words in zip(pairs, verdicts, strict=True):
        noise = max((high - low) / row.median for row in pair[:2] for low, high in [spread(row)])
        lines.append(
            [
                str(pair.new.case),
                pair.new.implementation,
                f"{pair.old.median * 1e3:,.1f}",
                f"{pair.new.median * 1e3:,.1f}",
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
    summary, *_ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=summary)
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
    print("\n".join(failures) or "Nothing is slower or hungrier beyond noise.")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
