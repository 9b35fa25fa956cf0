from __future__ import annotations

import os

import pytest
import torch

# Most operations here are tiny: a second thread costs more than it brings, and stalls on a busy machine.
torch.set_num_threads(1)

if arch := os.environ.get("FASTDISTILL_PTX"):  # before anything asks whether Triton can run here
    from tests.ptx.driver import activate

    activate(int(arch))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    truncates = pytest.mark.skip(reason="Triton's interpreter truncates to bfloat16; the compiled code is run with it")
    for item in items:
        parameters = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        of_a_kernel = "triton" in parameters or "kernels" in item.path.parts
        if of_a_kernel and torch.bfloat16 in parameters:
            item.add_marker(truncates)
