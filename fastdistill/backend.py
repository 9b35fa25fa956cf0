"""Which implementation runs: the one decision, and the two ways to overrule it."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("torch", "triton")
WITH_KERNEL = {
    "softmax_kl": "softmax_kl",
    "linear_softmax_kl": "softmax_kl",
    "layer_loss": "layer_loss",
    "attention_kl": "attention_kl",
}
"""Operations that have a Triton kernel, and the file of kernels/ that has it."""

MIN_TRITON = (3, 4)
MIN_ARCHITECTURE = 60
"""sm_60, the P100's. `torch.utils._triton.has_triton` would say no below sm_70, to what Triton itself compiles."""


TENSOR_CORES = 80
"""sm_80, from which Triton multiplies in tensor cores, and in half precision alone; on others it is slower at it than
the libraries that PyTorch calls. Also in kernels/launch.py."""


def choose_impl(operation: str, impl: str | None, device: torch.device, *, multiplies: Sequence[Tensor] = ()) -> str:
    """ "torch" or "triton" for one call of `operation` on tensors of `device`.

    The argument beats the environment variable FASTDISTILL_IMPL, which beats what is found to be possible: a kernel
    on an NVIDIA GPU that can run it, and that has tensor cores for what its kernel multiplies, else PyTorch, with one
    warning where a GPU cannot. A choice that was made explicitly never falls back: RuntimeError with the cause where it
    cannot be had.
    """
    source = "impl"
    if impl is None:
        impl, source = os.environ.get("FASTDISTILL_IMPL"), "FASTDISTILL_IMPL"
    if impl is None:
        if device.type != "cuda" or operation not in WITH_KERNEL or not _in_tensor_cores(device, multiplies):
            return "torch"
        obstacle = obstacle_to_triton(device.type, device.index, WITH_KERNEL[operation])
        if obstacle is not None:
            _warn_once(f"fastdistill runs its slower PyTorch path instead of its Triton kernels: {obstacle}")
        return "torch" if obstacle is not None else "triton"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl == "triton":
        if operation not in WITH_KERNEL:
            obstacle = f"{operation} has no Triton kernel in this version of fastdistill"
        else:
            obstacle = obstacle_to_triton(device.type, device.index, WITH_KERNEL[operation])
        if obstacle is not None:
            raise RuntimeError(f"{source}='triton' was asked for, but {obstacle}: leave it out, or use 'torch'")
    return impl


def _in_tensor_cores(device: torch.device, factors: Sequence[Tensor]) -> bool:
    if not factors:
        return True
    halves = all(factor.dtype in (torch.float16, torch.bfloat16) for factor in factors)
    major, minor = torch.cuda.get_device_capability(device)
    return halves and 10 * major + minor >= TENSOR_CORES


def obstacle_to_triton(device_type: str, index: int | None, file: str = "softmax_kl") -> str | None:
    """Why the kernels of a file cannot run on tensors of this device, in a clause, or None if they can.

    They can on an NVIDIA GPU, and on whatever a Triton driver that was set, or Triton's interpreter, runs kernels on.
    """
    return _obstacle(device_type, index, file)


# What torch.compiler.assume_constant_result does, which would import torch._dynamo, and with it Triton, now.
obstacle_to_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _obstacle(device_type: str, index: int | None, file: str) -> str | None:
    try:
        import triton
        from triton import knobs
        from triton.runtime import driver
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_TRITON:
        return f"Triton {triton.__version__} is installed, and they need {'.'.join(map(str, MIN_TRITON))} or later"
    if not knobs.runtime.interpret:
        try:
            active: Any = driver.active
            served, target = active.get_active_torch_device(), active.get_current_target()
        except RuntimeError as error:
            return f"Triton finds no GPU ({error})"
        if served.type != device_type:
            return f"the tensors are on {device_type!r}, and Triton runs on {served.type!r}"
        if target.backend != "cuda" or int(target.arch) < MIN_ARCHITECTURE:
            return f"the GPU is a {target.backend} {target.arch}, not an NVIDIA GPU from sm_{MIN_ARCHITECTURE} on"
    return _trial(file, torch.device(device_type) if index is None else torch.device(device_type, index))


def _trial(file: str, device: torch.device) -> str | None:
    """Compile and launch the smallest case: what the compiler or the driver says if they cannot."""
    from fastdistill import ops

    try:
        rows, ones = torch.zeros(1, 1, device=device), torch.ones(4, device=device)
        one = ones[:1]
        if file == "softmax_kl":
            form = "forward_kl", 1
            _, statistics = ops.softmax_kl(rows, rows.clone(), None, one, ones, *form, False, 1, True, False, False)
            ops.softmax_kl_backward(one, rows, rows.clone(), None, one, ones, statistics, *form, 1)
        elif file == "attention_kl":
            vectors, sight = (
                [torch.zeros(1, 1, 1, 16, device=device, dtype=torch.float16) for _ in range(4)],
                (ones[None, :1], None, ones),
            )
            total, _, statistics = ops.attention_kl(*vectors, *sight, True, True)
            ops.attention_kl_backward(total, *vectors, *sight, statistics, True, True)
        else:
            loss, _, statistics = ops.layer_loss([rows], [rows.clone()], one, ones[0], one, "layer_norm")
            ops.layer_loss_backward(loss, [rows], [rows.clone()], one, ones[0], one, statistics, "layer_norm")
    except Exception as error:  # whatever goes wrong in a compiler, its assembler or the driver is the cause to name
        return f"a trial of them failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
