"""Checkpoints: everything comes back, and a damaged one is named and passed over."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from fastdistill.training import checkpoint


class Tied(nn.Module):
    """Two names for one weight, as models with tied heads have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).square().mean()


def make(seed: int) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    for _ in range(3):
        module(torch.randn(2, 4)).backward()
        optimizer.step()
    return module, optimizer


def save(folder: Path, step: int) -> Path:
    module, optimizer = make(step)
    return checkpoint.save(folder, step, module, optimizer, None, {"samples": 7})


def test_everything_comes_back(tmp_path):
    module, optimizer = make(0)
    path = checkpoint.save(tmp_path, 12, module, optimizer, None, {"samples": 7, "loss": 0.1 + 0.2})
    expected = random.random(), numpy.random.rand(), torch.rand(3)
    other, other_optimizer = make(1)
    state = checkpoint.load(path, other, other_optimizer, None)
    assert (state["step"], state["samples"], state["loss"]) == (12, 7, 0.1 + 0.2)
    came = random.random(), numpy.random.rand(), torch.rand(3)
    assert came[:2] == expected[:2]
    assert torch.equal(came[2], expected[2])
    assert other.second.weight is other.first.weight
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert optimizer.state[one].keys() == other_optimizer.state[two].keys()
        assert all(torch.equal(optimizer.state[one][k], other_optimizer.state[two][k]) for k in optimizer.state[one])


def test_no_file_is_pickled(tmp_path):
    assert {file.suffix for file in save(tmp_path, 1).iterdir()} == {".json", ".safetensors"}


FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "one bit flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    content = bytearray((newest / file).read_bytes())
    if damage == "missing":
        (newest / file).unlink()
    elif damage == "one bit flipped":
        content[len(content) // 2] ^= 1
        (newest / file).write_bytes(content)
    else:
        (newest / file).write_bytes(content[: 0 if damage == "empty" else -3])
    warnings: list[str] = []
    assert checkpoint.latest(tmp_path, warnings.append) == tmp_path / "step-00000001"
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert "using the one before it" in warnings[0]


def test_a_save_that_was_cut_off_leaves_no_checkpoint(tmp_path):
    whole = save(tmp_path, 1)

    def cut_off(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.write_folder(tmp_path / "step-00000002", cut_off)
    assert checkpoint.latest(tmp_path, pytest.fail) == whole
    assert checkpoint.latest(save(tmp_path, 2).parent, pytest.fail) == tmp_path / "step-00000002"


def test_the_newest_are_kept(tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, step)
    checkpoint.rotate(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_where_there_is_none_there_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "absent", pytest.fail) is None
