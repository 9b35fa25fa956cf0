"""The wheel and the checkout beside Hugging Face's `kernels`, which transformers imports and a top-level folder of
that name would hide."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHOW_IMPORTS = """
import json
import fastdistill, fastdistill.kernels
import transformers
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
try:
    import kernels
except ModuleNotFoundError:
    kernels = None
print(json.dumps([fastdistill.__file__, *fastdistill.kernels.__path__, getattr(kernels, "__file__", None)]))
"""


def run(*command: str | Path, **options) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert result.returncode == 0, result.stdout
    return result.stdout


def pip(*arguments: str | Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def new_venv(path: Path) -> Path:
    """The interpreter of a new environment that holds nothing."""
    run(sys.executable, "-m", "venv", "--without-pip", path)
    return path / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """What git tracks or would track, links as links."""
    copy = tmp_path_factory.mktemp("sources")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for file in filter(os.path.lexists, (ROOT / name for name in listed if name)):
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An interpreter with the wheel and nothing else."""
    python = new_venv(tmp_path_factory.mktemp("installed"))
    pip("--python", python, "install", "--no-index", "--no-deps", wheel)
    return python


@pytest.fixture(scope="module")
def uninstalled(tmp_path_factory) -> Path:
    return new_venv(tmp_path_factory.mktemp("uninstalled"))


@pytest.fixture(scope="module", params=[True, False], ids=["with HF kernels", "without HF kernels"])
def libraries(request, tmp_path_factory) -> Path:
    """A folder of links to what is installed here, fastdistill left out and Hugging Face's kernels left in or out."""
    folder = tmp_path_factory.mktemp("libraries")
    left_out = ("fastdistill", "__editable__") if request.param else ("fastdistill", "__editable__", "kernels")
    for place in map(Path, sys.path):
        if place.name not in ("site-packages", "dist-packages"):
            continue
        for entry in place.iterdir():
            link = folder / entry.name
            if not link.is_symlink() and not entry.name.startswith(("__pycache__", *left_out)):
                link.symlink_to(entry)
    assert (folder / "transformers").exists()
    assert (folder / "kernels").exists() == request.param
    return folder


def locations(python: Path, libraries: Path, cwd: Path) -> list[Path | None]:
    """Where fastdistill, fastdistill.kernels and kernels come from, in a process that imports transformers' models."""
    environment = {**os.environ, "PYTHONPATH": str(libraries)}
    output = run(python, "-c", SHOW_IMPORTS, cwd=cwd, env=environment)
    return [None if file is None else Path(file).resolve() for file in json.loads(output.splitlines()[-1])]


def hugging_face_kernels(libraries: Path) -> Path | None:
    file = libraries / "kernels/__init__.py"
    return file.resolve() if file.exists() else None


def test_wheel_holds_every_file_of_the_package_and_nothing_beside_it(sources, wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fastdistill", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    package = {file for file in (sources / "fastdistill").rglob("*") if file.is_file()}
    kernels = {sources / "fastdistill/kernels" / file.name for file in (sources / "kernels").iterdir()}
    assert {sources / name for name in names if name.startswith("fastdistill/")} == package | kernels
    assert any(name.startswith("fastdistill/training/") for name in names)


def test_installed_wheel_leaves_the_name_kernels_to_hugging_face(installed, libraries, tmp_path):
    package, kernels, hugging_face = locations(installed, libraries, cwd=tmp_path)
    assert package is not None
    assert package.is_relative_to(installed.parents[1].resolve())
    assert kernels == package.parent / "kernels"
    assert hugging_face == hugging_face_kernels(libraries)


def test_checkout_leaves_the_name_kernels_to_hugging_face(uninstalled, libraries):
    package, kernels, hugging_face = locations(uninstalled, libraries, cwd=ROOT)
    assert package == ROOT / "fastdistill/__init__.py"
    assert kernels == ROOT / "kernels"
    assert hugging_face == hugging_face_kernels(libraries)
