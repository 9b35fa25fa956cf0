"""The page on the layerwise loss shows what was kept, which can be drawn; the measures are right on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import layerwise
from fastdistill import layer_loss, linear_softmax_kl, shift_targets
from fastdistill.training.models import parts
from fastdistill.training.student import build_student

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "layerwise.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs" / "layerwise.json").read_text(encoding="utf-8"))
IDS = torch.arange(1, 25).reshape(2, 12)
LAYERS = [1, 3]


@pytest.fixture(scope="module")
def models():
    """A random teacher of four layers of width 16, and a student of two of them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return teacher, build_student(teacher, LAYERS)


@pytest.fixture(scope="module")
def pair(models):
    teacher, student = models
    return layerwise.states(student, range(2), IDS), layerwise.states(teacher, LAYERS, IDS)


def test_the_tables_are_those_of_the_kept_numbers_in_their_order():
    tables = layerwise.table(RESULTS).split("\n\n")
    places = [PAGE.find(table) for table in tables]
    assert -1 not in places
    assert places == sorted(places)


def test_figures_in_the_prose_stand_in_the_tables():
    """Those with a decimal or a thousands separator; what is quoted from the post-mortem is its own."""
    lines = [line for line in PAGE.splitlines() if not line.startswith((">", "|", "`"))]
    prose = re.sub(r'"[^"]*"|`[^`]*`|\]\([^)]*\)', "", "\n".join(lines))
    figures = re.findall(r"\d[\d,]*[.,]\d+", prose)
    assert len(figures) >= 9
    cells = re.findall(r"\d[\d,]*[.,]\d+", layerwise.table(RESULTS))
    assert [figure for figure in figures if figure not in cells] == []


def test_the_kept_numbers_are_drawn(tmp_path):
    layerwise.draw(RESULTS, tmp_path / "layerwise.png")
    assert (tmp_path / "layerwise.png").stat().st_size > 10_000


def test_windows_are_pieces_of_different_topics_and_the_same_each_time():
    def characters(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}

    tokenizer: Any = characters
    names, ids = layerwise.windows(tokenizer, 5, 200)
    assert len(set(names)) == 5
    for name, row in zip(names, ids.tolist(), strict=True):
        assert len(row) == 200
        assert "".join(map(chr, row)) in topics[name]
    assert torch.equal(layerwise.windows(tokenizer, 5, 200)[1], ids)


def test_the_three_formulas_are_one_mean_of_squares(pair):
    by_hand = [float((s.double() - t.double()).square().sum() / (2 * 12 * 16)) for s, t in zip(*pair, strict=True)]
    measured = layerwise.formulas(*pair)
    assert list(measured) == ["layer_loss", "mse_loss", "sum / (B S D)"]
    for errors in measured.values():
        assert errors == pytest.approx(by_hand, rel=1e-5)


def test_the_parts_of_the_raw_error_at_position_0_and_elsewhere_make_the_whole(pair):
    measured = layerwise.forms(*pair)
    by_hand = [float((s - t)[:, 0].square().mean()) for s, t in zip(*pair, strict=True)]
    assert measured[layerwise.POSITION_0] == pytest.approx(by_hand, rel=1e-5)
    whole = zip(by_hand, measured["raw, position 0 out"], strict=True)
    assert measured["raw"] == pytest.approx([(first + 11 * others) / 12 for first, others in whole], rel=1e-5)


def test_half_of_layer_norm_is_one_minus_correlation(pair):
    (student, *_), (teacher, *_) = pair
    tokens = zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
    correlations = [torch.corrcoef(torch.stack(both))[0, 1] for both in tokens]
    expected = 1 - float(torch.stack(correlations).mean())
    assert layerwise.forms(*pair)["layer_norm"][0] / 2 == pytest.approx(expected, rel=1e-4)


def test_activations_of_a_block_by_hand():
    state = torch.ones(2, 3, 4)
    state[1, 0, 2] = -5.0
    found = layerwise.activations(state)
    assert (found["largest"], found["position"], found["channel"]) == (5.0, 0, 2)
    assert found["largest, position 0 out"] == found["largest at position 0, least of windows"] == 1
    assert found["mean square"] == 48 / 24
    assert found["mean square, position 0 out"] == 1
    assert found["share of position 0"] == pytest.approx(32 / 48)
    assert found["share of channel"] == pytest.approx(30 / 48)


def test_states_at_text_do_not_know_of_the_padding_after_it(models, pair):
    rows, mask = layerwise.padded(IDS, 20, 0)
    assert rows.shape == mask.shape == (2, 20)
    assert rows[:, 12:].eq(0).all()
    assert torch.equal(mask.sum(1), torch.tensor([12, 12]))
    teacher, student = models
    ours, theirs = layerwise.states(student, range(2), rows, mask), layerwise.states(teacher, LAYERS, rows, mask)
    torch.testing.assert_close(ours[1][:, :12], pair[0][1], rtol=1e-4, atol=1e-4)
    assert layer_loss(ours, theirs, mask).per_layer.tolist() == pytest.approx(layerwise.forms(*pair)["raw"], rel=1e-4)


def test_gradients_are_those_of_the_mean_over_windows(models):
    teacher, student = models
    found = layerwise.gradients(student, teacher, LAYERS, IDS)
    hidden = parts(student).base(input_ids=IDS).last_hidden_state
    weight = parts(student).head.weight
    loss = linear_softmax_kl(hidden, weight, None, None, shift_targets(IDS), kl_weight=0.0, ce_weight=1.0).loss
    gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(student.parameters()))])
    assert found["values"][0] == pytest.approx(loss.item(), rel=1e-5)
    assert found["products"][0][0] == pytest.approx(float(gradient @ gradient), rel=1e-4)
    raw = layerwise.forms(layerwise.states(student, range(2), IDS), layerwise.states(teacher, LAYERS, IDS))["raw"]
    assert found["values"][2] == pytest.approx(sum(raw) / 2, rel=1e-5)
    products = torch.tensor(found["products"], dtype=torch.float64)
    torch.testing.assert_close(products, products.T)
    assert torch.linalg.eigvalsh(products).min() > -1e-4 * products.max()
