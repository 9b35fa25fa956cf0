"""Peak resident memory of one step of a benchmark, above its inputs, in a process of its own:

python -m bench.peak_memory softmax_kl '{"implementation": "torch", "shape": [1024, 50257], "divergence": "jsd"}'
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def peak_memory_mb(operation: str, **case) -> float:
    """Measured in a new process: memory that this one has used and freed would hide it."""
    command = [sys.executable, "-m", "bench.peak_memory", operation, json.dumps(case)]
    # glibc then hands every freed tensor back at once, and the same step always measures the same.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)["peak_mb"]


def high_water_mark() -> int:
    """The most bytes of memory that this process has had so far."""
    if sys.platform == "linux":  # whose ru_maxrss begins with that of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    operation, case = sys.argv[1], json.loads(sys.argv[2])
    benchmark = import_module(f"bench.bench_{operation}")
    benchmark.make_step(**{**case, "shape": benchmark.SHAPES["tiny"]})()  # what is loaded once is not the step's
    step = benchmark.make_step(**case)
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the high-water mark, to VmRSS, the present
    before = high_water_mark()
    step()
    print(json.dumps({"peak_mb": round((high_water_mark() - before) / 1e6, 1)}))


if __name__ == "__main__":
    main()
