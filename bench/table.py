"""The Markdown table of a result: python -m bench.table bench/results/<machine>-<date>.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BASELINE = "eager"
COMMON = ("operation", "implementation", "shape", "peak_mb")


def case_of(info: dict) -> tuple[str, ...]:
    """(operation with its options, shape): what two implementations have in common."""
    options = [str(value) for name, value in info.items() if name not in COMMON]
    return " ".join([info["operation"], *options]), " x ".join(map(str, info["shape"]))


def table(result: dict) -> str:
    benchmarks = [(each["extra_info"], each["stats"]["median"]) for each in result["benchmarks"]]
    baseline = {case_of(info): median for info, median in benchmarks if info["implementation"] == BASELINE}
    machine, timer = result["machine_info"], result["benchmarks"][0]["options"]["timer"]
    processor, threads = machine["gpu"] or machine["cpu"], machine["threads"]
    lines = [
        f"{processor}, CPU threads: {threads}, torch {machine['torch']}, timer: {timer}",
        "",
        f"| operation | shape | implementation | ms, median | of {BASELINE} | peak MB above inputs |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for info, median in benchmarks:
        ratio = median / baseline[case_of(info)]
        cells = (
            *case_of(info),
            info["implementation"],
            f"{median * 1e3:.1f}",
            f"{ratio:.2f}",
            f"{info['peak_mb']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
