"""Settings: types, bounds, presets and the command line."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from config import PLAIN, PRESETS, Config, describe, parse_command_line
from tests.helpers import TINY, flags
from utils import ROOT

NAMES = [f.name for f in fields(Config)]
RECIPE = NAMES[: NAMES.index("experiment")]
RUN = {name: value for name, value in asdict(TINY).items() if name not in RECIPE}
WRONG = {int: (1.5, "1", None, True), float: ("1", None, True, float("nan")), bool: (1, "yes", None), str: (1,)}


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a wrong command line gives."""
    with pytest.raises(SystemExit) as caught:
        parse_command_line(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("train.py: error: ")
    return line


@pytest.mark.parametrize("name", NAMES)
def test_wrong_types_and_values_are_refused(name: str) -> None:
    (f,) = (f for f in fields(Config) if f.name == name)
    bad, limits = list(WRONG[f.type]), f.metadata
    if f.type in (int, float):
        bad += [limits[bound] + step for bound, step in (("min", -1), ("max", 1)) if bound in limits]
    bad += ["", "no such / value"] if limits.keys() & {"choices", "pattern"} else []
    for value in bad:
        with pytest.raises(ValueError, match=name) as caught:
            replace(TINY, **{name: value})
        assert "\n" not in str(caught.value)


def test_no_edit_of_a_default_changes_plain_recipes() -> None:
    assert PLAIN.keys() == set(RECIPE)
    for name in ("teacher", *(f"result{number}" for number in range(1, 7))):
        assert PRESETS[name].keys() == set(RECIPE)
    for preset in PRESETS.values():
        assert replace(TINY, **preset), "its values are valid"


def test_the_reports_experiments_are_as_published_and_as_recorded() -> None:
    changing = ("epochs", "lr_step", "lr_gamma", "dropout")
    for number, values in enumerate(
        [(100, 40, 0.1, 0.0), (100, 35, 0.1, 0.0), (100, 35, 0.1, 0.2), (100, 35, 0.1, 0.1), (100, 38, 0.5, 0.0),
         (130, 38, 0.5, 0.0)], start=1,
    ):  # fmt: skip
        preset = PRESETS[f"result{number}"]
        assert tuple(preset[name] for name in changing) == values
        recorded = json.loads((ROOT / "docs" / "results" / f"result{number}.json").read_text())["config"]
        shared = recorded.keys() & preset.keys()
        assert len(shared) > 15 and all(preset[name] == recorded[name] for name in shared)


def test_flags_override_a_preset_and_a_preset_the_defaults() -> None:
    config, _, given = parse_command_line(flags(RUN, experiment="result6", epochs=50, flip=True))
    assert asdict(config) == RUN | PRESETS["result6"] | {"experiment": "result6", "epochs": 50, "flip": True}
    assert given == RUN | {"experiment": "result6", "epochs": 50, "flip": True}
    assert f"{describe(config)}, ".startswith("result6, epochs=50, flip=True, ")
    assert parse_command_line(flags(TINY))[0] == TINY


def test_a_path_in_a_flag_is_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the repository it is kept relative to it, so that a copy of the repository can resume the run."""
    monkeypatch.chdir(ROOT / "checkpoints")
    assert parse_command_line(flags(TINY, teacher="teacher.pth"))[0].teacher == "checkpoints/teacher.pth"
    monkeypatch.chdir(tmp_path)
    assert parse_command_line(flags(TINY, weights="a.pth"))[0].weights == str(tmp_path / "a.pth")
    assert parse_command_line(flags(TINY))[0].weights == "none"


def test_a_wrong_command_line_is_one_line_and_code_2(capsys: pytest.CaptureFixture) -> None:
    """--epoch: there are no abbreviations."""
    for words in ("--no_such_flag", "no_such_argument", "--epoch=3", "--epochs=many", "--epochs=0", "--pretrained"):
        refused([*flags(TINY), words], capsys)


def test_a_step_that_never_comes_is_refused_with_the_cure(capsys: pytest.CaptureFixture) -> None:
    short = flags(RUN, experiment="result1", epochs=40)
    assert "give --lr_step" in refused(short, capsys)
    assert parse_command_line([*short, "--lr_step", "40"])[0].lr_step == 40, "wanted"


def test_resume_takes_what_may_change_and_says_how_to_train_longer(capsys: Any, monkeypatch: Any) -> None:
    """Also beside defaults that contradict each other."""
    edited = asdict(TINY) | {"model": "mobilenetv3", "pretrained": True}
    monkeypatch.setattr(Config.__init__, "__defaults__", tuple(edited.values()))
    names = ("device", "threads", "data_dir", "compile", "tensorboard")
    given = {name: value for name, value in asdict(TINY).items() if name in names}
    assert parse_command_line(["--resume", "runs/x", *flags(given)]) == (None, Path("runs/x"), given)
    for name in set(NAMES) - set(names):
        line = refused(["--resume", "runs/x", *flags({name: getattr(TINY, name)})], capsys)
        assert f"not {name}. " in line and "--weights runs/x/best.pth" in line
    assert "threads must be between" in refused(["--resume", "runs/x", "--threads=-1"], capsys)
