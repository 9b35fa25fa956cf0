"""Student and teacher of different tokenizers: each reads its own ids, and they are compared where they have read the
same text.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fastdistill.training.blocks import collate, cut
from fastdistill.training.config import COMPONENTS, Config, UsageError
from fastdistill.training.demo import train_tokenizer
from fastdistill.training.engine import make_optimizer
from fastdistill.training.evaluate import evaluate
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.pairing import Pairing, describe, pair
from fastdistill.training.run_files import read_log
from fastdistill.training.teacher import Teacher
from fastdistill.training.tokens import Tokens, tokenize

CPU = torch.device("cpu")
STAGE = Path("seed-0/distilled")


def model(vocab_size: int, *, layers: int = 2, positions: int = 16, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_layer": layers, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **shape)).eval()


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory, text_file) -> Path:
    """A student whose tokenizer cuts more finely than the teacher's."""
    path = tmp_path_factory.mktemp("models") / "student"
    model(280, positions=32).save_pretrained(path)
    train_tokenizer(text_file.read_text().split("\n\n"), 280).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"align": "cut"},
        {"cross_vocab": "sorted"},
        {"packing": "padded"},
        {"layerwise_weight": 0.5, "layerwise_skip_first": 1},
        {f"{name}_weight": 0.1 for name in COMPONENTS[2:]},
    ],
)
def test_it_trains_evaluates_and_reports(run, student_folder, capsys, how):
    folder = run(student=student_folder, baseline=True, lr=1e-3, **{"layerwise_weight": 0.0} | how)
    out = capsys.readouterr().out
    assert re.search(
        r"two tokenizers \(280 and 300 ids; 280 strings in both\): \d+\.\d% of positions are compared", out
    )
    records = [record for record in read_log(folder / STAGE / "log.jsonl") if record["event"] == "train"]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert all(math.isfinite(record["total"]) for record in records)
    assert all(part["raw"] > 0 for record in records for part in record["components"].values())
    others = {name.removesuffix("_weight") for name in how if name.endswith("_weight")}
    others |= {"load_balance"} if "routing_feature" in others else set()
    assert set(records[0]["components"]) == {"kd", "lm"} | others
    results = json.loads((folder / "results.json").read_text())["rows"]
    teacher, untrained, *_, last = (row["evaluation"] for row in results)
    assert last["loss"] < untrained["loss"]
    assert 0 < last["compared"] < last["tokens"]
    # Tokens of another length: nats a token differ where bits a byte do not.
    for row in (teacher, untrained):
        nats = row["loss"] * row["tokens"]
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes(folder), rel=0.02)
    report = (folder / "report.md").read_text()
    assert "| bits per byte |" in report
    assert "different tokenizers" in report
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert student.config.vocab_size == 280


def text_bytes(folder: Path) -> int:
    """Of the held-out text: every tenth paragraph of the file."""
    file = json.loads((folder / "config.json").read_text())["data"]
    return sum(len(paragraph.encode()) for paragraph in Path(file).read_text().split("\n\n")[::10])


def test_a_resumed_run_is_the_run_that_never_stopped(run, student_folder):
    flags = {"student": student_folder, "layerwise_skip_first": 1, "baseline": False}
    whole = run("whole", **flags)
    run("stopped", stop_at=3, **flags)
    stopped = run("stopped", resume=True)
    assert (whole / STAGE / "result.json").read_text() == (stopped / STAGE / "result.json").read_text()


def test_the_divergence_is_that_of_whole_softmaxes_at_the_same_text(text_file):
    texts = text_file.read_text().split("\n\n")[:3]
    tokenizers = [train_tokenizer(text_file.read_text().split("\n\n"), size) for size in (280, 300)]
    pairing = pair(tokenizers[0], tokenizers[1], Config(), CPU)
    blocks = cut(tuple(tokenize(texts, each, with_ends=True) for each in tokenizers), 16, "padded")
    batch = collate([blocks[i] for i in range(len(blocks))], CPU)
    student, teacher = model(280), Teacher(model(300, layers=3, seed=1))
    module = DistillationModule(student, Weights(kd=0.7, lm=0.3, layerwise=0), temperature=2.0, pairing=pairing)
    losses = module(batch, teacher(batch.teacher), module.count([batch]))

    with torch.no_grad():
        p_s = (student(input_ids=batch.student.input_ids).logits / 2).softmax(-1)
        p_t = (teacher.model(input_ids=batch.teacher.input_ids).logits / 2).softmax(-1)
    pieces = [tokenizer.get_vocab() for tokenizer in tokenizers]
    both = torch.tensor([(i, pieces[1][piece]) for piece, i in pieces[0].items() if piece in pieces[1]])
    assert len(both) == len(pieces[0]) < len(pieces[1])
    expected, compared = 0.0, 0
    for row in range(len(batch.mask)):
        for i in range(int(batch.mask[row].sum()) - 1):
            read = tokenizers[0].decode(batch.student.input_ids[row, : i + 1])
            for j in range(batch.teacher.input_ids.shape[1]):
                if tokenizers[1].decode(batch.teacher.input_ids[row, : j + 1]) != read:
                    continue
                # The student has no string that the teacher lacks: over these strings alone, then.
                ours, theirs = p_s[row, i][both[:, 0]], p_t[row, j][both[:, 1]]
                ours, theirs = ours / ours.sum(), theirs / theirs.sum()
                expected += float((theirs * (theirs / ours).log()).sum())
                compared += 1
    counts = module.count([batch])
    assert 20 < compared == int(counts["kd"]) < int(counts["lm"])
    torch.testing.assert_close(losses.raw["kd"].item(), 4 * expected / compared, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.total, 0.7 * losses.raw["kd"] + 0.3 * losses.raw["lm"])


@pytest.mark.parametrize("align", ["bytes", "cut"])
def test_what_is_evaluated_is_what_is_trained(text_file, align):
    texts = text_file.read_text().split("\n\n")
    tokenizers = [train_tokenizer(texts, size) for size in (280, 300)]
    pairing = pair(tokenizers[0], tokenizers[1], Config(align=align), CPU)
    blocks = cut(tuple(tokenize(texts[:3], each, with_ends=True) for each in tokenizers), 16, "padded")
    batch = collate([blocks[i] for i in range(len(blocks))], CPU, align=align)
    student, teacher = model(280), Teacher(model(300, layers=3, seed=1))
    module = DistillationModule(student, Weights(kd=1.0, lm=0, layerwise=0), pairing=pairing)
    trained = module(batch, teacher(batch.teacher), module.count([batch])).raw["kd"].item()
    assert evaluate(student, blocks, pairing, batch_size=4, teacher=teacher).kl == pytest.approx(trained, rel=1e-4)


def test_of_tokenizers_that_differ_in_added_tokens_the_smaller_cuts_the_text(text_file):
    texts = text_file.read_text().split("\n\n")
    small, large = train_tokenizer(texts, 280), train_tokenizer(texts, 280)
    large.add_tokens(["<think>"])
    for student, teacher in ((small, large), (large, small)):
        pairing = pair(student, teacher, Config(), CPU)
        assert pairing.tokenizers == (small,)
        assert pairing.vocab_size == 280


def test_168_against_160_positions_train_and_are_evaluated():
    """The founding run's lengths: eight of the student's tokens end where none of the teacher's does."""
    torch.manual_seed(0)
    ends = torch.arange(1, 169).repeat(3)
    starts = torch.arange(0, 3 * 168 + 1, 168)
    other = torch.cat([torch.arange(1, 153), torch.arange(154, 169, 2)])  # 152 + 8
    document = torch.arange(3)[:, None] * 168
    sides = (
        Tokens(torch.randint(60, (3 * 168,), dtype=torch.int32), starts, (ends.view(3, -1) + document).flatten(), None),
        Tokens(
            torch.randint(50, (480,), dtype=torch.int32), torch.arange(0, 481, 160), (other + document).flatten(), None
        ),
    )
    blocks = cut(sides, 168, "padded")
    ids = torch.arange(40)
    pairing = Pairing((), "made up", shared_ids=(ids, ids + 5))
    batch = collate([blocks[i] for i in range(3)], CPU)
    assert batch.student.input_ids.shape == (3, 168)
    assert batch.teacher.input_ids.shape == (3, 160)
    assert batch.pairs is not None
    assert len(batch.pairs.row) == 3 * (160 - 1)  # the last position predicts nothing

    student, teacher = model(60, positions=168), Teacher(model(50, positions=160, layers=3, seed=1))
    before = evaluate(student, blocks, pairing, batch_size=2, teacher=teacher)
    module = DistillationModule(student, Weights(kd=1.0, lm=0.1, layerwise=0), pairing=pairing)
    optimizer = make_optimizer(module, Config(lr=1e-2))
    for _ in range(10):
        module(batch, teacher(batch.teacher), module.count([batch])).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate(student, blocks, pairing, batch_size=2, teacher=teacher)
    assert before.compared == after.compared == 3 * 159
    assert after.kl is not None
    assert before.kl is not None
    assert after.kl < 0.5 * before.kl


def test_the_teacher_on_its_own_ids_is_the_model_run_alone(text_file):
    """Bit for bit, whatever company its ids keep."""
    texts = text_file.read_text().split("\n\n")[:4]
    tokenizers = [train_tokenizer(text_file.read_text().split("\n\n"), size) for size in (340, 300)]
    blocks = cut(tuple(tokenize(texts, each, with_ends=True) for each in tokenizers), 16, "padded")
    batch = collate([blocks[i] for i in range(4)], CPU)
    network = model(300)
    teacher = Teacher(network)
    states = teacher(batch.teacher)
    alone = tokenizers[1](texts[0], add_special_tokens=False)["input_ids"][: batch.teacher.input_ids.shape[1]]
    assert batch.teacher.input_ids[0, : len(alone)].tolist()[:8] == alone[:8]
    with torch.no_grad():
        assert torch.equal(F.linear(states.hidden, states.weight), network(input_ids=batch.teacher.input_ids).logits)


def test_little_in_common_is_warned_of(text_file):
    texts = text_file.read_text().split("\n\n")[:4]
    tokenizers = [train_tokenizer(text_file.read_text().split("\n\n"), size) for size in (340, 257)]
    blocks = cut(tuple(tokenize(texts, each, with_ends=True) for each in tokenizers), 16, "padded")
    pairing = pair(tokenizers[0], tokenizers[1], Config(), CPU)
    assert "100.0% of positions are compared" in describe(pairing, blocks)  # bytes end wherever words do
    sparse = Tokens(blocks.sides[1].ids, blocks.sides[1].starts, torch.full_like(blocks.sides[1].ids, -1).long(), None)
    few = describe(pairing, type(blocks)((blocks.sides[0], sparse), blocks.spans, "padded"))
    assert "0.0% of positions are compared" in few
    assert "warning: below 20%" in few


def test_a_divergence_that_sorted_probabilities_do_not_know_is_refused(run, student_folder, capsys):
    run(student=student_folder, layerwise_weight=0.0, cross_vocab="sorted", divergence="jsd", expect=2)
    assert "--divergence jsd is for --cross-vocab shared" in capsys.readouterr().err


def test_tokenizers_without_a_string_in_common_are_refused(monkeypatch, text_file):
    tokenizers = [train_tokenizer(text_file.read_text().split("\n\n"), size) for size in (340, 300)]
    monkeypatch.setattr("fastdistill.training.pairing.token_strings", lambda tokenizer: [None] * len(tokenizer))
    with pytest.raises(UsageError, match="the two tokenizers share no string"):
        pair(tokenizers[0], tokenizers[1], Config(), CPU)
