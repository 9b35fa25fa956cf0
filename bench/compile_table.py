"""The Markdown tables of a compile check: python -m bench.compile_table docs/compile-check.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ((60, "float16"), (60, "bfloat16"), (75, "float16"), (80, "bfloat16"), (90, "bfloat16"))
OPERATIONS = ("softmax_kl", "layer_loss")
TILE_COLUMNS = ((60, "float16"), (75, "float16"), (80, "bfloat16"), (86, "bfloat16"), (90, "bfloat16"))


def tables(check: dict[str, Any]) -> str:
    return "\n\n".join([*(table(check, operation) for operation in OPERATIONS), tiles(check)])


def table(check: dict[str, Any], operation: str) -> str:
    """A row a case; instructions a pair for the statistics / for the gradient, then registers of each kernel."""
    two_launches = f"_{operation}_stats_kernel", f"_{operation}_grad_kernel"
    one_launch = f"_{operation}_one_launch_kernel"
    found = {(each["case"], each["kernel"], each["arch"], each["dtype"]): each["code"] for each in check["results"]}
    cases = sorted({case for case, kernel, *_ in found if kernel in (two_launches[0], one_launch)})
    lines = [
        f"| form | {' | '.join(f'sm_{arch} {dtype}' for arch, dtype in COLUMNS)} |",
        f"| --- |{' ---: |' * len(COLUMNS)}",
    ]
    for case in cases:
        kernels = [kernel for kernel in (*two_launches, one_launch) if (case, kernel, *COLUMNS[0]) in found]
        cells = [_cell([found[case, kernel, *column] for kernel in kernels]) for column in COLUMNS]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tiles(check: dict[str, Any]) -> str:
    """Of `attention_kl`, whose loops multiply tiles: registers a thread, then KB of shared memory a program, of its
    kernels in the order in which they run.
    """
    found = {(each["case"], each["kernel"], each["arch"], each["dtype"]): each["code"] for each in check["results"]}
    kernels = [f"_attention_kl_{what}_kernel" for what in ("stats", "query_grad", "key_grad")]
    cases = sorted({case for case, kernel, *_ in found if kernel == kernels[0]})
    lines = [
        f"| widths of student and teacher | {' | '.join(f'sm_{arch} {dtype}' for arch, dtype in TILE_COLUMNS)} |",
        f"| --- |{' ---: |' * len(TILE_COLUMNS)}",
    ]
    for case in cases:
        codes = [[found[case, kernel, *column] for kernel in kernels] for column in TILE_COLUMNS]
        cells = [
            " / ".join(str(code["registers"]) for code in each)
            + "; "
            + " / ".join(f"{code['shared_memory'] / 1024:.0f}" for code in each)
            for each in codes
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(codes: list[dict[str, Any]]) -> str:
    main_loops = [[loop["instructions_per_pair"] for loop in code["loops"] if loop["is_main"]] for code in codes]
    counts = main_loops[0] if len(codes) == 1 else map(sum, main_loops)
    return " / ".join(f"{count:.1f}" for count in counts) + "; " + " / ".join(str(code["registers"]) for code in codes)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())))
