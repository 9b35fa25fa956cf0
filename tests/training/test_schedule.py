from __future__ import annotations

import pytest

from fastdistill.training.schedule import learning_rate


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10, 100])
def test_every_step_moves_the_weights_and_none_beyond_the_peak(shape, warmup_steps):
    rates = [
        learning_rate(step, peak=0.5, total_steps=100, warmup_steps=warmup_steps, shape=shape) for step in range(100)
    ]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)
    assert max(rates) == 0.5


def test_cosine_and_linear_are_halfway_at_half():
    for shape in ("cosine", "linear"):
        rate = learning_rate(60, peak=1.0, total_steps=100, warmup_steps=20, shape=shape)
        assert rate == pytest.approx(0.5)
