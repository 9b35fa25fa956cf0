"""Other libraries' distillation losses, where they are installed; nothing here needs them.

pip install --no-deps liger-kernel trl torchtune     # fastdistill[dev] has what the first two need beside
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from bench.operation import Cannot


def imported(module: str) -> Any:
    library = module.split(".")[0]
    if find_spec(library) is None:
        raise Cannot(f"{library} is not installed")
    try:
        return import_module(module)
    except ImportError as error:
        raise Cannot(f"{module} does not import here: {' '.join(str(error).split())[:200]}") from error


@cache
def torchtune_losses() -> Any:
    """Its module of losses needs PyTorch alone, the package around it torchao and more: loaded without that."""
    package = find_spec("torchtune")
    if package is None or package.origin is None:
        raise Cannot("torchtune is not installed")
    file = Path(package.origin).parent / "modules" / "loss" / "kd_losses.py"
    spec = spec_from_file_location("torchtune_kd_losses", file) if file.exists() else None
    if spec is None or spec.loader is None:
        raise Cannot("this version of torchtune has no modules/loss/kd_losses.py")
    losses = module_from_spec(spec)
    spec.loader.exec_module(losses)
    return losses
