"""Losses in two processes, under DDP and FSDP2, and a run of DistillationTrainer: as in one with all of the data."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from fastdistill import linear_chunks
from fastdistill.training.blocks import Batch, collate, cut
from fastdistill.training.capture import Wanted
from fastdistill.training.hf_trainer import DistillationTrainer
from fastdistill.training.layerwise import LayerwiseLoss
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.teacher import Teacher
from fastdistill.training.tokens import Tokens
from fastdistill.training.window import Counts

RANKS = 2
LAYER_MAP = [(0, 1), (1, 3)]

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")


def model(layers: int, width: int, seed: int) -> GPT2LMHeadModel:
    """Its head is its embedding, and nothing is dropped out."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": 40, "n_positions": 16, "n_embd": width, "n_head": 2, "n_layer": layers}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()


def module_and_teacher() -> tuple[DistillationModule, Teacher]:
    layerwise = LayerwiseLoss(LAYER_MAP, widths=(16, 24))
    module = DistillationModule(model(2, 16, seed=0), Weights(kd=0.5, lm=0.5, layerwise=0.5), components=[layerwise])
    return module, Teacher(model(4, 24, seed=1))


def batches() -> list[Batch]:
    """One a rank, of unlike lengths."""
    torch.manual_seed(2)
    starts = torch.tensor([0, 10, 4, 9, 3]).cumsum(0)
    blocks = cut((Tokens(torch.randint(40, (26,), dtype=torch.int32), starts, None, None),), 10, "padded")
    return [collate([blocks[2 * rank], blocks[2 * rank + 1]], torch.device("cpu")) for rank in range(RANKS)]


def add_gradients(forward: Callable[..., Any], teacher: Teacher, of: list[Batch], counts: Counts, share: int) -> None:
    """Backward of batches `of`; where processes are averaged, `share` of them make up for it."""
    for batch in of:
        losses = forward(batch, teacher(batch.teacher, Wanted(outputs=frozenset({1, 3}))), counts)
        (losses.total * share).backward()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        grad: Any = parameter.grad
        found[name.removeprefix("module.")] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return found


def sharded(module: DistillationModule) -> Any:
    """Each block a group; embedding, final norm and head, whose weight the loss takes, in the root's."""
    for block in module.parts[0].blocks:
        fully_shard(block)
    return fully_shard(module)


def trainer_run(folder: Path, batch_size: int) -> dict[str, Any]:
    """Three steps on rows of unlike lengths, in as many processes as there are; seven rows are held out."""

    def pad(some: list[Tensor]) -> dict[str, Tensor]:
        ids, labels = (pad_sequence(some, batch_first=True, padding_value=value) for value in (0, -100))
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()}

    torch.manual_seed(3)
    rows: Any = [torch.randint(40, (length,)) for length in (12, 5, 9, 2, 7, 12, 3, 8, 4, 10, 6, 11)]
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=batch_size, per_device_eval_batch_size=2, optim="sgd",
        learning_rate=0.1, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    student, teacher = model(2, 16, seed=0), model(4, 16, seed=1)
    data = {"train_dataset": rows, "eval_dataset": rows[:7], "data_collator": pad}
    trainer = DistillationTrainer(student, arguments, teacher=teacher, layerwise_weight=0.5, **data)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {"weights": student.state_dict(), "lines": lines, "held_out": trainer.evaluate()}


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    module, teacher = module_and_teacher()
    mine, counts = [batches()[rank]], module.count(batches())
    results: dict[str, Any] = {}
    ddp = DistributedDataParallel(copy.deepcopy(module))
    add_gradients(ddp, teacher, mine, counts, RANKS)
    results["ddp"] = gradients(ddp)
    for chunks, max_chunk_bytes in (("one_chunk", 1 << 28), ("many_chunks", 1)):
        linear_chunks.MAX_CHUNK_BYTES = max_chunk_bytes
        fsdp = sharded(copy.deepcopy(module))
        with CommDebugMode() as communication:
            add_gradients(fsdp, teacher, mine, counts, RANKS)
        results[f"fsdp_{chunks}"] = gradients(fsdp)
        results[f"{chunks}_messages"] = {str(op): n for op, n in communication.get_comm_counts().items()}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    results["trainer"] = trainer_run(folder / "trainer", batch_size=2)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    """Of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp_one_chunk", "fsdp_many_chunks"])
def test_two_processes_have_the_gradients_of_one_with_all_of_the_data(results, wrapper):
    module, teacher = module_and_teacher()
    add_gradients(module, teacher, batches(), module.count(batches()), 1)
    expected = gradients(module)
    for result in results:
        assert result[wrapper].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(result[wrapper][name], gradient, rtol=1e-4, atol=1e-7)
            assert torch.equal(result[wrapper][name], results[0][wrapper][name])


def test_a_trainer_in_two_processes_is_one_with_all_of_the_data(results, tmp_path):
    expected = trainer_run(tmp_path, batch_size=4)
    for result in results:
        for name, value in expected["weights"].items():
            torch.testing.assert_close(result["trainer"]["weights"][name], value, rtol=1e-4, atol=1e-6)
        for line, one in zip(result["trainer"]["lines"], expected["lines"], strict=True):
            assert line == pytest.approx(one, rel=1e-4)
        for name in ("eval_loss", "eval_kl", "eval_top1_agreement"):
            assert result["trainer"]["held_out"][name] == pytest.approx(expected["held_out"][name], rel=1e-4)


def test_the_sharded_head_is_gathered_once_whatever_the_chunks(results):
    one, many = (results[0][f"{chunks}_messages"] for chunks in ("one_chunk", "many_chunks"))
    gathers = sum(count for op, count in one.items() if "allgather" in op or "all_gather" in op)
    assert gathers == 2 * len(LAYER_MAP) + 1  # of each block for forward and for backward, of the root once
    assert many == one
