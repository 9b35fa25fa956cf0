"""`fastdistill verify` is green here and red where a behaviour is broken."""

from __future__ import annotations

import pytest
import torch

from fastdistill.training import verify
from fastdistill.training.objective import DistillationModule


def test_it_is_green_and_shows_the_numbers(capsys):
    assert verify.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for title in verify.CHECKS:
        assert f"✓ {title} - VERIFIED" in lines
    assert lines[-1] == "✓ ALL FIXES VERIFIED SUCCESSFULLY!"
    assert sum(" = " in line for line in lines) >= 9


def scaled(function, factor: float):
    def faulty(*arguments, **keywords):
        out = function(*arguments, **keywords)
        return out._replace(loss=out.loss * factor)

    return faulty


def without_mask(function):
    return lambda s, t, mask=None, **keywords: function(s, t, None, **keywords)


FAULTS = {
    "layerwise loss off by a factor": (verify, "layer_loss", lambda f: scaled(f, 1.01)),
    "mask ignored": (verify, "layer_loss", without_mask),
    "T^2 missing": (verify, "softmax_kl", lambda f: lambda *a, **k: f(*a, temperature_squared=False, **k)),
    "targets not shifted": (verify, "shift_targets", lambda f: lambda ids, mask: ids.masked_fill(~mask, -100)),
    "cross-entropy off by a factor": (verify, "linear_softmax_kl", lambda f: scaled(f, 1.01)),
    "nothing steps": (torch.optim.AdamW, "step", lambda f: lambda self, closure=None: None),
    "a component not in the total": (
        DistillationModule, "forward", lambda f: lambda self, *a: f(self, *a)._replace(raw={"lm": torch.ones(())}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_it_red(fault, monkeypatch, capsys):
    owner, name, break_it = FAULTS[fault]
    monkeypatch.setattr(owner, name, break_it(getattr(owner, name)))
    assert verify.main() == 1
    out = capsys.readouterr().out
    assert "✗" in out
    assert "ALL FIXES VERIFIED" not in out
