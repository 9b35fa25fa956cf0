"""`fastdistill evaluate` against definitions by plain transformers, row by row in float64; its files and mistakes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdistill.training import footprint, panel_report
from fastdistill.training.demo import train_tokenizer
from fastdistill.training.footprint import Footprint
from fastdistill.training.loading import load
from fastdistill.training.memory import most_allocated
from fastdistill.training.panel import Comparison, Settings, buckets, compare, text
from fastdistill.training.student import build_student, kept_layers
from tests.training.by_hand import means_by_hand

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """Speeds are not what these tests look at, but for one."""
    monkeypatch.setattr("fastdistill.training.panel.footprint", lambda *_: Footprint(1, 4, 2.0, 1.0, 8))


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory, teacher_folder) -> Path:
    """Two of the teacher's layers, a little moved."""
    teacher, tokenizer = load(str(teacher_folder))
    student = build_student(teacher, kept_layers("every-other", 4))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("models") / "student"
    student.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "short.txt").write_text("\n\n".join(f"the model reads {n}" for n in range(20)))
    return path


@pytest.fixture(scope="module")
def other_tokenizer_folder(tmp_path_factory, student_folder, text_file) -> Path:
    """The student with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("models") / "other"
    student, _ = load(str(student_folder))
    tokenizer = train_tokenizer(text_file.read_text().split("\n\n"), 280)
    student.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def compared(student_folder, teacher_folder, text_file):
    def call(**settings: Any) -> Comparison:
        given: dict[str, Any] = {"student": str(student_folder), "teacher": str(teacher_folder), "data": str(text_file)}
        given |= {"batch_size": 3, "packing": "stream"} | settings
        return compare(Settings(**given), CPU)

    return call


@pytest.mark.parametrize("stride", [None, 5, 1])
def test_it_is_what_plain_transformers_gives(compared, student_folder, teacher_folder, stride):
    found = compared(seq_len=16, stride=stride, part="all", max_characters=900)
    (teacher, student), (documents, _) = found.panels, text(found.settings)
    by_hand = means_by_hand(student_folder, teacher_folder, documents, 16, stride or 15)
    assert found.documents == len(documents) > 2
    assert student.evaluation.tokens == student.evaluation.compared == by_hand["tokens"] == found.tokens
    for name in ("loss", "kl", "top1_agreement", "top5_overlap", "shared_mass"):
        assert getattr(student.evaluation, name) == pytest.approx(by_hand[name], rel=1e-4), name
    nats = by_hand["loss"] * by_hand["tokens"]
    words = sum(len(document.split()) for document in documents)
    assert student.word_perplexity == pytest.approx(math.exp(nats / words), rel=1e-3)
    assert student.evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / by_hand["text_bytes"], rel=1e-4)
    assert teacher.evaluation.kl == pytest.approx(0, abs=1e-6)
    assert teacher.evaluation.top1_agreement == teacher.evaluation.top5_overlap == 1
    assert teacher.evaluation.shared_mass == pytest.approx(1)


@pytest.mark.parametrize(("packing", "stride"), [("documents", 1), ("padded", None)])
def test_documents_by_themselves_have_the_loss_of_plain_transformers(compared, student_folder, packing, stride):
    """Documents that fit in a row, each token predicted from all before it."""
    how = {"packing": packing, "stride": stride, "part": "all", "max_characters": 60}
    found = compared(data=str(student_folder / "short.txt"), **how)
    documents, _ = text(found.settings)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(student_folder),
        AutoModelForCausalLM.from_pretrained(student_folder),
    )
    losses = []
    for document in documents:
        ids = torch.tensor([[*tokenizer(document)["input_ids"], tokenizer.eos_token_id]])
        losses.append((float(model.eval()(input_ids=ids, labels=ids).loss), ids.shape[1] - 1))
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found.panels[-1].evaluation.loss == pytest.approx(mean, rel=1e-5)


def test_buckets_hold_every_token_once(compared):
    teacher, student = compared(seq_len=16).panels
    for panel in (teacher, student):
        for found in (panel.by_place, panel.by_entropy):
            assert sum(bucket.tokens for bucket in found) == panel.evaluation.tokens
            assert sum(bucket.compared for bucket in found) == panel.evaluation.compared
            for name, count in (("loss", "tokens"), ("kl", "compared"), ("top1_agreement", "compared")):
                mean = sum(getattr(b, name) * getattr(b, count) for b in found) / panel.evaluation.tokens
                assert mean == pytest.approx(getattr(panel.evaluation, name), rel=1e-5, abs=1e-7)
    assert [(b.low, b.high) for b in student.by_place] == [(0, 1), (1, 4), (4, 16)]


def test_buckets_are_half_open():
    key, values = torch.tensor([0.0, 1.0, 1.5, 2.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    found = buckets((0, 1, 2, 3, 4), (key, values))
    assert [(b.low, b.tokens, b.loss, b.compared, b.kl) for b in found] == [
        (0, 1, 1.0, 0, None),
        (1, 2, 3.0, 0, None),
        (2, 1, 8.0, 0, None),
    ]


def test_the_gap_is_between_the_untrained_student_and_the_teacher(compared, student_folder, teacher_folder):
    both = (student_folder, teacher_folder)
    losses = {folder: compared(student=str(folder), teacher=None).panels[0].evaluation.loss for folder in both}
    better, worse = sorted(both, key=losses.__getitem__)
    found = compared(untrained=str(worse), student=str(better), teacher=str(better))
    assert [panel.name for panel in found.panels] == ["teacher", "untrained student", "student"]
    assert panel_report.closed_gaps(found) == pytest.approx([1.0, 0.0, 1.0])
    assert panel_report.closed_gaps(compared()) == [None, None]


def test_two_tokenizers_are_compared_where_both_have_read_the_same(compared, other_tokenizer_folder, teacher_folder):
    found = compared(student=str(other_tokenizer_folder), seq_len=16)
    teacher, student = found.panels
    alone = compared(student=str(other_tokenizer_folder), teacher=None, seq_len=16).panels[0]
    assert student.evaluation.compared is not None
    assert 0 < student.evaluation.compared < student.evaluation.tokens
    assert sum(b.compared for b in student.by_entropy) == student.evaluation.compared
    assert student.evaluation.loss == pytest.approx(alone.evaluation.loss, rel=0.02)  # rows are cut elsewhere
    assert teacher.evaluation.tokens != student.evaluation.tokens
    assert teacher.evaluation.kl == pytest.approx(0, abs=1e-6)
    assert panel_report.closed_gaps(found) == [None, None]


def test_a_student_alone_needs_no_teacher(compared):
    (student,) = compared(teacher=None).panels
    assert student.evaluation.kl is None
    assert student.by_entropy == []
    assert student.evaluation.bits_per_byte is not None


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_tasks_of_the_harness_are_scored(student_folder, text_file, tmp_path, capsys):
    """A task of one's own, whose answer is the continuation that the model holds more probable."""
    rows = [{"query": "the student", "choices": [" reads", " of"], "gold": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        f"task: own_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{query}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    arguments = [str(student_folder), "--data", str(text_file), "--tasks", "own_task", "--tasks-folder", str(tmp_path)]
    assert panel_report.main(arguments) == 0
    assert "| own_task, acc | 0.5000" in capsys.readouterr().out
    assert panel_report.main([*arguments[:3], "--tasks", "no_such_task"]) == 2
    assert "lm-evaluation-harness knows no task no_such_task" in capsys.readouterr().err


def test_without_the_harness_its_tasks_are_refused(student_folder, text_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert panel_report.main([str(student_folder), "--data", str(text_file), "--tasks", "hellaswag"]) == 2
    assert "--tasks needs lm-evaluation-harness" in capsys.readouterr().err


def test_files_and_the_printed_page_have_the_numbers(student_folder, teacher_folder, text_file, tmp_path, capsys):
    output = tmp_path / "of it"
    arguments = [
        str(student_folder),
        "--teacher",
        str(teacher_folder),
        "--data",
        str(text_file),
        "--output",
        str(output),
    ]
    assert panel_report.main([*arguments, "--untrained", str(student_folder)]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((output / "evaluation.json").read_text())
    assert [panel["name"] for panel in numbers["panels"]] == ["teacher", "untrained student", "student"]
    for panel in numbers["panels"]:
        e = panel["evaluation"]
        assert panel["perplexity"] == math.exp(e["loss"])
        for shown in (f"{e['loss']:.4f}", f"{panel['perplexity']:.3f}", f"{e['kl']:.4f}", f"{e['shared_mass']:.1%}"):
            assert shown in printed
    assert numbers["panels"][0]["by_place"][-1]["high"] in ("Infinity", 16)
    assert (output / "evaluation.md").read_text() in printed
    html = (output / "evaluation.html").read_text()
    assert html.count("<img") == 4
    assert "<td>max_characters</td>" in html
    for name in ("by-place", "by-entropy"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seq-len", "99"], "--seq-len 99 is more than the 16 positions of the student"),
        (["--seq-len", "1"], "--seq-len must be at least 2"),
        (["--seq-len", "8", "--stride", "8"], "--stride must be less than the 8 tokens of a row, got 8"),
        (["--stride", "0"], "--stride must be at least 1, got 0"),
        (["--untrained", "x"], "--untrained says how much of the gap to a teacher was closed: give --teacher too"),
        (["--task-limit", "3"], "--tasks-folder and --task-limit are about --tasks, which is not given"),
        (["--part", "some"], "--part must be one of held-out, all, got 'some'"),
        (["--teacher", "absent"], "cannot load the model absent"),
        (["--data", "absent.txt"], "--data absent.txt: No such file or directory"),
        (["--strde", "3"], "unknown argument --strde: did you mean --stride?"),
        (["--output", "/dev/null/x"], "[Errno 20] Not a directory: '/dev/null/x'"),
    ],
)
def test_a_mistake_is_one_line(student_folder, text_file, capsys, flags, message):
    assert panel_report.main([str(student_folder), "--data", str(text_file), *flags]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith(f"fastdistill evaluate: {message}")


def test_a_footprint_is_that_of_the_model(student_folder):
    model, _ = load(str(student_folder))
    found = footprint.footprint(model, 2, 16)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weight_bytes == 4 * found.parameters
    assert found.read_per_second > 0
    assert found.written_per_second > 0
    states = 2 * 16 * 32 * 4
    assert 4 * states < found.peak_bytes < 100 * states
    assert not model.training


def test_memory_is_what_is_alive_at_once():
    def run() -> None:
        for _ in range(3):
            torch.ones(1_000_000)

    assert most_allocated(run, CPU) == pytest.approx(4_000_000, rel=0.01)
