"""The contrastive component by hand: what is compared with what, in one process and in two, and what counts nowhere."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import gradcheck
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from fastdistill.training.blocks import Batch, Inputs, Pairs
from fastdistill.training.capture import Captured
from fastdistill.training.component import Terms
from fastdistill.training.config import Config, UsageError
from fastdistill.training.contrastive import ENOUGH_TEXTS, ContrastiveLoss
from fastdistill.training.info_nce import info_nce
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.objective import DistillationModule
from fastdistill.training.pairing import ONE_TOKENIZER
from fastdistill.training.teacher import Teacher

PAIRS = [(0, 1), (1, 3)]
ONE = {"micro_batches": torch.tensor(1)}
RANKS = 2
KINDS = ["texts", "tokens"]


def batch_of(mask: list[str], positions: list[list[int]] | None = None, pairs: Pairs | None = None) -> Batch:
    """Its mask as lines in which "x" counts; `positions` begin anew with each document."""
    counted = torch.tensor([[place == "x" for place in line] for line in mask])
    ids = torch.zeros(counted.shape, dtype=torch.int64)
    inputs = Inputs(ids, None if positions is None else torch.tensor(positions))
    return Batch(inputs, counted, ids, inputs, pairs)


def packed() -> Batch:
    """Rows of two documents, of a padded one, of a single position, and of nothing."""
    return batch_of(
        ["xxxxxx", "xxxx..", "x.....", "......"], [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0], [0] * 6, [0, 1, 2, 3, 4, 5]]
    )


def states(batch: Batch, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch.mask.shape, width, generator=generator, dtype=dtype).requires_grad_()


def told(loss: ContrastiveLoss, ours: Tensor, theirs: Tensor, batch: Batch, counts: Any = ONE) -> Terms:
    return loss(Captured({1: ours}), Captured({3: theirs}), batch, counts)


def layer_normed(state: Tensor) -> Tensor:
    centred = state - state.sum() / len(state)
    return centred / ((centred * centred).sum() / len(state) + 1e-5).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def group_by_hand(ours: list[Tensor], theirs: list[Tensor], temperature: float) -> list[tuple[Tensor, float, bool]]:
    """Of states that are told from each other: the loss of each, what it is by chance, and whether it is found."""
    size = len(ours)
    if size == 1:
        return [(0 * ours[0].sum(), 0.0, True)]
    ours, theirs = ([state - sum(some) / size for state in some] for some in (ours, theirs))
    logits = [[cosine(ours[i], theirs[j]) / temperature for j in range(size)] for i in range(size)]
    results = []
    for i in range(size):
        row, column = [logits[i][j] for j in range(size)], [logits[j][i] for j in range(size)]
        among_theirs, among_ours = (-(own[i].exp() / sum(x.exp() for x in own)).log() for own in (row, column))
        results.append((among_theirs / 2 + among_ours / 2, math.log(size), bool(row[i] == max(row))))
    return results


def by_hand(ours: Tensor, theirs: Tensor, groups: list[list[list[tuple]]], temperature: float) -> Any:
    """Loss, chance and accuracy. `groups` of texts, or of tokens, that are told from each other; each is a list of its
    positions (row, student's, teacher's).
    """
    results: list[tuple[Tensor, float, bool]] = []
    for group in groups:
        students, teachers = [], []
        for places in group:
            s = [layer_normed(ours[row, i]) for row, i, _ in places]
            t = [layer_normed(theirs[row, j]) for row, _, j in places]
            students.append(sum(s[1:], s[0]) / len(s))
            teachers.append(sum(t[1:], t[0]) / len(t))
        results += group_by_hand(students, teachers, temperature)
    losses, chances, found = zip(*results, strict=True)
    return sum(losses) / len(results), sum(chances) / len(results), sum(found) / len(results)


PACKED_GROUPS = {
    "texts": [[[(0, i, i) for i in range(6)], [(1, i, i) for i in range(4)], [(2, 0, 0)]]],
    "tokens": [
        [[(0, i, i)] for i in range(3)],
        [[(0, i, i)] for i in range(3, 6)],
        [[(1, i, i)] for i in range(4)],
        [[(2, 0, 0)]],
    ],
}


@pytest.mark.parametrize("projected", ["learned", "fixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_its_definition(kind, projected):
    batch = packed()
    ours, theirs = states(batch, 5, seed=0), states(batch, 7, seed=1)
    loss = ContrastiveLoss(PAIRS, widths=(5, 7), projected=projected, temperature=0.3, negatives=kind).double()
    terms = told(loss, ours, theirs, batch)
    matrix = torch.eye(7, 5, dtype=torch.float64, requires_grad=True)
    wide = (ours[:, :, None, :] * matrix).sum(-1)
    expected, chance, accuracy = by_hand(wide, theirs, PACKED_GROUPS[kind], 0.3)
    torch.testing.assert_close(terms.losses["contrastive"], expected)
    assert 0 < accuracy < 1
    assert terms.diagnostics["contrastive chance"].item() == pytest.approx(chance)
    assert terms.diagnostics["contrastive accuracy"].item() == pytest.approx(accuracy)
    assert all(value.ndim == 0 for value in terms.diagnostics.values())
    terms.losses["contrastive"].backward()
    wanted = torch.autograd.grad(expected, [ours, matrix])
    torch.testing.assert_close(ours.grad, wanted[0])
    assert theirs.grad is None
    if projected == "learned":
        torch.testing.assert_close(loss.project.get_parameter("weight").grad, wanted[1])
    else:
        assert not any(parameter.requires_grad for parameter in loss.parameters())


@pytest.mark.parametrize("queries", [slice(None), slice(2, 4)], ids=str)
def test_its_gradient_is_the_slope_of_its_loss(queries):
    student, teacher = (torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    together = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 2]])
    candidates = together[:, :, None] == together[:, None, :]
    assert gradcheck(lambda s, t: info_nce(s, t, candidates, 0.3, queries).loss, [student, teacher])


def test_a_query_that_is_not_among_its_candidates_is_finite():
    student, teacher = (torch.randn(3, 4) for _ in range(2))
    candidates = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert info_nce(student, teacher, candidates, 0.1).loss.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_what_does_not_count_may_be_anything(kind, filler):
    """Padding, and rows of nothing but it."""
    batch = packed()
    loss = ContrastiveLoss(PAIRS, widths=(5, 7), negatives=kind).double()
    outcomes = []
    for value in (0.0, filler):
        ours, theirs = (states(batch, width, seed).detach() for width, seed in ((5, 0), (7, 1)))
        for each in (ours, theirs):
            each[~batch.mask] = value
        terms = told(loss, ours.requires_grad_(), theirs, batch)
        loss.zero_grad()
        terms.losses["contrastive"].backward()
        assert ours.grad is not None
        assert not ours.grad[~batch.mask].any()
        outcomes.append((terms, ours.grad, [parameter.grad for parameter in loss.parameters()]))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_in_which_nothing_counts_says_nothing(kind):
    batch = batch_of(["....", "...."])
    ours = states(batch, 5, seed=0)
    loss = ContrastiveLoss(PAIRS, widths=(5, 7), negatives=kind).double()
    terms = told(loss, ours, states(batch, 7, seed=1), batch)
    terms.losses["contrastive"].backward()
    assert [value.item() for value in (*terms.losses.values(), *terms.diagnostics.values())] == [0, 0, 0]
    for gradient in (ours.grad, *(parameter.grad for parameter in loss.parameters())):
        assert gradient is not None
        assert not gradient.any()


def test_with_two_tokenizers_states_are_compared_where_both_have_read_the_same():
    pairs = [(0, 0, 0), (0, 2, 1), (0, 5, 3), (1, 1, 0), (1, 3, 1), (1, 4, 2)]
    batch = batch_of(["xxxxxx"] * 2, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]], Pairs(*torch.tensor(pairs).unbind(1)))
    ours, theirs = states(batch, 6, seed=0), states(batch, 6, seed=1)[:, :4].detach()
    texts = [[place for place in pairs if place[0] == row] for row in range(2)]
    documents = [pairs[:3], pairs[3:4], pairs[4:]]
    groups = {"texts": [texts], "tokens": [[[place] for place in document] for document in documents]}
    for kind in KINDS:
        terms = told(ContrastiveLoss(PAIRS, negatives=kind), ours, theirs, batch)
        expected, chance, accuracy = by_hand(ours, theirs, groups[kind], 0.1)
        torch.testing.assert_close(terms.losses["contrastive"], expected)
        assert terms.diagnostics["contrastive chance"].item() == pytest.approx(chance)
        assert terms.diagnostics["contrastive accuracy"].item() == pytest.approx(accuracy)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_own_states_are_all_found_and_lose_less_than_any_like_them(kind):
    """Not 0: other states are a little like them too."""
    batch = batch_of(["xxxxx"] * 4)
    theirs, noise = states(batch, 16, seed=0), states(batch, 16, seed=1)
    loss = ContrastiveLoss(PAIRS, negatives=kind, temperature=0.3)
    groups = {"texts": [[[(row, i, i) for i in range(5)] for row in range(4)]]}
    groups["tokens"] = [[[(row, i, i)] for i in range(5)] for row in range(4)]
    losses = [told(loss, theirs + share * noise, theirs, batch) for share in (0.0, 0.5, 1.0, 2.0)]
    assert losses[0].diagnostics["contrastive accuracy"] == 1
    values = [terms.losses["contrastive"].item() for terms in losses]
    assert values[0] == pytest.approx(by_hand(theirs, theirs, groups[kind], 0.3)[0].item())
    assert 0 < values[0] < values[1] < values[2] < values[3]


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_have_nothing_to_do_with_the_teachers_are_at_chance(kind):
    batch = batch_of(["x" * 40] * 40)
    ours, theirs = states(batch, 1024, seed=0, dtype=torch.float32), states(batch, 1024, seed=1, dtype=torch.float32)
    terms = told(ContrastiveLoss(PAIRS, negatives=kind), ours, theirs, batch)
    assert terms.diagnostics["contrastive chance"].item() == pytest.approx(math.log(40))
    assert terms.losses["contrastive"].item() == pytest.approx(math.log(40), abs=0.15)
    assert terms.diagnostics["contrastive accuracy"].item() < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_states_have_in_common_tells_none_apart(kind):
    """A direction in all states of a model, a thousand times as long; a position that is as much larger."""
    batch = batch_of(["xxxxx"] * 4)
    candidates = torch.ones(4, 4, dtype=torch.bool)
    ours, theirs = states(batch, 16, seed=0)[:, 0], states(batch, 16, seed=1)[:, 0]
    common = 1000 * torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(
        info_nce(ours + common, theirs, candidates, 0.1), info_nce(ours, theirs, candidates, 0.1)
    )
    loss = ContrastiveLoss(PAIRS, negatives=kind)
    ours, theirs = 10 * states(batch, 16, seed=0), 10 * states(batch, 16, seed=1)
    larger = torch.tensor([1000.0, 1, 1, 1, 1], dtype=torch.float64)[:, None]
    plain = told(loss, ours, theirs, batch).losses
    torch.testing.assert_close(told(loss, larger * ours, larger * theirs, batch).losses, plain, rtol=1e-5, atol=0)


def test_what_rounding_makes_of_equal_texts_is_at_chance():
    batch = batch_of(["xxx"] * 3)
    text, noise = states(batch, 8, seed=0, dtype=torch.float32)[:1], states(batch, 8, seed=1, dtype=torch.float32)
    ours = text + 1e-6 * noise
    loss = ContrastiveLoss(PAIRS, negatives="texts")
    value = told(loss, ours, states(batch, 8, seed=2, dtype=torch.float32), batch).losses["contrastive"]
    assert value.item() == pytest.approx(math.log(3), rel=1e-2)


def test_a_single_text_is_known_without_learning():
    batch = batch_of(["xxx"])
    ours = states(batch, 5, seed=0)
    terms = told(ContrastiveLoss(PAIRS, negatives="texts"), ours, states(batch, 5, seed=1), batch)
    terms.losses["contrastive"].backward()
    assert terms.losses["contrastive"] == terms.diagnostics["contrastive chance"] == 0
    assert ours.grad is not None
    assert not ours.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_a_window_are_averaged(kind):
    loss, batches = ContrastiveLoss(PAIRS, negatives=kind), [packed(), batch_of(["xxxxxx", "xx...."])]
    given = [(states(batch, 5, seed), states(batch, 5, seed + 2), batch) for seed, batch in enumerate(batches)]
    alone = [told(loss, *each).losses["contrastive"] for each in given]
    in_window = [told(loss, *each, {"micro_batches": torch.tensor(2)}).losses["contrastive"] for each in given]
    torch.testing.assert_close(sum(in_window), torch.stack(alone).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_it_in_fp32(kind):
    batch = packed()
    ours, theirs = (states(batch, 64, seed, dtype=torch.float32) for seed in range(2))
    loss = ContrastiveLoss(PAIRS, negatives=kind)
    plain = told(loss, ours, theirs, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = told(loss, ours, theirs, batch)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    half_ours, half_theirs = (each.detach().bfloat16().requires_grad_() for each in (ours, theirs))
    wider = ContrastiveLoss(PAIRS, widths=(64, 80), negatives=kind)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = told(loss, half_ours, half_theirs, batch).losses["contrastive"]
        wide = torch.cat([half_theirs, half_theirs[..., :16]], -1)
        projected = told(wider, half_ours, wide, batch).losses["contrastive"]
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, plain.losses["contrastive"], rtol=2e-2, atol=0)
    (narrow + projected).backward()
    for gradient in (half_ours.grad, *(parameter.grad for parameter in wider.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.any()


class Called(TorchDispatchMode):
    """The names of the operations that are called while it lasts."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        if func.overloadpacket.__name__.startswith("index"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_waited_for(kind):
    batch = packed()
    with Called() as called:
        terms = told(ContrastiveLoss(PAIRS, negatives=kind), states(batch, 5, seed=0), states(batch, 5, seed=1), batch)
        terms.losses["contrastive"].backward()
    assert "mm" in called.names or "bmm" in called.names
    assert not called.names & {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"}


def test_auto_compares_texts_where_there_are_enough():
    for rows, kind in ((ENOUGH_TEXTS - 1, "tokens"), (ENOUGH_TEXTS, "texts")):
        batch = batch_of(["xxxx"] * rows)
        given = states(batch, 5, seed=0), states(batch, 5, seed=1), batch
        auto, named = (told(ContrastiveLoss(PAIRS, negatives=negatives), *given) for negatives in ("auto", kind))
        torch.testing.assert_close(auto, named, rtol=0, atol=0)
        chance = {"texts": math.log(rows), "tokens": math.log(4)}[kind]
        assert auto.diagnostics["contrastive chance"].item() == pytest.approx(chance)


def test_a_configuration_is_followed():
    config = Config(contrastive_temperature=0.2, contrastive_negatives="tokens", projection="fixed")
    loss = ContrastiveLoss.of(config, LayerMap(((0, 2), (1, 1)), "0:2,1:1", 4, (8, 16)))
    assert loss.pair == (1, 1)
    assert (loss.of_student.outputs, loss.of_teacher.outputs) == ({1}, {1})
    assert (loss.temperature, loss.negatives) == (0.2, "tokens")
    assert [(p.shape, p.requires_grad) for p in loss.parameters()] == [((16, 8), False)]


@pytest.mark.parametrize("negatives", ["auto", "tokens"])
def test_a_single_text_in_a_batch_is_refused_where_texts_are_asked_for(negatives):
    layer_map = LayerMap(((0, 0),), "0:0", 1, (8, 8))
    with pytest.raises(UsageError, match=r"--contrastive-negatives texts.*at least 2, got --batch-size 1"):
        ContrastiveLoss.of(Config(contrastive_negatives="texts", batch_size=1), layer_map)
    ContrastiveLoss.of(Config(contrastive_negatives="texts", batch_size=2), layer_map)
    ContrastiveLoss.of(Config(contrastive_negatives=negatives, batch_size=1), layer_map)


def model(layers: int, width: int, seed: int) -> GPT2LMHeadModel:
    """Weights large enough that blocks change what they are given."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": 40, "n_positions": 8, "n_embd": width, "n_head": 2, "n_layer": layers}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()


def module_and_teacher() -> tuple[DistillationModule, Teacher]:
    """With the head in no loss, and a projection."""
    student, teacher = model(2, 8, seed=0), model(4, 12, seed=1)
    module = DistillationModule.of(
        Config(kd_weight=0, lm_weight=0, contrastive_weight=0.7, contrastive_negatives="texts"),
        student.double(),
        teacher.double(),
        LayerMap(tuple(PAIRS), "0:1,1:3", 4, (8, 12)),
        ONE_TOKENIZER,
    )
    return module.double(), Teacher(teacher)


def whole_batch() -> Batch:
    """Three rows of each process; the second's have one of nothing but padding."""
    batch = batch_of(["xxxxxxxx", "xxxxx...", "xxxxxx..", "xxx.....", "........", "xxxx...."])
    torch.manual_seed(2)
    inputs = Inputs(torch.randint(40, batch.mask.shape), None)
    return batch._replace(student=inputs, teacher=inputs)


def rows_of(batch: Batch, rank: int) -> Batch:
    """A process's rows, cut to the longest of them."""
    mask = batch.mask.view(RANKS, -1, 8)[rank]
    length = int(mask.sum(1).max())
    inputs = Inputs(batch.student.input_ids.view(RANKS, -1, 8)[rank, :, :length], None)
    return Batch(inputs, mask[:, :length], inputs.input_ids, inputs, None)


def step(forward: Any, module: DistillationModule, teacher: Teacher, batch: Batch, ranks: int) -> dict[str, Any]:
    """Losses of a window of a micro-batch on each process, and the gradients as the engine makes them."""
    counts = {name: ranks * count for name, count in module.count([batch]).items()}
    losses = forward(batch, teacher(batch.teacher, module.of_teacher), counts)
    (ranks * losses.total).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"losses": {n: x.detach() for n, x in losses.flat(1 / ranks).items()}, "gradients": gradients}


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    module, teacher = module_and_teacher()
    ddp = DistributedDataParallel(module, find_unused_parameters=True)  # what comes after the last block
    results = step(ddp, module, teacher, rows_of(whole_batch(), rank), RANKS)
    half = batch_of(["xxxx"] * (ENOUGH_TEXTS // RANKS))
    terms = told(ContrastiveLoss(PAIRS), states(half, 5, seed=rank), states(half, 5, seed=rank + 2), half)
    results["auto"] = terms.diagnostics["contrastive chance"].detach()
    layer_map = LayerMap(((0, 0),), "0:0", 1, (8, 8))
    ContrastiveLoss.of(Config(contrastive_negatives="texts", batch_size=1), layer_map)  # one each is two
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # was once seen to hang where PyTorch takes down what it has for processes, after all was done


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")
def test_two_processes_are_one_with_the_rows_of_both(tmp_path):
    module, teacher = module_and_teacher()
    one = step(module, module, teacher, whole_batch(), 1)
    spawn(run_rank, (tmp_path,), nprocs=RANKS)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for name, value in one["losses"].items():
        torch.testing.assert_close(sum(result["losses"][name] for result in results), value)
    assert one["losses"]["also contrastive chance"].item() == pytest.approx(math.log(5))
    projection = one["gradients"]["components.contrastive.project.weight"]
    assert projection.any()
    for result in results:
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient)
            assert torch.equal(result["gradients"][name], results[0]["gradients"][name])
        assert result["auto"].item() == pytest.approx(math.log(ENOUGH_TEXTS))
    assert not torch.equal(results[0]["losses"]["raw contrastive"], results[1]["losses"]["raw contrastive"])
