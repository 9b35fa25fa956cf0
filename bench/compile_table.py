"""The Markdown table of a compile check: python -m bench.compile_table docs/compile-check.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ((60, "float16"), (60, "bfloat16"), (75, "float16"), (80, "bfloat16"), (90, "bfloat16"))
KERNELS = ("_softmax_kl_stats_kernel", "_softmax_kl_grad_kernel")
ONE_LAUNCH = "_softmax_kl_one_launch_kernel"


def table(check: dict[str, Any]) -> str:
    """A row a case; instructions a pair for the statistics / for the gradient, then registers of each kernel."""
    found = {(each["case"], each["kernel"], each["arch"], each["dtype"]): each["code"] for each in check["results"]}
    cases = sorted({case for case, kernel, *_ in found if kernel in (KERNELS[0], ONE_LAUNCH)})
    lines = [
        f"| form | {' | '.join(f'sm_{arch} {dtype}' for arch, dtype in COLUMNS)} |",
        f"| --- |{' ---: |' * len(COLUMNS)}",
    ]
    for case in cases:
        kernels = [kernel for kernel in (*KERNELS, ONE_LAUNCH) if (case, kernel, *COLUMNS[0]) in found]
        cells = [_cell([found[case, kernel, *column] for kernel in kernels]) for column in COLUMNS]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(codes: list[dict[str, Any]]) -> str:
    main_loops = [[loop["instructions_per_pair"] for loop in code["loops"] if loop["is_main"]] for code in codes]
    counts = main_loops[0] if len(codes) == 1 else map(sum, main_loops)
    return " / ".join(f"{count:.1f}" for count in counts) + "; " + " / ".join(str(code["registers"]) for code in codes)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
