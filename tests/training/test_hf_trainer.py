"""DistillationTrainer: its losses by hand, and what transformers' Trainer promises, kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from fastdistill.training.capture import Wanted, capturing
from fastdistill.training.hf_trainer import DistillationTrainer
from fastdistill.training.models import parts
from fastdistill.training.objective import Losses

README = Path(__file__).resolve().parents[2] / "README.md"
VOCAB, WIDTH = 40, 16
LENGTHS = (12, 5, 9, 2, 7, 12, 3, 8)
ALL_THREE = {"kd_weight": 0.3, "lm_weight": 0.6, "layerwise_weight": 0.5, "temperature": 3.0, "layer_map": "0:1,1:3"}


def gpt2(layers: int, seed: int, *, width: int = WIDTH, dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": width, "n_head": 2, "n_layer": layers}
    shape |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def llama(layers: int, seed: int) -> LlamaForCausalLM:
    """Rotary positions, and a head of its own: what a text is to it does not depend on where it begins."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCAB, num_hidden_layers=layers, tie_word_embeddings=False))


def rows() -> Any:
    """Texts of unlike lengths; in the second, two tokens are only read."""
    torch.manual_seed(2)
    texts = [torch.randint(VOCAB, (length,)) for length in LENGTHS]
    labels = [text.clone() for text in texts]
    labels[1][:2] = -100
    return [{"input_ids": text, "labels": label} for text, label in zip(texts, labels, strict=True)]


def padded(side: str, *, filler: int = 7) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
    """A collator: rows filled up on one side."""

    def collate(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in some)

        def batch(name: str, value: int) -> Tensor:
            room = [longest - len(row[name]) for row in some]
            return torch.stack(
                [
                    F.pad(row[name], (size, 0) if side == "left" else (0, size), value=value)
                    for row, size in zip(some, room, strict=True)
                ]
            )

        some = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in some]
        return {
            "input_ids": batch("input_ids", filler), "labels": batch("labels", -100),
            "attention_mask": batch("attention_mask", 0),
        }  # fmt: skip

    return collate


def make(
    folder: Path, student: PreTrainedModel, teacher: PreTrainedModel, *, side: str = "right", **given: Any
) -> DistillationTrainer:
    """A trainer on the CPU; of what is given, that which TrainingArguments knows is for it."""
    arguments = {name: given.pop(name) for name in list(given) if hasattr(TrainingArguments, name)}
    defaults: dict[str, Any] = {
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 1e-2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "max_steps": 4,
    }  # fmt: skip
    return DistillationTrainer(
        student,
        TrainingArguments(str(folder), **(defaults | arguments)),
        teacher=teacher,
        **({"train_dataset": rows(), "eval_dataset": rows()[:7], "data_collator": padded(side)} | given),
    )


def losses_of(trainer: DistillationTrainer, batch: dict[str, Tensor]) -> tuple[Tensor, Losses]:
    result = trainer.compute_loss(trainer.module.student, batch, return_outputs=True)
    assert isinstance(result, tuple)
    return result


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def lines(trainer: DistillationTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def by_hand(student: PreTrainedModel, teacher: PreTrainedModel, some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The components of `ALL_THREE` on whole logits, each row by itself without padding."""
    kd, lm, layerwise, tokens, states = torch.zeros(5, dtype=student.dtype).unbind()
    for row in some:
        ids = row["input_ids"][None]
        seen = []
        for model, blocks in ((student, [0, 1]), (teacher, [1, 3])):
            with capturing(parts(model).blocks, Wanted(outputs=frozenset(blocks))) as captured:
                seen.append((model(input_ids=ids).logits[0, :-1], [captured.outputs[block][0] for block in blocks]))
        (s_logits, s_states), (t_logits, t_states) = seen
        counted = row["labels"][1:] != -100
        log_s, log_t = ((logits[counted] / 3).log_softmax(-1) for logits in (s_logits, t_logits))
        kd = kd + 9 * F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        lm = lm + F.cross_entropy(s_logits, row["labels"][1:], reduction="sum")
        for s, t in zip(s_states, t_states, strict=True):
            s, t = (F.layer_norm(state[1:], (WIDTH,)) for state in (s, t))
            layerwise = layerwise + 0.5 * (s - t).square().mean(-1).sum() / 2
        tokens, states = tokens + counted.sum(), states + len(row["input_ids"]) - 1
    return {"kd": kd / tokens, "lm": lm / tokens, "layerwise": layerwise / states}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_batch_is_its_definition_on_whole_logits(tmp_path, side):
    student, teacher = llama(2, seed=0).double(), llama(4, seed=1).double()
    trainer = make(tmp_path, student, teacher, side=side, layerwise_skip_first=1, **ALL_THREE)
    total, losses = losses_of(trainer, padded(side)(rows()))
    total.backward()
    came = [parameter.grad for parameter in student.parameters()]

    expected = by_hand(student, teacher, rows())
    whole = 0.3 * expected["kd"] + 0.6 * expected["lm"] + 0.5 * expected["layerwise"]
    torch.testing.assert_close(total, whole, check_dtype=False)
    for name, value in expected.items():
        torch.testing.assert_close(losses.raw[name], value.detach(), check_dtype=False)
    for gradient, by_autograd in zip(came, torch.autograd.grad(whole, list(student.parameters())), strict=True):
        torch.testing.assert_close(gradient, by_autograd)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_language_models_loss_is_the_models_own(tmp_path, side):
    student, batch = gpt2(2, seed=0), padded(side)(rows())
    trainer = make(tmp_path, student, gpt2(4, seed=1), kd_weight=0.0, lm_weight=1.0)
    own = dict(batch)
    if side == "left":  # transformers predicts the first token of a text too, from padding
        own["labels"] = batch["labels"].masked_fill(batch["attention_mask"].cumsum(1) <= 1, -100)
    torch.testing.assert_close(trainer.compute_loss(student, batch), student(**own).loss)


def test_ids_without_a_mask_and_positions_that_begin_anew_are_read_as_the_model_reads_them(tmp_path):
    """Two texts in a row that do not see each other."""
    student, (one, two) = gpt2(2, seed=0), rows()[:2]
    ids = torch.cat([one["input_ids"], two["input_ids"]])[None]
    labels = torch.cat([one["labels"], two["labels"]])[None]
    labels[0, len(one["labels"])] = -100
    positions = torch.cat([torch.arange(len(row["labels"])) for row in (one, two)])[None]
    trainer = make(tmp_path, student, gpt2(4, seed=1), layerwise_skip_first=1, **ALL_THREE)
    _, losses = losses_of(trainer, {"input_ids": ids, "labels": labels, "position_ids": positions})
    for name, value in by_hand(student, trainer.teacher.model, rows()[:2]).items():
        torch.testing.assert_close(losses.raw[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_no_logits_are_made_in_training_or_evaluation(tmp_path):
    student, teacher = gpt2(2, seed=0), gpt2(4, seed=1)
    trainer = make(tmp_path, student, teacher, **ALL_THREE)
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda *_: pytest.fail("a head was called"))
    trainer.train()
    trainer.evaluate()


def test_one_by_four_is_four_by_one(tmp_path):
    runs = []
    for size in (1, 2, 4):
        student = gpt2(2, seed=0)
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make(tmp_path, student, gpt2(4, seed=1), max_steps=3, optim="sgd", **arguments, **ALL_THREE)
        trainer.train()
        runs.append((weights(student), lines(trainer)))
    for state, log in runs[:2]:
        for name, value in runs[-1][0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
        for line, expected in zip(log, runs[-1][1], strict=True):
            assert line == pytest.approx(expected, rel=1e-4)


def test_the_logged_components_are_means_since_the_last_line_and_add_up_to_the_loss(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd", **ALL_THREE}
    every, second = (
        make(tmp_path, gpt2(2, seed=0), gpt2(4, seed=1), logging_steps=steps, **settings) for steps in (1, 2)
    )
    every.train()
    second.train()
    names = {"kd_loss": 0.3, "lm_loss": 0.6, "layerwise_loss": 0.5}
    assert len(lines(second)) == 2
    for i, line in enumerate(lines(second)):
        assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in names.items()), rel=1e-5)
        for name in names:
            both = [lines(every)[2 * i + j][name] for j in (0, 1)]
            assert line[name] == pytest.approx(sum(both) / 2, rel=1e-5)


def test_a_second_run_logs_nothing_of_the_first(tmp_path):
    student = gpt2(2, seed=0)
    trainer = make(tmp_path, student, gpt2(4, seed=1), max_steps=3, logging_steps=2, learning_rate=0.0)
    trainer.train()
    first = lines(trainer)
    trainer.train()
    assert lines(trainer)[-1]["kd_loss"] == pytest.approx(first[-1]["kd_loss"], rel=1e-5)


def test_a_component_of_weight_0_is_neither_computed_nor_logged(tmp_path):
    trainer = make(tmp_path, gpt2(2, seed=0), gpt2(4, seed=1), kd_weight=0.0, lm_weight=1.0, max_steps=1)
    trainer.teacher.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was called"))
    trainer.teacher.parts.base.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was called"))
    trainer.train()
    (line,) = lines(trainer)
    assert line["lm_loss"] == pytest.approx(line["loss"])
    assert not {"kd_loss", "layerwise_loss"} & line.keys()


@pytest.mark.parametrize("side", ["left", "right"])
def test_evaluation_is_the_mean_over_tokens(tmp_path, side):
    student, teacher = llama(2, seed=0), llama(4, seed=1)
    result = make(tmp_path, student, teacher, side=side, **ALL_THREE).evaluate(metric_key_prefix="held_out")
    loss = kl = top1 = tokens = 0.0
    with torch.no_grad():
        for row in rows()[:7]:
            ids, counted = row["input_ids"][None], row["labels"][1:] != -100
            own = student(input_ids=ids, labels=row["labels"][None])
            s, t = (logits[0, :-1][counted] for logits in (own.logits, teacher(input_ids=ids).logits))
            loss, tokens = loss + own.loss * counted.sum(), tokens + counted.sum()
            kl += F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True)
            top1 += (s.argmax(-1) == t.argmax(-1)).sum()
    assert result["held_out_loss"] == pytest.approx(float(loss / tokens), rel=1e-5)
    assert result["held_out_kl"] == pytest.approx(float(kl / tokens), rel=1e-5)
    assert result["held_out_top1_agreement"] == pytest.approx(float(top1 / tokens))


def test_predict_gives_metrics_alone(tmp_path):
    trainer = make(tmp_path, gpt2(2, seed=0), gpt2(4, seed=1))
    output = trainer.predict(rows()[:7])
    assert output.predictions is None
    assert output.metrics is not None
    assert output.metrics["test_loss"] == trainer.evaluate()["eval_loss"]


def test_the_teacher_is_frozen_and_stays_as_it_is(tmp_path):
    teacher = gpt2(4, seed=1, dropout=0.5).train()
    before = weights(teacher)
    trainer = make(tmp_path, gpt2(2, seed=0), teacher, **ALL_THREE)
    trainer.train()
    trainer.evaluate()
    assert not teacher.training
    for name, value in weights(teacher).items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_student_is_saved_alone_and_loads_as_any_model(tmp_path):
    student = gpt2(2, seed=0)
    trainer = make(tmp_path, student, gpt2(4, seed=1), save_strategy="steps", save_steps=4, **ALL_THREE)
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    ids = rows()[0]["input_ids"][None]
    student.eval()
    for folder in ("last", "checkpoint-4"):
        found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        loaded, report = found
        assert not any(report.values())
        assert torch.equal(loaded(input_ids=ids).logits, student(input_ids=ids).logits)
    assert not any("teacher" in path.name for path in tmp_path.rglob("*"))


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    def run(checkpoint: str | None, folder: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        student = gpt2(2, seed=0, dropout=0.2)
        arguments = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        teacher = gpt2(4, seed=1)
        settings = {"per_device_train_batch_size": 2, **arguments, **ALL_THREE}
        trainer = make(tmp_path / folder, student, teacher, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(student), lines(trainer)

    (straight, log), (resumed, its_log) = run(None, "straight"), run(f"{tmp_path}/straight/checkpoint-2", "resumed")
    assert its_log == log
    for name, value in straight.items():
        assert torch.equal(resumed[name], value)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    students = [gpt2(2, seed=0), gpt2(2, seed=0)]
    for student, on in zip(students, (False, True), strict=True):
        trainer = make(tmp_path, student, gpt2(4, seed=1), optim="sgd", gradient_checkpointing=on, **ALL_THREE)
        trainer.train()
        assert student.transformer.gradient_checkpointing == on
    for value, expected in zip(*(weights(student).values() for student in reversed(students)), strict=True):
        torch.testing.assert_close(value, expected)


def test_bf16_is_the_precision_of_the_students_forward_pass_alone(tmp_path):
    student, teacher = gpt2(2, seed=0), gpt2(4, seed=1)
    trainer, whole = (make(tmp_path, model, teacher, bf16=on) for model, on in ((student, True), (gpt2(2, 0), False)))
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen[name].add(output.dtype)

    for name, model in (("student", student), ("teacher", teacher)):
        parts(model).blocks[0].get_submodule("mlp").register_forward_hook(note(name))
    trainer.train()
    result = trainer.evaluate()
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.float32}}
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    whole.train()
    assert result["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kd_weight": -1.0}, "kd_weight must be at least 0, got -1.0"),
        ({"kd_weight": 0.0, "lm_weight": 0.0}, "kd_weight, lm_weight and all other weights are 0"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"layerwise_loss": "l1"}, "layerwise_loss must be one of .*, got 'l1'"),
        ({"layerwise_skip_first": 16}, "layerwise_skip_first must be less than seq_len 16, got 16"),
        ({"layer_map": "0:4"}, "layer_map 0:4: the teacher's blocks are 0 to 3, or -4 to -1, got 4"),
        ({"student": gpt2(2, 0, width=8), "layerwise_weight": 0.5}, r"layerwise_weight must be 0 .* widths \(8, 16\)"),
        ({"student": nn.Linear(2, 2)}, "model must be a PreTrainedModel, got Linear"),
        ({"teacher": nn.Linear(2, 2)}, "teacher must be a PreTrainedModel, got Linear"),
        ({"teacher": gpt2(4, 1).transformer}, "GPT2Model: no base model, list of 4 blocks and linear head"),
        ({"compute_metrics": len}, "compute_metrics must be None, got .*len"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        ({"torch_compile": True}, "torch_compile must be False, got True"),
        (
            {"layerwise_weight": 0.5, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant must be False, got True",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else ", ".join(value),
)
def test_what_cannot_be_is_refused(tmp_path, given, message):
    student, teacher = given.get("student", gpt2(2, seed=0)), given.get("teacher", gpt2(4, seed=1))
    with pytest.raises(ValueError, match=f"^{message}"):
        make(tmp_path, student, teacher, **{k: v for k, v in given.items() if k not in ("student", "teacher")})


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("is_fsdp_enabled", True, "fsdp must be off, got True"),
        ("is_deepspeed_enabled", True, "deepspeed must be off, got True"),
        ("args._n_gpu", 2, "n_gpu must be at most 1, got 2: start one process a GPU, with torchrun"),
    ],
)
def test_what_splits_the_student_is_refused(tmp_path, monkeypatch, attribute, value, message):
    """As it would be found on a machine that has it."""
    trainer = make(tmp_path, gpt2(2, seed=0), gpt2(4, seed=1))
    *parents, name = attribute.split(".")
    monkeypatch.setattr(trainer.args if parents else trainer, name, value)
    with pytest.raises(ValueError, match=message):
        trainer._check_arguments(False)


def test_a_model_is_not_its_own_teacher(tmp_path):
    model = gpt2(2, seed=0)
    with pytest.raises(ValueError, match="teacher must be another model than the student"):
        make(tmp_path, model, model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": None}, "a batch must have input_ids and labels, .* got attention_mask, input_ids"),
        ({"token_type_ids": torch.zeros(8, 12)}, "a batch must have .* got .*, token_type_ids"),
        ({"input_ids": torch.full((8, 12), 39)}, "input_ids must be below 30, the smaller of the two .* got 39"),
        ({"labels": torch.full((8, 12), 38)}, "labels must be below 30, the smaller of the two .* got 38"),
    ],
    ids=["no labels", "unknown", "ids", "labels"],
)
def test_a_batch_that_cannot_be_read_is_refused(tmp_path, changed, message):
    student, teacher = gpt2(2, seed=0), gpt2(4, seed=1)
    teacher.resize_token_embeddings(30)
    few = {
        name: value % 30 if name == "input_ids" else value.clamp(max=29)
        for name, value in padded("right")(rows()).items()
    }
    batch = {name: value for name, value in (few | changed).items() if value is not None}
    trainer = make(tmp_path, student, teacher)
    trainer.compute_loss(student, few)
    with pytest.raises(ValueError, match=message):
        trainer.compute_loss(student, batch)


def test_an_evaluation_without_a_token_is_refused(tmp_path):
    nothing: Any = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows()]
    with pytest.raises(ValueError, match="Evaluation: the data set must have tokens to predict, got none"):
        make(tmp_path, gpt2(2, seed=0), gpt2(4, seed=1)).evaluate(nothing)


def test_the_readme_example_runs_and_learns(teacher_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README.read_text().split("## Inside transformers' Trainer")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    rows = [{"input_ids": tokenizer(text)["input_ids"][:16]} for text in text_file.read_text().split("\n\n")]
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    student = AutoModelForCausalLM.from_pretrained(teacher_folder, num_hidden_layers=2)
    before = weights(student)
    names = {
        "student": student,
        "teacher": teacher,
        "tokenizer": tokenizer,
        "train_rows": rows[4:],
        "held_out": rows[:4],
    }
    exec(code[1], names)
    history = names["trainer"].state.log_history
    losses = [line["eval_loss"] for line in history if "eval_loss" in line]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert all(not torch.equal(value, before[name]) for name, value in weights(student).items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/student")
