"""What is measured at each token, against definitions written out in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastdistill import shift_targets
from fastdistill.training import measures
from fastdistill.training.blocks import Batch, Inputs, Pairs
from fastdistill.training.evaluate import LM
from fastdistill.training.measures import (
    Measures,
    Retention,
    States,
    cross_entropy,
    cross_entropy_and_retention,
    cross_vocab_retention,
)
from fastdistill.training.objective import DistillationModule
from fastdistill.training.pairing import Pairing
from fastdistill.training.teacher import Teacher

N = 11


def states(vocab: int, width: int, *, seed: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> States:
    made = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, width, generator=made).to(dtype) for n in (N, vocab))
    return States(hidden, weight, torch.randn(vocab, generator=made).to(dtype) if bias else None)


def log_probabilities(of: States, first: int | None = None) -> np.ndarray:
    """`[n, V]`, of the first ids."""
    logits = of.hidden.double().numpy() @ of.weight.double().numpy().T
    logits = logits + (0.0 if of.bias is None else of.bias.double().numpy())
    logits = logits[:, :first]
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def by_hand(student: np.ndarray, teacher: np.ndarray) -> dict[str, np.ndarray]:
    """Of log-probabilities of the same events, but for what is said of the most probable."""
    p_s, p_t = np.exp(student), np.exp(teacher)
    return {
        "kl": (p_t * (teacher - student)).sum(1),
        "mass": np.minimum(p_s, p_t).sum(1),
        "teacher_entropy": -(p_t * teacher).sum(1),
    }


def tops(log_p: np.ndarray) -> list[list[int]]:
    return [list(np.argsort(-row)[:5]) for row in log_p]


def assert_retained(found: Retention, expected: dict[str, np.ndarray], ours: list[list], theirs: list[list]) -> None:
    for name, values in expected.items():
        assert getattr(found, name).numpy() == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert found.top1.tolist() == [float(a[0] == b[0]) for a, b in zip(ours, theirs, strict=True)]
    assert found.top5.tolist() == pytest.approx([len(set(a) & set(b)) / 5 for a, b in zip(ours, theirs, strict=True)])


@pytest.mark.parametrize("at_once", [1, 4, 100])
@pytest.mark.parametrize(("bias", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_one_tokenizer(bias, dtype, at_once, monkeypatch):
    """Heads of 40 and 44 ids, of which 37 are compared; at once as many tokens as there is memory for."""
    monkeypatch.setattr(measures, "MAX_CHUNK_BYTES", at_once * measures.BUFFERS * 84 * 4)
    student, teacher = states(40, 6, seed=0, bias=bias), states(44, 8, seed=1, bias=bias, dtype=dtype)
    targets = torch.arange(N) * 3
    loss, found = cross_entropy_and_retention(student, teacher, targets, 37)
    expected = -log_probabilities(student)[np.arange(N), targets.numpy()]
    assert loss.numpy() == pytest.approx(expected, rel=1e-5)
    assert cross_entropy(student, targets).numpy() == pytest.approx(expected, rel=1e-5)
    ours, theirs = (log_probabilities(each, 37) for each in (student, teacher))
    assert_retained(found, by_hand(ours, theirs), tops(ours), tops(theirs))
    assert 0 < found.top5.mean() < 1


def test_a_model_beside_itself_has_kept_all():
    own = states(40, 6, seed=0)
    _, found = cross_entropy_and_retention(own, own, torch.zeros(N, dtype=torch.int64), None)
    assert found.kl.abs().max() < 1e-6
    assert found.top1.tolist() == found.top5.tolist() == [1.0] * N
    assert found.mass.numpy() == pytest.approx(1)


@pytest.mark.parametrize("shared", [25, 40])
def test_two_tokenizers(shared):
    """Some strings in both, or all of the student's: each of these is an event, and the others are one."""
    student, teacher = states(40, 6, seed=0), states(52, 8, seed=1)
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:shared], torch.arange(shared) * 52 // shared
    found = cross_vocab_retention(student, teacher, ids)

    def events(of: States, own: Tensor) -> np.ndarray:
        p = np.exp(log_probabilities(of))
        known = p[:, own.numpy()]
        if shared == 40:
            return np.log(known / known.sum(1, keepdims=True))
        return np.log(np.concatenate([known, 1 - known.sum(1, keepdims=True)], 1))

    strings = dict(zip(ids[0].tolist(), ids[1].tolist(), strict=True))
    ours = [[strings.get(i, f"student's {i}") for i in row] for row in tops(log_probabilities(student))]
    theirs = tops(log_probabilities(teacher))
    assert_retained(found, by_hand(events(student, ids[0]), events(teacher, ids[1])), ours, theirs)
    assert found.top5.sum() > 0


def test_two_models_are_compared_at_the_positions_that_are_paired():
    """Of models that transformers runs, at positions of different numbers."""
    torch.manual_seed(0)
    models = [
        GPT2LMHeadModel(GPT2Config(vocab_size=v, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
        for v in (40, 52)
    ]
    ids = [torch.randint(v, (2, 7)) for v in (40, 52)]
    pairs = Pairs(*(torch.tensor(index) for index in ([0, 0, 1], [1, 4, 2], [2, 6, 5])))
    shared = torch.arange(25), torch.arange(25)
    pairing = Pairing((), "", shared_ids=shared, text_bytes=(torch.arange(40), torch.arange(52)))
    mask = torch.ones(2, 7, dtype=torch.bool)
    batch = Batch(Inputs(ids[0], None), mask, shift_targets(ids[0]), Inputs(ids[1], None), pairs)
    with torch.no_grad():
        found = DistillationModule(models[0], LM, pairing=pairing).measure(batch, Teacher(models[1])(batch.teacher))
        logits = [model(input_ids=own).logits for model, own in zip(models, ids, strict=True)]
    by_itself = States(torch.eye(40)[:0], torch.eye(40), None)
    expected = cross_vocab_retention(
        by_itself._replace(hidden=logits[0][pairs.row, pairs.student]),
        States(logits[1][pairs.row, pairs.teacher], torch.eye(52), None),
        shared,
    )
    assert found.retention is not None
    for name in Retention._fields:
        torch.testing.assert_close(getattr(found.retention, name), getattr(expected, name))
    assert found.compared_place is not None
    assert found.compared_place.tolist() == [1, 4, 2]
    loss = torch.nn.functional.cross_entropy(logits[0][:, :-1].flatten(0, 1), ids[0][:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found.loss, loss)
    assert found.place.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert found.text_bytes is not None
    assert found.text_bytes.tolist() == ids[0][:, 1:].flatten().tolist()


def test_no_token_is_measured_as_nothing():
    student = states(40, 6, seed=0)
    none = student._replace(hidden=student.hidden[:0])
    loss, found = cross_entropy_and_retention(none, none, torch.zeros(0, dtype=torch.int64), None)
    assert loss.shape == found.kl.shape == (0,)
    assert Measures(loss, loss, None, found, loss).sums().tolist() == [0.0] * measures.SUMS


def test_sums_are_of_what_there_is():
    one = torch.ones(3)
    alone = Measures(2 * one, one, None, None, None)
    assert alone.sums().tolist() == [6, 3, 0, 0, 0, 0, 0, 0, 0]
    retained = Retention(*(number * torch.ones(2) for number in range(1, 6)))
    assert Measures(2 * one, one, 4 * one, retained, torch.ones(2)).sums().tolist() == [6, 3, 12, 2, 2, 4, 6, 8, 10]


def test_a_place_is_counted_in_what_the_model_has_read():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert Inputs(ids, None).places().tolist() == [[0, 1, 2, 3]]
    assert Inputs(ids, torch.tensor([[0, 1, 0, 1]])).places().tolist() == [[0, 1, 0, 1]]
    assert Inputs(ids, None, torch.tensor([[0, 1, 1, 1]])).places().tolist() == [[-1, 0, 1, 2]]
