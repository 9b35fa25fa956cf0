"""The launches of layer_loss's kernels: how many, over which tiles, and the same result whatever is chosen."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fastdistill import hidden_states, layer_loss, ops, reference
from fastdistill.backend import obstacle_to_triton
from fastdistill.kernels import layer_loss as kernels
from fastdistill.kernels.launch import TilePlan
from fastdistill.testing import DEVICE, assert_matches, differentiate, random_mask, random_states

STATES = ("student_states",)
FORMS = [("mse", "none"), ("mse", "layer_norm"), ("mse", "teacher_rms"), ("cosine", "none")]
ours = partial(layer_loss, impl="triton")


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """How many layers each launch has, from here on."""
    assert obstacle_to_triton(DEVICE, None, "layer_loss") is None  # or its trial would be among them
    made = []
    run = ops.layer_loss

    def launch(students, *rest):
        made.append(len(students))
        return run(students, *rest)

    monkeypatch.setattr(ops, "layer_loss", launch)
    return made


def test_layers_that_are_alike_are_one_launch_up_to_32(launched):
    for layers, expected in ((1, [1]), (32, [32]), (70, [32, 32, 6])):
        launched.clear()
        ours(**random_states(4, 8, layers=layers))
        assert launched == expected


def test_layers_that_are_not_alike_are_launched_apart(launched):
    wide, narrow = random_states(2, 4, 8, layers=3), random_states(2, 4, 6, layers=2)
    mixed: dict[str, Any] = {name: [wide[name][0], narrow[name][0], *wide[name][1:], narrow[name][1]] for name in wide}
    ours(**mixed)
    assert sorted(launched) == [2, 3]


def test_no_gradient_is_made_for_a_layer_that_wants_none(launched):
    arguments = random_states(2, 4, 8, layers=4)
    for i in (1, 3):
        arguments["student_states"][i].requires_grad_()
    ours(**arguments).loss.backward()
    assert launched == [2, 2]
    assert [x.grad is None for x in arguments["student_states"]] == [True, False, True, False]


def test_as_many_layers_as_the_public_function_believes_fit_one_launch():
    assert hidden_states.MAX_LAUNCHED == kernels.MAX_LAYERS


@pytest.mark.parametrize(("metric", "normalize"), FORMS)
@pytest.mark.parametrize(
    ("rows", "columns", "tiles", "width"),
    [(1, 16, 1, 16), (1, 16, 5, 13), (4, 16, 1, 9), (4, 16, 3, 16), (4, 8, 2, 16), (2, 8, 4, 29)],
)
def test_tiles_change_nothing_but_the_order_of_sums(rows, columns, tiles, width, metric, normalize, monkeypatch):
    tokens = 13
    programs = -(-tokens // (rows * tiles))
    monkeypatch.setattr(kernels, "tile_plan", lambda *sizes: TilePlan(1, rows, columns, tiles, programs))
    arguments = random_states(tokens, width, layers=2) | {"mask": random_mask(tokens, dtype=torch.float32)}
    assert_matches(ours, reference.layer_loss, arguments | {"metric": metric, "normalize": normalize}, STATES)


@pytest.mark.parametrize("programs", [1, 64, 65, 130])
def test_the_sums_of_any_number_of_programs_are_added(programs, monkeypatch):
    monkeypatch.setattr(kernels, "tile_plan", lambda *sizes: TilePlan(1, 1, 2, 1, programs))
    assert_matches(ours, reference.layer_loss, random_states(programs, 2, layers=2), STATES)


def test_the_gradient_is_written_where_the_teacher_has_no_position():
    arguments = random_states(2, 6, 8)
    arguments["teacher_states"] = [x[:, :4] for x in arguments["teacher_states"]]
    _, (gradient,) = differentiate(ours, arguments, STATES)
    assert (gradient[:, 4:] == 0).all()
    assert (gradient[:, :4] != 0).all()


def test_states_that_are_not_contiguous_over_channels_are_named():
    state = torch.zeros(4, 8, device=DEVICE).t()
    ones = torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match=r"states must have unit stride over D, got strides \(1, 8\)"):
        kernels.layer_loss_stats(ones, [state], [state], ones[0], ones[:1], form="none")
