"""`fastdistill verify`: does this installation behave as it says? Each check prints the numbers it saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from fastdistill.training import verify_components, verify_losses, verify_training

Check = Callable[[], list[str]]

CHECKS: dict[str, Check] = {
    "Issue #1: Layerwise Loss Normalization": verify_losses.layerwise_normalization,
    "Issue #2: Sequence Length Alignment": verify_losses.sequence_alignment,
    "Code Structure": verify_training.code_structure,
    "Losses": verify_losses.losses,
    "Components": verify_components.components,
    "Training": verify_training.training,
    "Resume": verify_training.resume,
    "Evaluation": verify_training.evaluation,
    "Kernels": verify_losses.kernels,
}


def main(checks: Mapping[str, Check] = CHECKS) -> int:
    """Run every check; 0 when all hold, 1 when any does not."""
    failures, started, threads = 0, time.monotonic(), torch.get_num_threads()
    torch.set_num_threads(1)  # in work as small as this, more wait for each other on a busy machine
    for name, check in checks.items():
        try:
            seen = check()
        except Exception as error:  # whatever breaks a check is a finding: it is printed and the others still run
            failures += 1
            print(f"✗ {name} - FAILED\n    {type(error).__name__}: {error}")
        else:
            print(f"✓ {name} - VERIFIED")
            print("".join(f"    {line}\n" for line in seen), end="")
    torch.set_num_threads(threads)
    print(f"{len(checks)} checks in {time.monotonic() - started:.0f} s")
    if failures:
        print(f"✗ {failures} OF {len(checks)} CHECKS FAILED")
        return 1
    print("✓ ALL FIXES VERIFIED SUCCESSFULLY!")
    return 0
