"""The command line: what it takes, and the one line that it answers to a mistake."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastdistill.training.config import PRESETS, Config, UsageError, open_output, parse


def test_flags_change_the_preset_and_the_preset_the_defaults():
    config = parse(["--preset", "demo", "--batch-size", "3", "--no-baseline"])
    assert (config.batch_size, config.baseline) == (3, False)
    assert config.max_steps == PRESETS["demo"]["max_steps"]
    assert config.clip == Config().clip


def test_without_arguments_it_is_the_demo():
    assert parse([]) == parse(["--preset", "demo"])


def test_every_preset_is_a_configuration_for_any_teacher():
    for name, settings in PRESETS.items():
        config = parse(["--preset", name, "--teacher", "some/model", "--student", "another/model"])
        assert dataclasses.asdict(config) == dataclasses.asdict(Config()) | settings | {
            "teacher": "some/model",
            "student": "another/model",
        }


def test_a_teacher_of_ones_own_is_not_distilled_as_the_demo():
    config = parse(["--teacher", "some/model", "--lr", "1e-4"])
    assert config == Config(teacher="some/model", lr=1e-4)
    assert parse(["--preset", "demo", "--teacher", "some/model"]).max_steps == PRESETS["demo"]["max_steps"]


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    usage = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in usage for field in dataclasses.fields(Config))


def test_a_config_file_is_a_base_for_flags(tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"batch_size": 2, "max_steps": None, "lr": 1}))
    config = parse(["--config", str(file), "--lr", "0.5"])
    assert (config.batch_size, config.max_steps, config.lr, config.baseline) == (2, None, 0.5, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batchsize", "2"], "unknown argument --batchsize: did you mean --batch-size?"),
        (["--preset", "dmeo"], "--preset dmeo is not known: did you mean demo?"),
        (["--batch-size", "two"], "--batch-size.*'two'"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--grad-accum", "-1"], "--grad-accum must be at least 1, got -1"),
        (["--lr", "0"], "--lr must be greater than 0, got 0"),
        (["--lr", "nan"], "--lr must be finite, got nan"),
        (["--temperature", "-2"], "--temperature must be greater than 0, got -2"),
        (["--kd-weight", "-1"], "--kd-weight must be at least 0, got -1"),
        (["--divergence", "kl"], "--divergence must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        (["--projection", "free"], "--projection must be one of learned, fixed, got 'free'"),
        (
            ["--layerwise-loss", "mse"],
            "--layerwise-loss must be one of layer_norm, teacher_rms, cosine, raw, got 'mse'",
        ),
        (["--layerwise-skip-first", "-1"], "--layerwise-skip-first must be at least 0, got -1"),
        (
            ["--seq-len", "16", "--layerwise-skip-first", "16"],
            "--layerwise-skip-first must be less than --seq-len 16, got 16",
        ),
        (["--seq-len", "1"], "--seq-len must be at least 2"),
        (["--data-share", "1.5"], r"--data-share must be in \(0, 1\], got 1.5"),
        (["--kd-weight", "0", "--lm-weight", "0", "--layerwise-weight", "0"], "are all 0"),
        (["--resume"], "--resume needs --output-dir"),
        (["--config", "no-such.json"], "--config no-such.json: No such file"),
        (["--config", "a.json", "--preset", "demo"], "--preset and --config are both given"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"batch_siez": 2}', "unknown key 'batch_siez': did you mean batch_size?"),
        ('{"batch_size": "2"}', "batch_size must be int, got '2'"),
        ('{"baseline": 1}', "baseline must be bool, got 1"),
        ('{"batch_size": null}', "batch_size must be int, got None"),
        ("[1]", "must hold a JSON object, got list"),
        ("{", "is not JSON"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path, content, message):
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        parse(["--config", str(file)])
    assert str(file) in str(caught.value)


def test_a_run_is_resumed_with_its_own_settings(tmp_path):
    begun = parse(["--lr", "0.25", "--stop-at", "7", "--output-dir", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(begun)))
    resumed = parse(["--resume", "--output-dir", str(tmp_path), "--save-steps", "3"])
    assert resumed == dataclasses.replace(begun, resume=True, stop_at=None, save_steps=3)


def test_resuming_changes_nothing_that_the_numbers_depend_on(tmp_path):
    begun = parse(["--output-dir", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(begun)))
    with pytest.raises(UsageError, match=r"--lr 0.25 differs from the 0.0005 that the run in .* began with"):
        parse(["--resume", "--output-dir", str(tmp_path), "--lr", "0.25"])


def test_there_must_be_a_run_to_resume(tmp_path):
    with pytest.raises(UsageError, match=f"there is no run in {tmp_path}"):
        parse(["--resume", "--output-dir", str(tmp_path)])


def test_a_run_goes_on_with_another_cut_of_the_same_step_and_with_no_other_step(tmp_path):
    open_output(parse(["--output-dir", str(tmp_path), "--batch-size", "8", "--grad-accum", "2"]))
    resume = ["--resume", "--output-dir", str(tmp_path)]
    for flags in (["--batch-size", "4"], ["--grad-accum", "4"], ["--batch-size", "8", "--grad-accum", "3"]):
        with pytest.raises(UsageError, match=r"that the run in .* began with"):
            parse([*resume, *flags])
    config = parse([*resume, "--batch-size", "4", "--grad-accum", "4"])
    assert (config.batch_size, config.grad_accum) == (4, 4)
    open_output(config)
    again = parse(resume)  # it goes on as it last did
    assert (again.batch_size, again.grad_accum, again.resume) == (4, 4, True)
