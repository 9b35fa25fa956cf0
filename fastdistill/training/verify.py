"""`fastdistill verify`: does this installation behave as it says? Each check prints the numbers it saw."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fastdistill import layer_loss, linear_softmax_kl, shift_targets, softmax_kl


class Failed(Exception):
    """A behaviour that is not what it should be; the message has the numbers."""


def _equal(what: str, came: float, expected: float, tolerance: float = 1e-5) -> str:
    if not abs(came - expected) <= tolerance * max(1.0, abs(expected)):
        raise Failed(f"{what}: {came:.6g}, expected {expected:.6g}")
    return f"{what} {came:.6g} = {expected:.6g}"


def layerwise_normalization() -> list[str]:
    """The layerwise loss is the document's formula, and changes with neither length nor padding."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 50, 64), torch.randn(2, 50, 64)
    document = ((s - t) ** 2).sum() / (2 * 50 * 64)
    seen = [_equal("raw, against sum / (B S D)", layer_loss([s], [t]).loss.item(), document.item())]
    short = layer_loss([s], [t], normalize="layer_norm").loss.item()
    long = layer_loss([s.repeat(1, 10, 1)], [t.repeat(1, 10, 1)], normalize="layer_norm").loss.item()
    seen.append(_equal("layer-normalised, the same vectors at S = 500 and at S = 50", long, short))
    padded = [F.pad(x, (0, 0, 0, 14), value=1e4) for x in (s, t)]
    masked = layer_loss(padded[:1], padded[1:], torch.arange(64).expand(2, 64) < 50).loss.item()
    seen.append(_equal("raw, with 14 padded positions", masked, document.item()))
    return seen


def sequence_alignment() -> list[str]:
    """168 against 160 positions and 300 against 320 ids give the mean KL over what both have."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 168, 300), torch.randn(2, 160, 320)
    p = (t[..., :300] / 2).softmax(-1)
    by_hand = (p * (p.log() - (s[:, :160] / 2).log_softmax(-1))).sum() / (2 * 160)
    out = softmax_kl(s, t, temperature=2.0)
    assert out.kl is not None
    return [
        _equal("KL of 168 against 160 positions", out.kl.item(), by_hand.item()),
        _equal("loss, with its T^2", out.loss.item(), 4 * by_hand.item()),
        _equal("tokens counted", out.num_tokens.item(), 320),
    ]


def code_structure() -> list[str]:
    """The fused-linear loss and its gradient are those of whole logits, padding out, and one step really steps."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 20, 16), torch.randn(50, 16, requires_grad=True)
    ids, mask = torch.randint(0, 50, (2, 20)), torch.arange(20).expand(2, 20) < torch.tensor([[20], [13]])
    targets = shift_targets(ids, mask)
    loss = linear_softmax_kl(hidden, weight, None, None, targets, kl_weight=0.0, ce_weight=1.0).loss
    whole = F.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), targets[:, :-1].flatten())
    gradients = [torch.autograd.grad(x, weight)[0] for x in (loss, whole)]
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    seen = [
        _equal("cross-entropy over 31 of 40 positions", loss.item(), whole.item()),
        _equal("targets that count", (targets != -100).sum().item(), 19 + 12),
        _equal("gradient, relative error", error.item(), 0.0),
    ]
    return seen + _training()


def _training() -> list[str]:
    from transformers import GPT2Config, GPT2LMHeadModel

    from fastdistill.training.blocks import collate, cut
    from fastdistill.training.config import Config
    from fastdistill.training.engine import make_optimizer
    from fastdistill.training.evaluate import evaluate, perplexity
    from fastdistill.training.guard import MovementGuard
    from fastdistill.training.layerwise import LayerwiseLoss
    from fastdistill.training.objective import DistillationModule, Teacher, Weights
    from fastdistill.training.tokens import Tokens

    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    student, teacher = GPT2LMHeadModel(shape), Teacher(GPT2LMHeadModel(shape))
    tokens = Tokens(torch.randint(0, 50, (64,), dtype=torch.int32), torch.arange(0, 65, 16), None, None)
    blocks = cut((tokens,), 16, "padded")
    module = DistillationModule(
        student, Weights(kd=0.5, lm=0.5, layerwise=0.5), layerwise=LayerwiseLoss([(0, 0), (1, 1)])
    )
    optimizer, guard = make_optimizer(module, Config(lr=1e-2)), MovementGuard()
    batch = collate([blocks[i] for i in range(4)], torch.device("cpu"))
    counts, totals, raw = module.count([batch]), [], {}
    for _ in range(20):
        total, raw, _ = module(batch, teacher(batch.teacher, module.teacher_layers), counts)
        total.backward()
        guard.watch(module)
        optimizer.step()
        guard.check(1e-2)
        optimizer.zero_grad()
        totals.append(total.item())
    if not totals[-1] < 0.7 * totals[0]:
        raise Failed(f"20 steps on one batch brought the loss from {totals[0]:.3f} to {totals[-1]:.3f}")
    weighted = sum(0.5 * value.item() for value in raw.values())
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        again = GPT2LMHeadModel.from_pretrained(Path(folder))
    loss = evaluate(again, blocks, batch_size=2).loss
    ids = batch.student.input_ids
    own = again(input_ids=ids, labels=ids).loss.item()
    return [
        f"20 steps on one batch: loss {totals[0]:.3f} to {totals[-1]:.3f}, weights moved at the first",
        _equal("weighted components sum to the total", weighted, totals[-1]),
        _equal("held-out loss, against the saved model's own", loss, own),
        _equal("perplexity, against exp of the loss", perplexity(loss), math.exp(own), 1e-4),
    ]


CHECKS: dict[str, Callable[[], list[str]]] = {
    "Issue #1: Layerwise Loss Normalization": layerwise_normalization,
    "Issue #2: Sequence Length Alignment": sequence_alignment,
    "Code Structure": code_structure,
}


def main() -> int:
    """Run every check; 0 when all hold, 1 when any does not."""
    failures = 0
    for name, check in CHECKS.items():
        try:
            seen = check()
        except Exception as error:  # whatever breaks a check is a finding: it is printed and the others still run
            failures += 1
            print(f"✗ {name} - FAILED\n    {type(error).__name__}: {error}")
        else:
            print(f"✓ {name} - VERIFIED")
            print("".join(f"    {line}\n" for line in seen), end="")
    if failures:
        print(f"✗ {failures} OF {len(CHECKS)} CHECKS FAILED")
        return 1
    print("✓ ALL FIXES VERIFIED SUCCESSFULLY!")
    return 0
