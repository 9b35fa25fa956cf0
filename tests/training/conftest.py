"""A tiny teacher with dropout on a tiny text, and train.py loaded as the program it is."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test may wait for a network

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from fastdistill.training.demo import train_tokenizer
from fastdistill.training.stage import Result

ROOT = Path(__file__).resolve().parents[2]
STAGE = Path("seed-0/distilled")
SEQ_LEN = 16


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    """No test finds what another run kept, or leaves anything in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def train_py() -> ModuleType:
    """train.py, which nothing imports."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty paragraphs of words that follow each other more often than by chance."""
    text = "the a student teacher loss learns from reads token next model small large of and"
    words = text.split()
    choose = random.Random(0)
    paragraphs = [" ".join(choose.choice(words[i % 5 :]) for i in range(60)) + "." for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, text_file) -> Path:
    """A saved GPT-2 of four layers; its dropout makes an unrestored random generator show."""
    tokenizer = train_tokenizer(text_file.read_text().split("\n\n"), 300)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=SEQ_LEN, n_embd=32, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "teacher"
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smooth_teacher(teacher_folder, tmp_path_factory) -> Path:
    """The same teacher without dropout."""
    path = tmp_path_factory.mktemp("models") / "smooth"
    shutil.copytree(teacher_folder, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def arguments(teacher_folder, text_file, tmp_path) -> Callable[..., list[str]]:
    """The command line of a run `name` of the tiny teacher, with more flags."""

    def make(name: str = "run", **flags: object) -> list[str]:
        settings: dict[str, object] = {
            "teacher": teacher_folder, "data": text_file, "seq_len": SEQ_LEN, "batch_size": 4, "max_steps": 6,
            "lr": 1e-2, "warmup_steps": 2, "layerwise_weight": 0.5, "data_share": 1.0, "log_steps": 1, "eval_steps": 3,
            "save_steps": 2, "precision": "fp32", "baseline": False, "student_layers": "every-other",
            "tensorboard": False,
        }  # fmt: skip
        settings = ({} if flags.get("resume") else settings) | {"output_dir": tmp_path / name, **flags}
        parts = []
        for key, value in settings.items():
            flag = key.replace("_", "-")
            parts += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        return parts

    return make


@pytest.fixture
def run(train_py, arguments, tmp_path) -> Callable[..., Path]:
    """Run train.py here; its exit code must be `expect`. Returns the run's folder."""

    def call(name: str = "run", expect: int = 0, **flags: object) -> Path:
        assert train_py.main(arguments(name, **flags)) == expect
        return tmp_path / name

    return call


@pytest.fixture
def records() -> Callable[[Path], list[dict]]:
    """All records of a log, but for times and memory, which no two runs share."""
    own = {"tokens_per_second", "seconds", "elapsed", "peak_memory_bytes"}

    def read(log: Path) -> list[dict]:
        parsed = [json.loads(line) for line in log.read_text().splitlines()]
        return [{key: value for key, value in record.items() if key not in own} for record in parsed]

    return read


@pytest.fixture
def assert_same_run(records) -> Callable[[Path, Path], None]:
    """Bit for bit: every logged number, both kept models and the result."""

    def check(one: Path, other: Path) -> None:
        logs = [
            [record for record in records(each / STAGE / "log.jsonl") if "checkpoint" not in record.get("message", "")]
            for each in (one, other)
        ]
        assert logs[0] == logs[1]
        assert (one / STAGE / "result.json").read_text() == (other / STAGE / "result.json").read_text()
        best = Result.read(one / STAGE)
        assert best is not None
        for name in ("last", f"best-{best.best_step:08d}"):
            a, b = (load_file(each / STAGE / name / "model.safetensors") for each in (one, other))
            assert a.keys() == b.keys()
            assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())

    return check
