"""What doctor says of the Triton kernels: compiled and launched here, and compared with the PyTorch path."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdistill import attention_kl, backend, layer_loss, linear_softmax_kl, softmax_kl
from fastdistill.training.finding import FAULT, GOOD, NOTE, Finding

LARGEST_DIFFERENCE = 1e-4
"""Of loss and gradient, relative, between two implementations in float32 that add up in another order."""


def kernels(device: torch.device) -> Iterator[Finding]:
    """A finding an operation on a GPU; one on a CPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fallback, which is found below
            chosen = {operation: backend.choose_impl(operation, None, device) for operation in backend.WITH_KERNEL}
    except (ValueError, RuntimeError) as error:  # FASTDISTILL_IMPL asks for what cannot be had
        yield Finding(FAULT, "kernels", str(error), "unset FASTDISTILL_IMPL")
        return
    if device.type != "cuda":
        text = (
            "not launched, since there is no GPU: PyTorch's path serves; "
            "`fastdistill compile-check` compiles them for GPUs that are not here"
        )
        yield Finding(NOTE, "kernels", text)
        return
    for operation, file in backend.WITH_KERNEL.items():
        yield _kernel(operation, backend.obstacle_to_triton(device.type, device.index, file), device, chosen[operation])


def _kernel(operation: str, obstacle: str | None, device: torch.device, chosen: str) -> Finding:
    if obstacle is not None:
        is_old = torch.cuda.get_device_capability(device)[0] < backend.MIN_ARCHITECTURE // 10
        mark = NOTE if is_old or torch.version.hip or sys.platform != "linux" else FAULT
        return Finding(mark, "kernels", f"{operation}: PyTorch's slower path, since {obstacle}", _cure(obstacle))
    try:
        apart = difference(operation, device)
    except Exception as error:  # whatever goes wrong in a compiler or the driver is the cause to name
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Finding(FAULT, "kernels", f"{operation}: fails, {cause}", _cure(cause))
    text = f"{operation}: its Triton kernels compile, launch, and are {apart:.0e} from PyTorch"
    numbers = {"operation": operation, "difference": apart}
    if not apart <= LARGEST_DIFFERENCE:
        cure = f"set FASTDISTILL_IMPL=torch: more than {LARGEST_DIFFERENCE:.0e} is wrong; please report this output"
        return Finding(FAULT, "kernels", text, cure, numbers)
    if chosen == "torch":
        return Finding(NOTE, "kernels", f"{text}; FASTDISTILL_IMPL=torch leaves them out", numbers=numbers)
    return Finding(GOOD, "kernels", text, numbers=numbers)


def _cure(cause: str) -> str:
    if "cannot be imported" in cause or "or later" in cause:
        return f'pip install "triton>={".".join(map(str, backend.MIN_TRITON))}", or torch anew, which brings its own'
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "install a C compiler (apt-get install gcc): Triton builds its launcher with it"
    if "TRITON_PTXAS_PATH" in os.environ:
        return "unset TRITON_PTXAS_PATH: Triton's own ptxas knows every GPU that fastdistill serves"
    return "FASTDISTILL_IMPL=torch runs without them; please report this output"


def difference(operation: str, device: torch.device) -> float:
    """The largest relative difference, of loss and gradient, between the kernels of an operation and PyTorch."""
    loss, other = (_loss_and_gradient(operation, device, impl) for impl in ("triton", "torch"))
    return max(((one - two).norm() / two.norm()).item() for one, two in zip(loss, other, strict=True))


def _loss_and_gradient(operation: str, device: torch.device, impl: str) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make).to(device)

    def by_head(states: Tensor) -> Tensor:
        return states.view(1, tokens, 2, -1).transpose(1, 2)

    tokens, vocab, width = 5, 301, 32
    hidden, weight = normal(tokens, width).requires_grad_(), normal(vocab, width)
    teacher, teacher_weight = normal(tokens, width), normal(vocab, width)
    targets, how = torch.randint(vocab, (tokens,), generator=make).to(device), {"ce_weight": 0.5, "impl": impl}
    losses: dict[str, Callable[[], Any]] = {
        "softmax_kl": lambda: softmax_kl(hidden @ weight.T, teacher @ teacher_weight.T, targets, **how),
        "linear_softmax_kl": lambda: linear_softmax_kl(hidden, weight, teacher, teacher_weight, targets, **how),
        "layer_loss": lambda: layer_loss([hidden], [teacher], normalize="layer_norm", impl=impl),
        "attention_kl": lambda: attention_kl(by_head(hidden), by_head(hidden), *[by_head(teacher)] * 2, impl=impl),
    }
    loss = losses[operation]().loss
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient
