"""Which settings a resumed run takes over, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import train
import utils
from config import Config
from model import MobileNetV3


def change_settings(folder: Path, **changed: Any) -> None:
    """Change what a run goes on with."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_other_settings_are_refused_on_resuming(tiny: Config) -> None:
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    config = replace(tiny, epochs=1, images_per_class=4)
    assert train.resumed_config(folder, {"epochs": 1}) == config
    with pytest.raises(utils.UserError, match=r"epochs 1 \(now 5\), lr 0.2 \(now 0.1\)"):
        train.resumed_config(folder, {"epochs": 5, "lr": 0.1})
    how = {"device": "auto", "threads": 2, "data_dir": "elsewhere", "compile": True, "tensorboard": True}
    assert train.resumed_config(folder, how) == replace(config, **how)
    train.train(train.resumed_config(folder, {"threads": 2}), folder)
    assert train.resumed_config(folder, {}) == replace(config, threads=2), "the next resume has it too"


def test_settings_edited_in_the_runs_folder_are_refused(tiny: Config) -> None:
    """The schedule in last.pth is that of the settings it was written with."""
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    change_settings(folder, epochs=2)
    with pytest.raises(utils.UserError, match=r"does not fit: it was started with other settings: epochs 1 \(now 2\)"):
        train.train(train.resumed_config(folder, {}), folder)


def test_resuming_after_the_network_was_changed_is_one_line(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    """Other names, other shapes; the run's files stay as they are."""
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for other in (nn.Sequential(MobileNetV3()), MobileNetV3()):
        if isinstance(other, MobileNetV3):
            other.classifier = nn.Linear(960, 50)
        monkeypatch.setattr(train, "build_model", lambda *_, other=other: other)
        assert train.main(["--resume", str(folder)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"train.py: error: {folder} cannot go on, its last.pth does not fit: ")
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_older_run_goes_on_and_a_newer_one_is_refused(tiny: Config) -> None:
    """Settings that it lacks are off, old names are read, unknown ones are named."""
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    settings = json.loads((folder / "config.json").read_text())
    settings["small_share"] = settings.pop("small_fraction")
    del settings["cutout"], settings["trivial_augment"]
    (folder / "config.json").write_text(json.dumps(settings))
    expected = replace(tiny, epochs=1, images_per_class=4, cutout=0, trivial_augment=0.0)
    assert train.resumed_config(folder, {}) == expected
    change_settings(folder, tutor="resnet")
    with pytest.raises(utils.UserError, match=r"cannot go on: config.py does not know tutor"):
        train.resumed_config(folder, {})


def test_resuming_a_folder_without_a_run_is_refused(
    tiny: Config, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    shutil.copy(folder / "best.pth", folder / "last.pth")
    with pytest.raises(utils.UserError, match=r"cannot go on, its last\.pth does not fit"):
        train.train(train.resumed_config(folder, {}), folder)
    (folder / "last.pth").unlink()
    for settings in ("[]", "{", '{"epochs": "many"}'):
        (folder / "config.json").write_text(settings)
        with pytest.raises(utils.UserError, match=r"cannot go on") as caught:
            train.resumed_config(folder, {})
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(utils.UserError, match=r"cannot go on: .*No such file"):
        train.resumed_config(folder.parent, {})
    assert train.main(["--resume", str(folder.parent / "none")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ") and "none" in line
