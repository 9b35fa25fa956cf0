"""Checks of training: what is minimised, that a step steps, that a resumed run is the run, that numbers are honest."""

from __future__ import annotations

import copy
import math
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdistill.training import checkpoint, engine
from fastdistill.training import verify_definitions as plain
from fastdistill.training.blocks import collate
from fastdistill.training.config import Config
from fastdistill.training.evaluate import evaluate, perplexity
from fastdistill.training.guard import BadStepGuard, MovementGuard, TrainingFault
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.verify_numbers import difference, equal, refused, true
from fastdistill.training.verify_run import CPU, DOCUMENTS, LENGTHS, RECIPE, VOCAB, WEIGHTS, Run, small_model


def _by_hand(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, Tensor]:
    """Each component, a mean over tokens, of models that read one document at a time: no padding, no batches."""
    kd, lm, layerwise = [], [], []
    for ids in DOCUMENTS:
        ours = student(input_ids=ids[None], output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(input_ids=ids[None], output_hidden_states=True)
        kd.append(plain.distilled("forward_kl", ours.logits[0, :-1], theirs.logits[0, :-1], RECIPE.temperature))
        lm.append(plain.cross_entropy(ours.logits[0, :-1], ids[1:]))
        # The output of block i is hidden state i + 1; the first position is left out.
        states = ours.hidden_states[1][0, 1:], theirs.hidden_states[2][0, 1:]
        layerwise.append(plain.layer_error("layer_norm", *states) / 2)
    components = {"kd": kd, "lm": lm, "layerwise": layerwise}
    return {name: torch.cat(values).mean() for name, values in components.items()}


def code_structure() -> list[str]:
    """The parts fit together: what the module minimises is what its weights say, of models that transformers runs."""
    run = Run()
    batch = collate([run.walk.blocks[i] for i in range(len(DOCUMENTS))], CPU)
    losses = run.module(batch, run.teacher(batch.teacher, run.module.of_teacher), run.module.count([batch]))
    losses.total.backward()
    student, teacher = (copy.deepcopy(model).double().eval() for model in (run.module.student, run.teacher.model))
    expected = _by_hand(student, teacher)
    total = sum((WEIGHTS[name] * value for name, value in expected.items()), torch.zeros(()))
    total.backward()
    truth = [p.grad for p in student.parameters() if p.grad is not None]
    weighted = sum(WEIGHTS[name] * value.item() for name, value in losses.raw.items())
    away = difference(run.grads(), truth)
    seen = [
        equal(f"{name}, of documents one by one:", losses.raw[name].item(), expected[name].item()) for name in WEIGHTS
    ]
    seen += [
        equal("weighted components, summed, and the total:", weighted, losses.total.item()),
        equal("the total, of documents one by one:", losses.total.item(), total.item()),
        true(f"gradient of {len(truth)} parameters, {away:.0e} away", away <= 1e-5),
    ]
    alone = DistillationModule(small_model(1), Weights.of(Config(kd_weight=1.0, lm_weight=0.0)))
    raw = alone(batch, run.teacher(batch.teacher), alone.count([batch])).raw
    seen.append(true(f"components with a weight, of kd 1 and lm 0: {[*raw]} = ['kd']", [*raw] == ["kd"]))

    libraries = "transformers", "datasets", "accelerate", "triton"
    loaded = f"import sys, fastdistill; print([name for name in {libraries} if name in sys.modules])"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", loaded], env=path, capture_output=True, text=True, check=True).stdout
    return [
        *seen,
        true(f"heavy libraries that `import fastdistill` loads: {found.strip()} = []", found.strip() == "[]"),
    ]


def training() -> list[str]:
    """One window is one step that moves the weights as AdamW says; micro-batches change nothing; a model learns."""
    return _one_window() + _guards() + _overfit()


def _one_window() -> list[str]:
    micro, whole = Run(), Run(replace(RECIPE, batch_size=4, grad_accum=1))
    frozen = [p.clone() for p in micro.teacher.model.parameters()]
    loss, loss_whole = (run.gradients(run.window()) for run in (micro, whole))
    away = difference(micro.grads(), whole.grads())
    seen = [
        equal("loss of 4 micro-batches of 1 row, and of 1 of 4:", loss, loss_whole),
        true(f"gradient of 4 x 1, {away:.0e} away from that of 1 x 4", away <= 1e-5),
    ]
    before, gradients, rate = micro.weights(), micro.grads(), micro.rate()
    norm, largest = micro.update().item(), _norm(gradients)
    engine.clip_gradients(whole.module, whole.optimizer, RECIPE.clip, None)
    # AdamW's first step, whose means are the gradient, clipped, and its square.
    clipped = [g * RECIPE.clip / largest for g in gradients]
    expected = [
        -rate * (g / (g.abs() + 1e-8) + (RECIPE.weight_decay if p.ndim > 1 else 0.0) * p)
        for g, p in zip(clipped, before, strict=True)
    ]
    moved = [after - p for after, p in zip(micro.weights(), before, strict=True)]
    away = difference(moved, expected)
    counted = {int(state["step"]) for state in micro.optimizer.state.values()}
    seen += [
        equal("learning rate of the first of 2 steps of warm-up:", rate, RECIPE.lr / 2),
        equal("norm of the gradient before it is clipped:", norm, largest),
        equal("norm after it is clipped:", _norm(whole.grads()), RECIPE.clip),
        true(f"steps of the optimizer after 1 window of 4: {counted} = {{1}}", counted == {1}),
        true(f"parameters that it moved: {_moved(moved)} of {len(moved)}", _moved(moved) == len(moved)),
        true(f"their movement, {away:.0e} away from that of AdamW", away <= 1e-3),
        true(f"gradients that are left after it: {len(micro.grads())} = 0", not micro.grads()),
    ]
    micro.train(2)
    counted = {int(state["step"]) for state in micro.optimizer.state.values()}
    changed = _moved([a - b for a, b in zip(frozen, micro.teacher.model.parameters(), strict=True)])
    return [
        *seen,
        true(f"steps of the optimizer after 3 windows of 4: {counted} = {{3}}", counted == {3}),
        true(f"parameters of the teacher that they changed: {changed} = 0", changed == 0),
    ]


def _guards() -> list[str]:
    run, guard = Run(), MovementGuard()
    run.gradients(run.window())
    guard.watch(run.module)
    seen = [
        refused("a step that does not move the weights", TrainingFault, ["moved"], lambda: guard.check(1e-2)),
        refused("a learning rate of 0", TrainingFault, ["learning rate"], lambda: guard.check(0.0)),
    ]
    before = run.weights()
    run.optimizer.zero_grad()
    engine.backward(next(run.module.parameters()).sum() * math.inf, 1, None)
    run.update()
    moved = _moved([a - b for a, b in zip(run.weights(), before, strict=True)])
    bad = BadStepGuard(2)
    bad.accept({"kd": math.inf})
    return [
        *seen,
        true(f"parameters that a step with an infinite loss moves: {moved} = 0", moved == 0),
        refused("2 such steps in a row", TrainingFault, ["kd", "2"], lambda: bad.accept({"kd": math.inf})),
    ]


def _overfit() -> list[str]:
    seen = []
    for name, kd, lm in (("cross-entropy", 0.0, 1.0), ("KL from the teacher", 1.0, 0.0)):
        run = Run(replace(RECIPE,
            kd_weight=kd, lm_weight=lm, layerwise_weight=0.0, batch_size=8, grad_accum=1, max_steps=80, clip=1.0,
        ))  # fmt: skip
        losses = run.train(80)
        first, last = losses[0], losses[-1]
        seen.append(true(f"80 steps on 8 rows, {name}: {first:.3f} to {last:.3f}, below a tenth", last < first / 10))
    return seen


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


def _moved(differences: list[Tensor]) -> int:
    return sum(bool(x.any()) for x in differences)


def resume() -> list[str]:
    """A run that stopped and went on is the run that never stopped, bit for bit; a damaged checkpoint is not used."""
    whole = Run(dropout=0.1)
    losses = whole.train(6)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begun = Run(dropout=0.1)
        begun.train(3)
        for step in (2, 3):
            checkpoint.save(folder, step, begun.trained, {"counter": 10 * begun.step})
        drawn = _draw()

        resumed = Run(dropout=0.1, seed=1)
        _draw()
        newest, _ = checkpoint.latest(folder)
        assert newest is not None
        state = checkpoint.load(newest, resumed.trained)
        resumed.step = state["step"]
        drawn_again = _draw()
        checkpoint.load(newest, resumed.trained)
        rest = resumed.train(3)

        weights = newest / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        fallback, said = checkpoint.latest(folder)
    pairs = [*zip(resumed.state(), whole.state(), strict=True)]
    same = sum(torch.equal(a, b) for a, b in pairs)
    off = max((a - b).abs().max().item() for a, b in pairs)
    used = fallback.name if fallback else "none"
    return [
        equal("step that the newest checkpoint is of:", state["step"], 3),
        equal("what the caller kept in it:", state["counter"], 30),
        true(f"next random numbers, before and after: {drawn_again} = {drawn}", drawn_again == drawn),
        true(f"losses of steps 4 to 6: {_listed(rest)} = {_listed(losses[3:])}", rest == losses[3:]),
        true(
            f"weights, Adam's state and means of 3 + 3 steps, bit for bit those of 6: {same} of {len(pairs)}, "
            f"largest difference {off:.1e}",
            same == len(pairs),
        ),
        true(f"with a bit of it flipped, the one before is used, {used}, and said: {len(said)} = 1",
             (used, len(said)) == ("step-00000002", 1)),
    ]  # fmt: skip


def _draw() -> list[float]:
    """The next numbers of the generators of Python, NumPy and PyTorch."""
    return [round(random.random(), 6), round(float(numpy.random.rand()), 6), round(torch.rand(()).item(), 6)]


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.7f}" for value in values)


def evaluation() -> list[str]:
    """Held-out loss is transformers' own; perplexity is exp of it; a teacher against itself is itself."""
    run = Run(dropout=0.1)
    student, teacher = run.module.student, run.teacher.model
    came = evaluate(run.module, run.walk.blocks, batch_size=3, teacher=run.teacher)
    still_training = student.training
    student.eval()
    sums, kept = 0.0, []
    with torch.no_grad():
        for ids in DOCUMENTS:
            out = student(input_ids=ids[None], labels=ids[None])
            sums += out.loss.item() * (len(ids) - 1)
            kept.append((out.logits[0, :-1].double(), teacher(input_ids=ids[None]).logits[0, :-1].double()))
    tokens = sum(LENGTHS) - len(LENGTHS)
    ours, theirs = (torch.cat(side) for side in zip(*kept, strict=True))
    p_s, p_t = ours.softmax(-1), theirs.softmax(-1)
    itself = evaluate(teacher, run.walk.blocks, batch_size=3, teacher=run.teacher)
    assert came.kl is not None
    assert came.top1_agreement is not None
    assert came.shared_mass is not None
    assert itself.kl is not None
    assert itself.top1_agreement is not None
    return [
        equal("held-out tokens:", came.tokens, tokens),
        equal("held-out loss, against transformers' own:", came.loss, sums / tokens),
        equal("KL from the teacher, against its definition:", came.kl, plain.kl(p_t, p_s).mean().item()),
        equal("top-1 agreement:", came.top1_agreement, (p_t.argmax(-1) == p_s.argmax(-1)).double().mean().item()),
        equal("probability that both share:", came.shared_mass, torch.minimum(p_s, p_t).sum(-1).mean().item()),
        true(f"dropout is on again afterwards: {still_training} = True", still_training),
        equal("the teacher against itself, KL:", itself.kl, 0.0, 1e-6),
        equal("the teacher against itself, top-1 agreement:", itself.top1_agreement, 1.0),
        equal("perplexity, against exp of the loss:", perplexity(came.loss), math.exp(sums / tokens), 1e-4),
        equal("perplexity at a loss of 25, exp(25):", perplexity(25.0), math.exp(25.0), 1e-12),
        equal("perplexity of a vocabulary of 50, all alike:", perplexity(math.log(VOCAB)), VOCAB, 1e-12),
    ]
