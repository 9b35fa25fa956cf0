"""Some tests need a process whose Triton kernels the interpreter runs: `test_without_gpu.py` starts such."""

from __future__ import annotations

import os

if not os.environ.get("FASTDISTILL_PTX"):
    collect_ignore = ["test_triton_kernels.py"]
    collect_ignore_glob = ["test_*_traffic.py"]
