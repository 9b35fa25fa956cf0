"""The machine that benchmarks run on: what a result tells of it. `python -m bench.machine` prints the result's file."""

from __future__ import annotations

import os
import platform
import re
from datetime import date

import torch
from cpuinfo import get_cpu_info


def machine() -> dict[str, str | int | None]:
    return {
        "cpu": get_cpu_info().get("brand_raw", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def results_file() -> str:
    here = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", str(here["gpu"] or here["cpu"]).lower()).strip("-")
    return f"bench/results/{slug}-{date.today()}.json"


if __name__ == "__main__":
    print(results_file())
