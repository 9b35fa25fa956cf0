"""`fastdistill verify` is green here, and red where a behaviour is broken: each fault is planted where it would be."""

from __future__ import annotations

import dataclasses
import math
import sys
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from fastdistill import (
    __main__,
    attention_torch,
    cross_vocab,
    heads,
    hidden_states,
    layer_loss_torch,
    losses,
    softmax_kl_torch,
)
from fastdistill import attention as operation
from fastdistill.training import (
    attention,
    attention_alignment,
    blocks,
    checkpoint,
    curriculum,
    engine,
    evaluate,
    info_nce,
    measures,
    random_state,
    router,
    verify,
    verify_losses,
    verify_run,
    verify_training,
)
from fastdistill.training.attention_alignment import AttentionAlignmentLoss
from fastdistill.training.guard import MovementGuard
from fastdistill.training.layerwise import LayerwiseLoss
from fastdistill.training.objective import DistillationModule
from fastdistill.training.verify_numbers import Failed

LAYERWISE, LENGTHS = "Issue #1: Layerwise Loss Normalization", "Issue #2: Sequence Length Alignment"


def test_it_is_green_and_shows_the_numbers(capsys):
    assert verify.main() == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [
        LAYERWISE,
        LENGTHS,
        "Code Structure",
        "Losses",
        "Components",
        "Training",
        "Resume",
        "Evaluation",
        "Kernels",
    ]
    assert [line for line in lines if "✓" in line] == [
        *(f"✓ {title} - VERIFIED" for title in titles),
        "✓ ALL FIXES VERIFIED SUCCESSFULLY!",
    ]
    assert lines[-1] == "✓ ALL FIXES VERIFIED SUCCESSFULLY!"
    assert sum(" = " in line for line in lines) >= 60
    assert any("no GPU is here" in line for line in lines) != torch.cuda.is_available()


def test_a_red_check_fails_the_command_and_the_others_still_run(monkeypatch, capsys):
    def red():
        raise RuntimeError("the numbers")

    for title in verify.CHECKS:
        monkeypatch.setitem(verify.CHECKS, title, red if title == LENGTHS else lambda: ["1 = 1"])
    monkeypatch.setattr(sys, "argv", ["fastdistill", "verify"])
    assert __main__.main() == 1
    out = capsys.readouterr().out
    assert f"✗ {LENGTHS} - FAILED\n    RuntimeError: the numbers\n" in out
    assert out.count(" - VERIFIED\n    1 = 1\n") == len(verify.CHECKS) - 1
    assert out.endswith(f"✗ 1 OF {len(verify.CHECKS)} CHECKS FAILED\n")


def test_a_device_without_kernels_is_told_why_and_checked_all_the_same(monkeypatch):
    device = torch.device("cpu")
    seen = verify_losses.on_device(device)
    assert all("runs the PyTorch path: " in line for line in seen[:3])
    assert len(seen) > 15
    monkeypatch.setattr(hidden_states, "_layer_loss_torch", first_scaled(hidden_states._layer_loss_torch))
    with pytest.raises(Failed, match="raw, masked"):
        verify_losses.on_device(device)


# Faults ---------------------------------------------------------------------------------------------------------------


def first_scaled(function: Any) -> Any:
    """The first of what it returns, 1 % too large."""

    def faulty(*arguments, **keywords):
        first, *rest = function(*arguments, **keywords)
        return first * 1.01, *rest

    return faulty


def with_keywords(**changed: Any) -> Any:
    return lambda function: lambda *arguments, **keywords: function(*arguments, **{**keywords, **changed})


def no_operation(function: Any) -> Any:
    return lambda *arguments, **keywords: None


def layer_mask_ignored(function: Any) -> Any:
    return lambda shape, mask, *rest: function(shape, None, *rest)


def skip_first_ignored(function: Any) -> Any:
    return lambda shape, mask, skip_first, *rest: function(shape, mask, 0, *rest)


def shorter_by_one(function: Any) -> Any:
    def faulty(student, teacher):
        batch, length = function(student, teacher)
        return batch, length - 1

    return faulty


def teacher_filled_up(function: Any) -> Any:
    """With zeros to the student's length."""

    def faulty(student, teacher, **keywords):
        missing = max(0, student.shape[1] - teacher.shape[1])
        return function(student, torch.nn.functional.pad(teacher, (0, 0, 0, missing)), **keywords)

    return faulty


def last_ids_compared(function: Any) -> Any:
    return lambda student, teacher, **keywords: function(student, teacher[..., -student.shape[-1] :], **keywords)


def paired_by_number(function: Any) -> Any:
    def faulty(student_ends, teacher_ends):
        position = torch.arange(min(student_ends.shape[1], teacher_ends.shape[1]))
        return torch.zeros_like(position), position, position

    return faulty


def teacher_ids_permuted(function: Any) -> Any:
    def faulty(*logits, shared_ids, **keywords):
        return function(*logits, shared_ids=(shared_ids[0], shared_ids[1].roll(1)), **keywords)

    return faulty


def swapped(divergences: Any) -> Any:
    return {**divergences, "forward_kl": divergences["reverse_kl"], "reverse_kl": divergences["forward_kl"]}


def jsd_mirrored(divergences: Any) -> Any:
    return {**divergences, "jsd": lambda *given: divergences["jsd"](*given[:-1], 1 - given[-1])}


def token_mask_ignored(function: Any) -> Any:
    return lambda shape, targets, mask, **keywords: function(shape, targets, None, **keywords)


def gradient_scaled(function: Any) -> Any:
    return staticmethod(first_scaled(function))


def logits_gradient_scaled(function: Any) -> Any:
    return lambda self, chunk, hidden, dlogits: function(self, chunk, hidden, dlogits * 1.01)


def not_shifted(function: Any) -> Any:
    return lambda ids, mask, **keywords: ids.masked_fill(mask == 0, -100)


def component_left_out(function: Any) -> Any:
    def faulty(self, *arguments):
        out = function(self, *arguments)
        return out._replace(total=out.total - self.weights.lm * out.raw["lm"])

    return faulty


def component_without_gradient(function: Any) -> Any:
    def faulty(self, *arguments):
        terms = function(self, *arguments)
        return terms._replace(losses={name: loss.detach() for name, loss in terms.losses.items()})

    return faulty


def padding_predicted(function: Any) -> Any:
    return lambda ids, mask, *, context: function(ids, None, context=context & mask)


def padding_compared(function: Any) -> Any:
    return lambda readings: torch.ones_like(function(readings))


def nothing_skipped(function: Any) -> Any:
    return lambda self, count: self.places() >= 0


def another_block(function: Any) -> Any:
    return lambda config, layer_map: function(config, dataclasses.replace(layer_map, pairs=((0, 0),)))


def unlike(**changed: Any) -> Any:
    """A sight of which a part is other than it was asked for."""
    return lambda function: lambda *arguments: function(*arguments)._replace(**changed)


def falls_to_nothing(function: Any) -> Any:
    return lambda step, **keywords: function(step, **keywords) if step < 2 else 1e-9


def averaged_by_micro_batch(function: Any) -> Any:
    def faulty(self, batch, teacher, counts):
        out = function(self, batch, teacher, self.count([batch]))
        share = len(batch.mask) / 4
        return out._replace(total=out.total * share)

    return faulty


def every_second_time(function: Any) -> Any:
    calls = []

    def faulty(*arguments):
        calls.append(1)
        if len(calls) % 2 == 0:
            function(*arguments)

    return faulty


def not_clipped(function: Any) -> Any:
    return lambda module, optimizer, largest, scaler: function(module, optimizer, math.inf, scaler)


def steps_on_anything(function: Any) -> Any:
    def faulty(optimizer, rate, norm, scaler):
        function(optimizer, rate, torch.zeros_like(norm), scaler)

    return faulty


def without_decay(function: Any) -> Any:
    def faulty(module, config):
        optimizer = function(module, config)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        return optimizer

    return faulty


def after_loading(spoil: Any) -> Any:
    def plant(function):
        def faulty(path, trained):
            state = function(path, trained)
            spoil(state, trained)
            return state

        return faulty

    return plant


def adam_begins_anew(state: Any, trained: checkpoint.Trained) -> None:
    for own in trained.optimizer.state.values():
        own["exp_avg_sq"].zero_()


def averages_begin_anew(state: Any, trained: checkpoint.Trained) -> None:
    for mean, parameter in zip(trained.averaged.means.values(), trained.averaged.parameters, strict=True):
        mean.copy_(parameter.detach())


def step_begins_anew(state: Any, trained: checkpoint.Trained) -> None:
    state["step"] = 0


def weights_rounded(state: Any, trained: checkpoint.Trained) -> None:
    for parameter in trained.module.parameters():
        parameter.data.copy_(parameter.data.bfloat16())


def clamped(function: Any) -> Any:
    return lambda loss: math.exp(min(loss, 20.0))


def stays_in_training_mode(function: Any) -> Any:
    return lambda model: nullcontext()


def stays_in_evaluation_mode(function: Any) -> Any:
    @contextmanager
    def faulty(model):
        model.eval()
        yield

    return faulty


def mean_of_batches(function: Any) -> Any:
    def faulty(self):
        sums = function(self)
        return torch.cat([sums[:2] / sums[1], sums[2:]])

    return faulty


FAULTS = {
    "layerwise loss 1 % too large":
        (LAYERWISE, "raw, against sum", hidden_states, "_layer_loss_torch", first_scaled),
    "layerwise loss a sum, not a mean":
        (LAYERWISE, "raw, against sum", hidden_states, "mean", lambda f: lambda total, n: total),
    "padding in the layerwise loss":
        (LAYERWISE, "with 14 padded positions", hidden_states, "layer_token_weights", layer_mask_ignored),
    "first positions not left out":
        (LAYERWISE, "from position 3 on", hidden_states, "layer_token_weights", skip_first_ignored),
    "layers not weighted":
        (LAYERWISE, "from position 3 on", hidden_states, "_factors", lambda f: lambda w, *rest: f(None, *rest)),
    "layerwise gradient 1 % too large":
        (LAYERWISE, "gradient 1.0e-02 away", layer_loss_torch, "_write_gradient",
         lambda f: lambda into, buffer, s, t, scale, *rest: f(into, buffer, s, t, scale * 1.01, *rest)),
    "lengths cut one too short":
        (LENGTHS, "KL of 168 against 160", losses, "common_positions", shorter_by_one),
    "lengths not cut":
        (LENGTHS, "KL of 168 against 160", verify_losses, "softmax_kl", teacher_filled_up),
    "vocabulary aligned at its end":
        (LENGTHS, "KL of 168 against 160", verify_losses, "softmax_kl", last_ids_compared),
    "T^2 missing":
        (LENGTHS, "with its T^2", losses, "SoftmaxKLOptions", with_keywords(temperature_squared=False)),
    "two tokenizers' positions paired by number":
        (LENGTHS, "read the same bytes", verify_losses, "aligned_positions", paired_by_number),
    "shared ids permuted":
        (LENGTHS, "two vocabularies, shared", cross_vocab, "_shared_kl", teacher_ids_permuted),
    "unequal batches compared":
        (LENGTHS, "2 sequences against 3", losses.checks, "check_pair", no_operation),
    "component missing from the total":
        ("Code Structure", "weighted components", DistillationModule, "forward", component_left_out),
    "component without a gradient":
        ("Code Structure", "gradient of", LayerwiseLoss, "forward", component_without_gradient),
    "targets of training not shifted":
        ("Code Structure", "kd, of documents one by one", blocks, "shift_targets", not_shifted),
    "padding predicted in training":
        ("Code Structure", "kd, of documents one by one", blocks, "shift_targets", padding_predicted),
    "padding's states compared in training":
        ("Code Structure", "layerwise, of documents", blocks, "_mask", padding_compared),
    "first positions of training not left out":
        ("Code Structure", "layerwise, of documents", blocks.Inputs, "past_first", nothing_skipped),
    "another block of the teacher":
        ("Code Structure", "layerwise, of documents", LayerwiseLoss, "of", another_block),
    "attention with other scales than the models'":
        ("Components", "attention, of documents", attention, "attention_kl", with_keywords(scale=1.0)),
    "attention to what comes after":
        ("Components", "attention, of documents", attention, "attention_kl", with_keywords(causal=False)),
    "a position aligned with itself":
        ("Components", "attention_alignment, of documents", attention_alignment, "attention_kl",
         with_keywords(itself=True)),
    "attention's own position seen where it should not":
        ("Losses", "attention_kl, before it", operation, "Sight", unlike(itself=True)),
    "attention_kl of all documents together":
        ("Losses", "attention_kl, causal", operation, "Sight", unlike(documents=None)),
    "attention_kl of what comes after":
        ("Losses", "attention_kl, causal", operation, "Sight", unlike(causal=False)),
    "attention_kl with one scale for both":
        ("Losses", "attention_kl, causal", operation, "attention_scales", lambda function: lambda *_: (0.7, 0.7)),
    "attention_kl's gradient 1 % too large":
        ("Losses", "gradient 1.0e-02 away", attention_torch._AttentionKL, "backward", gradient_scaled),
    "alignment's positions that see nothing counted":
        ("Components", "attention_alignment, of documents", AttentionAlignmentLoss, "count",
         lambda function: lambda self, batch: batch.mask.sum()),
    "a router's loss twice as large":
        ("Components", "routing_feature, of documents", router, "_distance",
         lambda function: lambda *arguments: 2 * function(*arguments)),
    "load balance a sum":
        ("Components", "load balance", router, "_mean", lambda function: lambda values, mask: values.sum((0, 1))),
    "contrast without its temperature":
        ("Components", "contrastive, of documents", info_nce, "_log_shares",
         lambda function: lambda queries, others, among, temperature: function(queries, others, among, 1.0)),
    "contrast of what all have in common":
        ("Components", "contrastive, of documents", info_nce, "_directions",
         lambda function: lambda states, candidates: torch.nn.functional.normalize(states, dim=-1)),
    "a curriculum that begins a step late":
        ("Components", "curriculum begins", curriculum, "_first",
         lambda function: lambda start, steps: function(start, steps) + (start > 0)),
    "KL the other way round":
        ("Losses", "softmax_kl, forward_kl", softmax_kl_torch, "_DIVERGENCES", swapped),
    "JSD the other way round":
        ("Losses", "softmax_kl, jsd", softmax_kl_torch, "_DIVERGENCES", jsd_mirrored),
    "T^2 missing from the losses":
        ("Losses", "softmax_kl, forward_kl", losses, "SoftmaxKLOptions", with_keywords(temperature_squared=False)),
    "mask ignored by softmax_kl":
        ("Losses", "softmax_kl, forward_kl", losses, "token_weights", token_mask_ignored),
    "gradient of the logits 1 % too large":
        ("Losses", "gradient 1.0e-02 away", softmax_kl_torch._SoftmaxKL, "backward", gradient_scaled),
    "gradient of the head 1 % too large":
        ("Losses", "linear_softmax_kl, forward_kl", heads.Gradients, "add", logits_gradient_scaled),
    "targets not shifted":
        ("Losses", "targets of", verify_losses, "shift_targets", not_shifted),
    "nothing steps":
        ("Training", "steps of the optimizer after 1 window", torch.optim.AdamW, "step", lambda f: lambda self: None),
    "steps that wait for another call":
        ("Training", "steps of the optimizer after 1 window", engine, "step_if_finite", every_second_time),
    "learning rate 0":
        ("Training", "learning rate of the first", verify_run, "learning_rate", lambda f: lambda *a, **k: 0.0),
    "learning rate that falls to nothing":
        ("Training", "80 steps on 8 rows", verify_run, "learning_rate", falls_to_nothing),
    "micro-batches averaged one by one":
        ("Training", "loss of 4 micro-batches", DistillationModule, "forward", averaged_by_micro_batch),
    "gradient not clipped":
        ("Training", "norm after it is clipped", engine, "clip_gradients", not_clipped),
    "gradient not reset":
        ("Training", "gradients that are left", torch.optim.AdamW, "zero_grad", no_operation),
    "weights not decayed":
        ("Training", "their movement", engine, "make_optimizer", without_decay),
    "steps on an infinite loss":
        ("Training", "infinite loss", engine, "step_if_finite", steps_on_anything),
    "guard that sees nothing":
        ("Training", "not refused", MovementGuard, "check", no_operation),
    "Adam's state not restored":
        ("Resume", "losses of steps 4 to 6", checkpoint, "load", after_loading(adam_begins_anew)),
    "random state not restored":
        ("Resume", "next random numbers", random_state, "restore", no_operation),
    "averaged weights not restored":
        ("Resume", "bit for bit", checkpoint, "load", after_loading(averages_begin_anew)),
    "step not restored":
        ("Resume", "step that the newest", checkpoint, "load", after_loading(step_begins_anew)),
    "weights kept in half precision":
        ("Resume", "losses of steps 4 to 6", checkpoint, "load", after_loading(weights_rounded)),
    "damage not seen":
        ("Resume", "with a bit of it flipped", checkpoint, "verify", no_operation),
    "perplexity clamped":
        ("Evaluation", "perplexity at a loss of 25", verify_training, "perplexity", clamped),
    "evaluated with dropout":
        ("Evaluation", "held-out loss", evaluate, "evaluating", stays_in_training_mode),
    "dropout off after an evaluation":
        ("Evaluation", "dropout is on again", evaluate, "evaluating", stays_in_evaluation_mode),
    "padding counted when held out":
        ("Evaluation", "held-out tokens", blocks, "shift_targets", padding_predicted),
    "mean of the batches' means":
        ("Evaluation", "held-out", measures.Measures, "sums", mean_of_batches),
    "retention KL the other way round":
        ("Evaluation", "KL from the teacher", measures, "softmax_kl", with_keywords(divergence="reverse_kl")),
}  # fmt: skip
"""Title of the check that must turn red, what its message says, and where the fault is: owner, name, how it breaks."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_turns_it_red(fault, monkeypatch, capsys):
    title, says, owner, name, plant = FAULTS[fault]
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    assert verify.main({title: verify.CHECKS[title]}) == 1
    out = capsys.readouterr().out
    print(out)
    assert f"✗ {title} - FAILED\n" in out
    assert says in out
    assert "ALL FIXES VERIFIED" not in out
