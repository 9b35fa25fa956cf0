"""The Markdown table of a result: python -m bench.table bench/results/<machine>-<date>.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BASELINE = "eager"
CASE = ("dtype", "valid", "pass")
"""Columns of results that say them; early ones were all fp32, forward and backward."""
MEASURED = ("implementation", "peak_mb", "tokens_per_s", "gb_per_s", "tflop_per_s", "roof", "of_roof")


def case_of(info: dict[str, Any]) -> tuple[str, ...]:
    """(operation with its options, shape, what else is said of it): what two implementations have in common."""
    apart = ("operation", "shape", *CASE, *MEASURED)
    options = [str(value) for name, value in info.items() if name not in apart]
    shape = " x ".join(map(str, info["shape"]))
    return " ".join([info["operation"], *options]), shape, *(str(info[name]) for name in CASE if name in info)


def rate_of(info: dict[str, Any]) -> tuple[str, str]:
    """(GB/s or TFLOP/s, its share of the roof), where a result has them."""
    for name, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s")):
        if name in info:
            return f"{info[name]:.3g} {unit}", f"{info['of_roof']:.2f}"
    return "", ""


def table(result: dict[str, Any]) -> str:
    benchmarks = [(each["extra_info"], each["stats"]["median"]) for each in result["benchmarks"]]
    baseline = {case_of(info): median for info, median in benchmarks if info["implementation"] == BASELINE}
    machine, timer = result["machine_info"], result["benchmarks"][0]["options"]["timer"]
    processor, threads = machine["gpu"] or machine["cpu"], machine["threads"]
    has_passes = any("pass" in info for info, _ in benchmarks)
    words = ["operation", "shape", *(CASE if has_passes else ()), "implementation"]
    figures = ["ms, median", f"of {BASELINE}", *(("rate", "of roof") if has_passes else ()), "peak MB above inputs"]
    lines = [
        f"{processor}, CPU threads: {threads}, torch {machine['torch']}, timer: {timer}",
        "",
        f"| {' | '.join([*words, *figures])} |",
        f"| {' | '.join(['---'] * len(words) + ['---:'] * len(figures))} |",
    ]
    for info, median in benchmarks:
        eager = baseline.get(case_of(info))
        cells = (
            *case_of(info),
            info["implementation"],
            f"{median * 1e3:.1f}",
            f"{median / eager:.2f}" if eager else "",
            *(rate_of(info) if has_passes else ()),
            f"{info['peak_mb']:.0f}" if "peak_mb" in info else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
