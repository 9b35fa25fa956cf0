"""The command line: what it takes, and the one line that it answers to a mistake."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from fastdistill.training.command_line import introduction, parse
from fastdistill.training.config import Config, UsageError
from fastdistill.training.presets import PRESETS
from fastdistill.training.run_files import open_output


def test_flags_change_the_preset_and_the_preset_the_defaults():
    config = parse(["--preset", "demo", "--batch-size", "3", "--no-baseline"])
    assert (config.batch_size, config.baseline) == (3, False)
    assert config.max_steps == PRESETS["demo"].settings["max_steps"]
    assert config.clip == Config().clip


def test_without_arguments_it_is_the_demo():
    assert parse([]) == parse(["--preset", "demo"])


def test_every_preset_is_a_configuration_for_any_teacher():
    for name, preset in PRESETS.items():
        config = parse(["--preset", name, "--teacher", "some/model", "--student", "another/model"])
        assert dataclasses.asdict(config) == dataclasses.asdict(Config()) | preset.settings | {
            "preset": name,
            "teacher": "some/model",
            "student": "another/model",
        }


def test_a_preset_is_introduced_with_what_was_changed_of_it(capsys):
    assert introduction(parse(["--teacher", "some/model"])) == ""
    for name, preset in PRESETS.items():
        assert introduction(parse(["--preset", name, "--seed", "3"])) == f"\npreset {name}: {preset.about}"
    changed = introduction(parse(["--preset", "gpt2", "--gradient-checkpointing", "--batch-size", "2"]))
    assert changed.endswith("(of the preset as it stands; changed here: --batch-size, --gradient-checkpointing)")
    with pytest.raises(SystemExit):
        parse(["--help"])
    usage = " ".join(capsys.readouterr().out.split())
    assert all(f"- {name}: {' '.join(preset.about.split())}" in usage for name, preset in PRESETS.items())


def test_a_teacher_of_ones_own_is_not_distilled_as_the_demo():
    config = parse(["--teacher", "some/model", "--lr", "1e-4"])
    assert config == Config(teacher="some/model", lr=1e-4)
    assert parse(["--preset", "demo", "--teacher", "some/model"]).max_steps == PRESETS["demo"].settings["max_steps"]


def test_every_field_is_a_flag_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    usage = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in usage
        assert field.metadata["help"]
        assert " ".join(f"{field.metadata['help']} (default: {field.default})".split()) in usage


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("small.json", '{"batch_size": 2, "max_steps": null, "lr": 1, "weight_decay": 1e-3}'),
        ("small.yaml", "batch_size: 2\nmax_steps: null\nlr: 1\nweight_decay: 1e-3  # no string\n"),
        ("small.yml", "{batch_size: 2, max_steps: ~, lr: 1, weight_decay: .1E-2}"),
    ],
)
def test_a_config_file_is_a_base_for_flags(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    config = parse(["--config", str(tmp_path / name), "--clip", "0.5"])
    assert config == Config(batch_size=2, max_steps=None, lr=1.0, weight_decay=1e-3, clip=0.5)
    assert type(config.lr) is float  # a saved 1 would be another text than a saved 1.0


def test_a_config_file_may_change_a_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: gpt2\nlr: 0.25\n")
    assert parse(["--config", str(tmp_path / "mine.yaml")]) == parse(["--preset", "gpt2", "--lr", "0.25"])


def test_a_saved_configuration_begins_the_same_run_elsewhere(tmp_path):
    for flags in ([], ["--output-dir", str(tmp_path / "run")]):
        begun = parse(["--preset", "gpt2", "--stop-at", "7", "--lr", "1", *flags])
        saved = open_output(dataclasses.replace(begun, output_dir=str(tmp_path / "run"))) / "config.json"
        assert parse(["--config", str(saved)]) == dataclasses.replace(begun, output_dir=None)
        elsewhere = str(tmp_path / "elsewhere")
        assert parse(["--config", str(saved), "--output-dir", elsewhere]).output_dir == elsewhere
        saved.unlink()


def test_a_config_file_may_name_where_its_run_is_kept(tmp_path):
    (tmp_path / "mine.yaml").write_text("output_dir: runs/mine")
    assert parse(["--config", str(tmp_path / "mine.yaml")]).output_dir == "runs/mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batchsize", "2"], "unknown argument --batchsize: did you mean --batch-size?"),
        (
            ["--preset", "dmeo"],
            "--preset must be one of demo, gpt2, postmortem, smollm, got 'dmeo': did you mean demo?",
        ),
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
        (["--kd-weight", "0", "--lm-weight", "0", "--layerwise-weight", "0"], "are 0: nothing would be learned"),
        (["--resume"], "--resume needs --output-dir"),
        (["--no-baseline", "--baseline-steps", "9"], "--baseline-steps 9 needs --baseline"),
        (["--baseline-steps", "0"], "--baseline-steps must be at least 1, got 0"),
        (["--config", "no-such.json"], "--config no-such.json: No such file"),
        (["--config", "a.json", "--preset", "demo"], "--preset and --config are both given"),
        (
            ["--resume", "--output-dir", "a", "--config", "a.json"],
            "--resume goes on with the settings that its run has",
        ),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wrong.json", '{"batch_siez": 2}', "unknown key 'batch_siez': did you mean batch_size?"),
        ("wrong.yaml", "batch-size: 2", "unknown key 'batch-size': did you mean batch_size?"),
        ("wrong.yaml", "1: 2", "unknown key 1"),
        ("wrong.json", '{"batch_size": "2"}', "batch_size must be a whole number, got '2'"),
        ("wrong.json", '{"batch_size": 2.0}', "batch_size must be a whole number, got 2.0"),
        ("wrong.json", '{"batch_size": true}', "batch_size must be a whole number, got True"),
        ("wrong.json", '{"lr": true}', "lr must be a number, got True"),
        ("wrong.yaml", "lr: '1e-3'", "lr must be a number, got '1e-3'"),
        ("wrong.json", '{"baseline": 1}', "baseline must be true or false, got 1"),
        ("wrong.json", '{"batch_size": null}', "batch_size must be a whole number, got None"),
        ("wrong.json", '{"max_steps": "all"}', "max_steps must be a whole number or null, got 'all'"),
        ("wrong.yaml", "layer_map: 1:3", "layer_map must be text, got 63 (in quotes, if it is the text"),
        ("wrong.yaml", "student: no", "student must be text or null, got False"),
        ("wrong.json", "[1]", "must hold settings by name, got [1]"),
        ("wrong.yaml", "- a", "must hold settings by name, got ['a']"),
        ("wrong.yaml", "", "must hold settings by name, got nothing"),
        ("wrong.json", "{", "is not JSON: Expecting property name"),
        ("wrong.yaml", "a: b: c", "is not YAML: mapping values are not allowed here"),
        ("wrong.yaml", "lr: !!python/name:os.system 1", "is not YAML: could not determine a constructor"),
        ("wrong.json", "\xff", "is not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("wrong.toml", "lr = 1", "must be a .json, .yaml or .yml file, got .toml"),
        ("wrong", "lr: 1", "must be a .json, .yaml or .yml file, got no suffix"),
        ("wrong.json", '{"lr": 1, "lr": 2}', "holds lr twice"),
        ("wrong.yaml", "lr: 1\nclip: 1\nlr: 2", "holds lr twice"),
        ("wrong.json", '{"resume": true}', "resume is a flag alone"),
        ("wrong.json", '{"preset": "gpt3"}', "smollm, got 'gpt3': did you mean gpt2?"),
        ("wrong.json", '{"lr": NaN}', "--lr must be finite, got nan"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse(["--config", str(file)])
    assert "\n" not in str(caught.value)


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
