"""The dependency rules between the parts of the repository, read off its imports."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
KNOW_KERNELS = {f"fastdistill/{name}.py" for name in ("losses", "linear_chunks", "ops", "compile_check")}
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}
TRAINING_LIBRARIES = {"transformers", "datasets", "accelerate"}


class Import(NamedTuple):
    file: str
    line: int
    name: str
    """Dotted, with what is taken from the module: `from fastdistill import kernels` is `fastdistill.kernels`."""
    inside_function: bool

    @property
    def root(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_kernel(self) -> bool:
        return self.name.split(".")[:2] == ["fastdistill", "kernels"]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def python_files() -> list[str]:
    """Those that git tracks or would track; the files of kernels/ once, not again through the link."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return [file for file in listed if file.endswith(".py") and (ROOT / file).is_file()]


def imports_of(file: str) -> Iterator[Import]:
    package = list(Path(file).parent.parts)
    if package[:1] == ["kernels"]:
        package.insert(0, "fastdistill")

    def visit(node: ast.AST, inside_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, inside_function)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            for alias in node.names:
                yield Import(file, node.lineno, ".".join([*base, alias.name]), inside_function)
        inside_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside_function)

    return visit(ast.parse((ROOT / file).read_text(encoding="utf-8")), inside_function=False)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found = [each for file in python_files() for each in imports_of(file)]
    assert any(each.file == "fastdistill/__init__.py" for each in found)
    return found


def listed(imports: Iterator[Import]) -> list[str]:
    return [str(each) for each in imports]


def test_kernels_import_torch_triton_and_each_other_alone(imports):
    assert not listed(
        each
        for each in imports
        if each.file.startswith("kernels/") and each.root not in KERNELS_MAY_IMPORT and not each.is_kernel
    )


def test_kernels_are_imported_by_the_files_that_know_them_and_inside_functions_alone(imports):
    assert not listed(
        each
        for each in imports
        if each.is_kernel
        and not each.file.startswith(("kernels/", "tests/", "bench/"))
        and not (each.file in KNOW_KERNELS and each.inside_function)
    )


def test_training_libraries_are_imported_by_training_alone(imports):
    assert not listed(
        each
        for each in imports
        if each.root in TRAINING_LIBRARIES
        and not each.file.startswith(("fastdistill/training/", "train.py", "tests/", "bench/"))
    )


@pytest.mark.parametrize("name", ["train", "tests", "bench"])
def test_what_stands_on_the_package_is_imported_by_nothing_outside_itself(imports, name):
    assert not listed(each for each in imports if each.root == name and not each.file.startswith(f"{name}/"))


def test_import_loads_neither_triton_nor_what_only_training_needs():
    program = "import sys, torch; before = set(sys.modules); import fastdistill; print(*set(sys.modules) - before)"
    loaded = run_python(program, cwd=ROOT).stdout.split()
    assert "fastdistill.losses" in loaded
    assert not {module.split(".")[0] for module in loaded} & (TRAINING_LIBRARIES | {"triton"})


def test_a_loss_on_a_cpu_loads_no_compiler():
    program = (
        "import sys, torch, fastdistill; x = torch.ones(2, 3, requires_grad=True);"
        "heads = x, x, x.detach(), x.detach(); losses = fastdistill.linear_softmax_kl(*heads).loss,"
        "fastdistill.linear_softmax_kl(*heads, reduction='none').loss.sum(), fastdistill.softmax_kl(*heads[1:3]).loss,"
        "fastdistill.layer_loss([x], [x.detach()]).loss;"
        "sum(losses).backward();"
        "print(*sys.modules)"
    )
    loaded = run_python(program, cwd=ROOT).stdout.split()
    assert "fastdistill.linear_chunks" in loaded
    assert not {"torch._dynamo", "sympy", "triton"} & set(loaded)


def test_git_holds_the_link_to_the_kernels():
    mode, *_, path = git("ls-files", "--stage", "fastdistill/kernels").split()
    assert (mode, path) == ("120000", "fastdistill/kernels")
    assert git("cat-file", "blob", ":fastdistill/kernels") == "../kernels"


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_train_py_can_be_read_in_one_sitting():
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("left_behind", ["../kernels", None], ids=["text file", "nothing"])
def test_a_lost_link_is_named_with_its_cure(tmp_path, left_behind):
    package = tmp_path / "fastdistill"
    shutil.copytree(ROOT / "fastdistill", package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "kernels").unlink()
    if left_behind is not None:
        (package / "kernels").write_text(left_behind)
    error = run_python("import fastdistill", cwd=tmp_path).stderr.splitlines()[-1]
    assert error.startswith("ImportError: fastdistill/kernels is not a folder")
    assert "link" in error
    assert "git clone" in error
    assert "wheel" in error


def run_python(program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
