"""Checkpoints: everything comes back, and a damaged one is named and passed over."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastdistill.training import checkpoint
from fastdistill.training.averaged import AveragedWeights
from fastdistill.training.checkpoint import Trained
from fastdistill.training.guard import TrainingFault
from fastdistill.training.whole import DamagedError, verify, write_file, write_folder


class Tied(nn.Module):
    """Two names for one weight, as models with tied heads have, and a weight that is not trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).square().mean()


def make(seed: int, *, steps: int = 3, decay: float = 0.5, width: int = 4) -> Trained:
    torch.manual_seed(seed)
    module = Tied(width)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    averaged, scaler = AveragedWeights(module, decay), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(1, steps + 1):
        scaler.scale(module(torch.randn(2, width))).backward()
        scaler.step(optimizer)
        scaler.update(8.0 * step)
        averaged.update(step)
    return Trained(module, optimizer, averaged, scaler)


def save(folder: Path, step: int, **state: object) -> Path:
    checkpoint.save(folder, step, make(step), {"best_step": step, **state})
    return folder / f"step-{step:08d}"


@pytest.mark.parametrize("steps_before", [0, 2])
def test_everything_comes_back(tmp_path, steps_before):
    saved = make(0)
    checkpoint.save(tmp_path, 12, saved, {"samples": 7, "loss": 0.1 + 0.2})
    drawn = random.random(), random.gauss(), numpy.random.rand(), numpy.random.randn(), torch.rand(3)
    other = make(1, steps=steps_before)
    state = checkpoint.load(tmp_path / "step-00000012", other)
    assert (state["step"], state["samples"], state["loss"]) == (12, 7, 0.1 + 0.2)
    again = random.random(), random.gauss(), numpy.random.rand(), numpy.random.randn(), torch.rand(3)
    assert again[:4] == drawn[:4]
    assert torch.equal(again[4], drawn[4])
    module: Tied = other.module  # pyright: ignore[reportAssignmentType]
    assert module.second.weight is module.first.weight
    came, expected = ({(file, name): value for file, name, value in each.tensors()} for each in (other, saved))
    assert came.keys() == expected.keys()
    assert {file for file, _ in expected} == {"model", "optimizer", "averaged"}
    assert all(torch.equal(value, came[key]) for key, value in expected.items())
    assert other.scaler is not None
    assert other.scaler.get_scale() == 24.0


def test_generators_half_way_through_a_pair_of_gaussians_come_back(tmp_path):
    random.gauss()
    numpy.random.randn()
    checkpoint.save(tmp_path, 1, make(0), {})
    drawn = random.gauss(), numpy.random.randn()
    checkpoint.load(tmp_path / "step-00000001", make(0))
    assert (random.gauss(), numpy.random.randn()) == drawn


def test_generators_of_an_earlier_time_can_be_saved(tmp_path):
    then = checkpoint.random_state.capture()
    drawn = torch.rand(2)
    checkpoint.save(tmp_path, 1, make(0), {}, then)
    torch.manual_seed(99)
    checkpoint.load(tmp_path / "step-00000001", make(0))
    assert torch.equal(torch.rand(2), drawn)


def test_no_file_is_pickled_and_a_tied_weight_stands_once(tmp_path):
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert list(load_file(path / "model.safetensors")) == ["first.bias", "first.weight", "frozen"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(1, width=5), r"first.weight is \[4, 4\] there and \[5, 5\] here"),
        (make(1, decay=0), "first.bias is in one of them alone"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, other, message):
    path = save(tmp_path, 1)
    with pytest.raises(TrainingFault, match=f"is of another model: {message}"):
        checkpoint.load(path, other)


def test_a_checkpoint_of_more_processes_is_refused(tmp_path):
    path = save(tmp_path, 1, processes=2)
    with pytest.raises(TrainingFault, match="is of 2 processes, and there are 1: launch as many"):
        checkpoint.load(path, make(1))


def flip(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-3],
    "one bit flipped": flip,
}


@pytest.mark.parametrize("file", [*checkpoint.FILES, "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, damage):
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    content = DAMAGES[damage]((newest / file).read_bytes())
    if content is None:
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(content)
    found, said = checkpoint.latest(tmp_path)
    assert found == before
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "it is now damaged-step-00000002, and the one before it is used" in said[0]
    # Set aside, it neither counts among those that are kept nor is lost.
    checkpoint.rotate(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]
    assert checkpoint.latest(tmp_path) == (before, [])


def test_a_manifest_that_lists_too_little_is_damaged(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]["optimizer.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedError, match=r"manifest.json does not list optimizer.safetensors"):
        verify(path, checkpoint.FILES)


def test_where_all_are_damaged_nothing_begins_anew_in_silence(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(TrainingFault, match=r"step-00000002 is damaged.* and so is each before it: move .* away"):
        checkpoint.latest(tmp_path)


def test_where_there_is_none_there_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_said_and_the_last_good_one_stays(tmp_path, monkeypatch, error):
    good = save(tmp_path, 1)

    def full(tensors: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingFault) as caught:
        save(tmp_path, 2)
    assert "the checkpoint of step 2 could not be written" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert f"the last good one is {good}" in str(caught.value)
    assert caught.value.go_on == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # nor is room taken by what was begun
    assert checkpoint.latest(tmp_path) == (good, [])


def test_a_save_that_was_killed_leaves_no_checkpoint(tmp_path):
    good = save(tmp_path, 1)
    begun = tmp_path / ".step-00000002.partial"
    begun.mkdir()
    (begun / "model.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == (good, [])
    assert checkpoint.latest(save(tmp_path, 2).parent)[0] == tmp_path / "step-00000002"
    assert not begun.exists()


def test_a_file_or_folder_is_replaced_whole(tmp_path):
    write_file(tmp_path / "file", "old")
    write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    for text in ("old", "new"):
        write_folder(tmp_path / "folder", lambda folder, text=text: (folder / text).write_text(text))
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["manifest.json", "new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_newest_are_kept(tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, step)
    assert [state["best_step"] for state in checkpoint.rotate(tmp_path, keep=2)] == [10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
