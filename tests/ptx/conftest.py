"""Some tests need a process whose Triton kernels the interpreter runs: `test_without_gpu.py` starts such."""

from __future__ import annotations

import os

if not os.environ.get("FASTDISTILL_PTX"):
    collect_ignore = ["test_triton_kernels.py", "test_layer_loss_traffic.py", "test_softmax_kl_traffic.py"]
