"""Which builds of PyTorch serve a GPU, and how to install one.

PyTorch's release notes list the architectures of its builds: those for CUDA 12.6 have Maxwell to Hopper, those for CUDA
13 Turing to Blackwell; 2.14 is the last release with a build for CUDA 12.6.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Capability = tuple[int, int]

TURING, BLACKWELL = (7, 5), (10, 0)

FIRST_DRIVER = {12: 525, 13: 580}
"""The oldest branch of NVIDIA's driver that runs builds for this major version of CUDA."""

LAST_DRIVER_BEFORE_TURING = 580
"""The newest branch that knows GPUs older than Turing."""


def is_served(architectures: Sequence[str], capability: Capability) -> bool:
    """Whether a build with these (`torch.cuda.get_arch_list()`) has code for a GPU of this capability.

    Machine code `sm_86` runs on 8.6 and later minor numbers of 8; PTX, `compute_90`, on all from 9.0 on. A letter at
    the end binds either to that GPU alone.
    """
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
        if found is None:
            continue
        major, minor = int(found[2]), int(found[3])
        if (major, minor) == capability or (
            not found[4] and (major, minor) < capability and (found[1] == "compute" or major == capability[0])
        ):
            return True
    return False


def install_line(capability: Capability | None, driver: int | None) -> str:
    """The commands that put a build in place that serves a GPU of this capability, as far as it is known.

    Args:
        driver: the branch of NVIDIA's driver, 550 of 550.54.15.
    """
    before_turing = capability is None or capability < TURING
    old_driver = driver is not None and driver < FIRST_DRIVER[13] and capability is not None and capability < BLACKWELL
    index = "cu126" if before_turing or old_driver else "cu130"
    # pip would leave another build of the same version where it is.
    return f'pip uninstall -y torch && pip install "torch==2.14.*" --index-url https://download.pytorch.org/whl/{index}'


def driver_line(capability: Capability | None) -> str:
    """Which driver a GPU needs, in a clause."""
    if capability is not None and capability >= BLACKWELL:
        return f"install NVIDIA's driver {FIRST_DRIVER[13]} or newer"
    if capability is not None and capability < TURING:
        return f"install NVIDIA's driver {LAST_DRIVER_BEFORE_TURING}, the last that knows this GPU"
    return f"install NVIDIA's driver {FIRST_DRIVER[13]} or newer, or at least {FIRST_DRIVER[12]} for CUDA 12"
