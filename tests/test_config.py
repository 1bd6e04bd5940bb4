"""Settings: types, ranges, named sets and the command line."""

import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest

from config import EXPERIMENTS, Config, changes, describe_sets, parse_command_line

RECIPE = {f.name for f in fields(Config) if not f.metadata["run"]}
WRONG = {
    int: (1.5, "1", None, True),
    float: ("1", None, True, float("nan")),
    bool: (1, "yes", None),
    str: (1, None, ""),
}


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_field_refuses_wrong_types_and_values(name: str) -> None:
    (f,) = (f for f in fields(Config) if f.name == name)
    bad = list(WRONG[f.type])
    if f.type in (int, float):
        low, high = f.metadata["low"], f.metadata["high"]
        assert -float("inf") < low < high < float("inf"), "a number without a range"
        bad += [f.type(low) - 1, f.type(high) + 1]
    if f.metadata["choices"] or f.metadata["pattern"]:
        bad.append("no such / value")
    for value in bad:
        with pytest.raises(ValueError, match=name) as caught:
            Config(**{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"images_per_class": 20, "validation_per_class": 20},
        {"schedule": "cosine", "lr_step": 3},
    ],
)
def test_contradictions_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_named_set_fixes_the_whole_recipe(name: str) -> None:
    assert EXPERIMENTS[name].keys() == RECIPE
    config = parse_command_line(["--experiment", name]).config
    assert {key: asdict(config)[key] for key in RECIPE} == EXPERIMENTS[name]
    assert changes(config) == {}
    assert changes(replace(config, epochs=7)) == {"epochs": 7}


def test_published_experiments() -> None:
    """Epochs, StepLR and dropout as published."""
    expected = {
        "result1": (100, 40, 0.1, 0.0),
        "result2": (100, 35, 0.1, 0.0),
        "result3": (100, 35, 0.1, 0.2),
        "result4": (100, 35, 0.1, 0.1),
        "result5": (100, 38, 0.5, 0.0),
        "result6": (130, 38, 0.5, 0.0),
    }
    for name, values in expected.items():
        recipe = EXPERIMENTS[name]
        assert (recipe["epochs"], recipe["lr_step"], recipe["lr_gamma"], recipe["dropout"]) == values
        assert (recipe["optimizer"], recipe["lr"], recipe["weight_decay"]) == ("adamw", 1e-2, 1e-4)


def test_a_resumed_runs_settings_are_not_checked_against_the_defaults() -> None:
    """lr_step has no meaning beside the defaults' cosine, but the run may have StepLR."""
    arguments = parse_command_line(["--resume", "runs/x", "--lr_step", "38"])
    assert arguments.given == {"lr_step": 38}


def test_a_folder_that_a_shell_variable_left_empty_is_no_training() -> None:
    assert parse_command_line(["--resume", ""]).resume is not None
    assert parse_command_line(["--publish", ""]).publish is not None


def test_flags_override_a_named_set() -> None:
    arguments = parse_command_line(["--experiment", "result6", "--epochs", "3", "--flip"])
    assert arguments.config == Config(**(EXPERIMENTS["result6"] | {"experiment": "result6", "epochs": 3, "flip": True}))
    assert arguments.given == {"experiment": "result6", "epochs": 3, "flip": True}


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag"],
        ["--epoch", "3"],
        ["--epochs", "many"],
        ["--epochs", "0"],
        ["--lr", "nan"],
        ["--experiment", "result7"],
        ["--device", "tpu"],
        ["--schedule", "cosine", "--lr_step", "4"],
        ["--seeds", "2", "--validation_per_class", "0"],
        ["--resume", "runs/x", "--seeds", "2"],
        ["--resume", "runs/x", "--device", "tpu"],
        ["--publish", "runs/x", "--epochs", "3"],
        ["--seed", "1000000", "--seeds", "2"],
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(flags)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_sets_are_described_with_their_figures() -> None:
    config = EXPERIMENTS["result6"] | {"experiment": "result6"}
    lines = describe_sets({"config": config, "test": {"accuracy": 12.5}}).splitlines()
    (place,) = (i for i, line in enumerate(lines) if line.startswith("result6: "))
    for key, value in EXPERIMENTS["result6"].items():
        assert (f"{key}={value}" in lines[place]) == (value != getattr(Config, key))
    assert "86.95 %" in lines[place + 1]
    assert lines[place + 2].endswith("12.50 %")
    assert sum("measured" in line for line in lines) == 1
    changed = describe_sets({"config": config | {"epochs": 3}, "test": {"accuracy": 12.5}})
    assert "measured" not in changed, "another recipe's figure is not the set's"


def test_help_names_every_setting_and_does_not_import_torch() -> None:
    command = [sys.executable, "-X", "importtime", "train.py", "-h"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(f"--{f.name}" in shown.stdout for f in fields(Config))
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert "argparse" in imported
    assert "torch" not in imported


def test_an_interrupted_program_shows_no_traceback() -> None:
    """Nor one whose reader has gone; anything else does."""
    for code, ending, errors in (
        ("raise KeyboardInterrupt", -signal.SIGINT, ""),
        ("raise ValueError(2)", 1, "ValueError: 2\n"),
    ):
        done = subprocess.run([sys.executable, "-c", f"import config; {code}"], capture_output=True, text=True)
        assert (done.returncode, done.stderr[-14:]) == (ending, errors)
    command = f"{sys.executable} -c 'import config; [print(i, flush=True) for i in range(100000)]' | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
