"""Which implementation runs: the one decision, and the two ways to overrule it."""

from __future__ import annotations

import os

IMPLEMENTATIONS = ("torch", "triton")
WITH_KERNEL: frozenset[str] = frozenset()
"""Operations that have a Triton kernel."""


def choose_impl(operation: str, impl: str | None) -> str:
    """ "torch" or "triton" for one call of `operation`.

    The argument beats the environment variable FASTDISTILL_IMPL, which beats what is found to be possible. A choice
    that was made explicitly never falls back: RuntimeError where it cannot be had.
    """
    source = "impl"
    if impl is None:
        impl, source = os.environ.get("FASTDISTILL_IMPL"), "FASTDISTILL_IMPL"
    if impl is None:
        return "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl == "triton" and operation not in WITH_KERNEL:
        raise RuntimeError(
            f"{source}='triton' was asked for, but {operation} has no Triton kernel in this version of fastdistill: "
            "leave it out, or use 'torch'"
        )
    return impl
