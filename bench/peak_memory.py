"""Peak memory of one step of a benchmark, forward and backward, above its inputs; on a CPU in a process of its own:

python -m bench.peak_memory softmax_kl eager '[[1024, 50257], "forward_kl", 1.0, "float32"]'
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

from bench.operation import Case, Step, make_step

ROOT = Path(__file__).resolve().parents[1]

COMPILED = ("torch.compile", "Liger-Kernel")
"""Run twice, or the peak would be the compiler's."""


def peak_memory_mb(operation: str, implementation: str, case: Case) -> float:
    """Resident memory, measured in a new process: what this one has used and freed would hide it."""
    command = [sys.executable, "-m", "bench.peak_memory", operation, implementation, json.dumps(case)]
    # glibc then hands every freed tensor back at once, and the same step always measures the same.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])["peak_mb"]


def gpu_peak_memory_mb(step: Step) -> float:
    """What PyTorch's allocator handed out at most, which no other process and no earlier step changes."""
    step.prepare()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def high_water_mark() -> int:
    """The most bytes of memory that this process has had so far."""
    if sys.platform == "linux":  # whose ru_maxrss begins with that of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    name, implementation = sys.argv[1:3]
    shape, *others = json.loads(sys.argv[3])
    operation, case = import_module(f"bench.bench_{name}").OPERATION, Case(tuple(shape), *others)
    once = make_step(operation, implementation, operation.tiny(case), "both")
    once.run()  # what is loaded once is not the step's
    step = make_step(operation, implementation, case, "both")
    if implementation in COMPILED:
        step.run()
        step.prepare()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the high-water mark, to VmRSS, the present
    before = high_water_mark()
    step.run()
    print(json.dumps({"peak_mb": round((high_water_mark() - before) / 1e6, 1)}))


if __name__ == "__main__":
    main()
