"""Where what takes long to make is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` below FASTDISTILL_CACHE, or below the user's cache folder; it need not be there yet."""
    root = os.environ.get("FASTDISTILL_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdistill"
    return Path(root) / name
