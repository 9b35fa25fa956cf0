"""Files and folders that are whole or not there: written beside, synced to the disk, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"


class DamagedError(Exception):
    """A folder that is not as it was written, and how."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk, or one's part of it, has no room left."""
    if isinstance(error, SafetensorError):
        return "No space left" in str(error) or "quota" in str(error)
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees all of it or none; text as UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Make the folder `path` with the files that `write` puts into it, all at once: a reader sees all or nothing.

    The files go to a folder beside it first and to the disk, then a manifest of their hashes, then the name changes.
    A folder that is there already is replaced. What was begun and failed is removed.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        (partial / MANIFEST).unlink(missing_ok=True)  # that of a folder whose files were copied
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        hashes = {str(file.relative_to(partial)): _sha256(file) for file in files}
        (partial / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2))
        for file in (*files, partial / MANIFEST, partial):
            _sync(file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    _sync(path.parent)


def copy_folder(source: Path, path: Path) -> None:
    """Copy the folder `source` to `path`, whole or not at all."""
    write_folder(path, lambda partial: shutil.copytree(source, partial, dirs_exist_ok=True))


def verify(path: Path, needed: tuple[str, ...] = ()) -> None:
    """Raise `DamagedError` unless `path` has the files `needed`, and each file has the bytes that were written."""
    try:
        hashes = json.loads((path / MANIFEST).read_text())["sha256"]
        if unlisted := set(needed) - set(hashes):
            raise DamagedError(f"{path} is damaged: {MANIFEST} does not list {', '.join(sorted(unlisted))}")
        for name, expected in hashes.items():
            if _sha256(path / name) != expected:
                raise DamagedError(f"{path} is damaged: {name} does not match its hash")
    except OSError as error:
        raise DamagedError(f"{path} is incomplete: {error.strerror}: {error.filename}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged: {MANIFEST} cannot be read") from error


def is_whole(path: Path) -> bool:
    """Whether `path` is a folder that `write_folder` made, unharmed."""
    try:
        verify(path)
    except DamagedError:
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
