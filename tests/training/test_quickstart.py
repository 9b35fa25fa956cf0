"""The commands of docs/quickstart.md and of the Kaggle notebook are those that the programs take."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import fastdistill.__main__
from fastdistill.training.command_line import parse
from fastdistill.training.config import Config
from fastdistill.training.demo import train_tokenizer, untrained_teacher
from fastdistill.training.wheels import install_line

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "docs" / "kaggle.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]

COMMANDS = {
    "quickstart.md": [line for block in re.findall(r"```\n(.*?)```", PAGE, re.S) for line in block.splitlines()],
    "kaggle.ipynb": [line[1:] for cell in CELLS for line in cell.splitlines() if line.startswith("!")],
}
LAUNCHERS = r"(?:python|torchrun --nproc-per-node \d+|accelerate launch --num_processes \d+)"


@pytest.mark.parametrize("source", COMMANDS)
def test_every_command_is_one_that_the_programs_take(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_train, of_library = 0, 0
    for line in COMMANDS[source]:
        if found := re.fullmatch(rf"{LAUNCHERS} train\.py(.*)", line):
            config = parse(shlex.split(found[1]))
            of_train += 1
            if config.output_dir and not config.resume:  # for the line that goes on with it
                Path(config.output_dir).mkdir(parents=True, exist_ok=True)
                Path(config.output_dir, "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        elif found := re.fullmatch(r"(?:python -m )?fastdistill (.*)", line):
            fastdistill.__main__.make_parser().parse_args(shlex.split(found[1]))
            of_library += 1
        else:
            assert "train.py" not in line
            assert not line.startswith("fastdistill ")
    assert (of_train, of_library) == {"quickstart.md": (7, 6), "kaggle.ipynb": (3, 1)}[source]


def test_the_line_for_a_p100_is_doctors():
    assert install_line((6, 0), 570) in COMMANDS["quickstart.md"]


def test_two_processes_make_the_steps_of_the_preset():
    for line in [*COMMANDS["quickstart.md"], *COMMANDS["kaggle.ipynb"]]:
        if found := re.fullmatch(r".* (\d+) train\.py( --preset .*)", line):
            config = parse(shlex.split(found[2]))
            preset = parse(["--preset", str(config.preset)])
            assert int(found[1]) * config.batch_size * config.grad_accum == preset.batch_size * preset.grad_accum


def test_the_notebook_is_one():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert set(NOTEBOOK) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    common = {"cell_type", "id", "metadata", "source"}
    of_kind = {"markdown": common, "code": common | {"execution_count", "outputs"}}
    for cell in NOTEBOOK["cells"]:
        assert set(cell) == of_kind[cell["cell_type"]]
        assert all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in CELLS:
        ast.parse("\n".join("" if line[:1] in ("!", "%") else line for line in cell.splitlines()))


def test_both_say_what_was_never_run():
    assert "has not been run on Kaggle by us yet" in "".join(NOTEBOOK["cells"][0]["source"])
    assert "No GPU part of this page has been run by us yet" in PAGE


def test_the_cell_that_loads_the_student_loads_one(tmp_path, monkeypatch, capsys):
    config = Config(teacher_depth=2, teacher_width=32, vocab_size=300)
    tokenizer = train_tokenizer(["The value of a name is what it is bound to."] * 3, 300)
    torch.manual_seed(0)
    folder = tmp_path / "runs" / "demo" / "student"
    untrained_teacher(tokenizer, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    (cell,) = [cell for cell in CELLS if "AutoModelForCausalLM" in cell]
    exec(compile(cell, "cell", "exec"), {})
    assert capsys.readouterr().out.startswith("The value of")
