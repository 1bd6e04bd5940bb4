"""Comparing runs: the table, the notes and the picture."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import checkpoint
from config import Config
from tools import curves


def write_run(folder: Path, config: Config, accuracies: list[float | None]) -> Path:
    """A run folder of as many epochs as there are validation accuracies."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    rows = []
    for epoch, value in enumerate(accuracies, start=1):
        row = dict.fromkeys(checkpoint.COLUMNS, 1.0) | {"epoch": epoch, "train_accuracy": 50.0}
        rows.append(row | {"validation_loss": value and 1.0, "validation_accuracy": value})
    checkpoint.write_log(folder, rows)
    return folder


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write_run(tmp_path / "a", Config(), [10.0, 30.0, 20.0])
    b = write_run(tmp_path / "b", replace(Config(), epochs=7), [None, None])
    picture = tmp_path / "curves.png"
    assert curves.main([str(a), str(b), "--output", str(picture)]) == 0
    _, first, second, *notes = capsys.readouterr().out.splitlines()
    assert first.split() == ["a", "3", "2", "30.00", "50.00", "20.00", "1"]
    assert second.split() == ["b", "2", "2", "-", "50.00", "-", "1"]
    assert notes[:2] == ["a changed nothing", "b changed epochs=7"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_another_versions_settings_are_named(tmp_path: Path) -> None:
    """Today's defaults say nothing about a run that was made before a setting existed."""
    folder = write_run(tmp_path / "old", Config(), [10.0])
    stored = asdict(Config())
    del stored["small_share"]
    (folder / "config.json").write_text(json.dumps(stored))
    assert curves.note(folder).startswith("old: settings unknown (written by another version")
    assert curves.note(folder).endswith("small_share)")


def test_only_steps_of_the_learning_rate_are_marked() -> None:
    cosine = [1 + math.cos(math.pi * epoch / 130) for epoch in range(130)]
    steps = [0.5 ** (epoch // 38) for epoch in range(130)]
    for rates, marked in ((cosine, []), (steps, [38.5, 76.5, 114.5])):
        axes = Figure().subplots()
        curves.mark_decays(axes, [{"epoch": epoch, "lr": rate} for epoch, rate in enumerate(rates, start=1)])
        assert [line.get_xdata()[0] for line in axes.lines] == marked


def test_a_folder_that_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No log, a cut one, empty cells, no settings."""

    def error(folder: Path) -> str:
        assert curves.main([str(folder), "--output", str(tmp_path / "curves.png")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no log.csv" in error(tmp_path)
    log = write_run(tmp_path / "a", Config(), [10.0, 30.0]) / "log.csv"
    whole = log.read_text()
    for damaged in (whole.rpartition(",1.0,")[0], whole.replace("50.0", "", 1), whole.replace("30.0", "")):
        log.write_text(damaged)
        assert error(log.parent).endswith("cells are empty")
    log.write_text(whole)
    (log.parent / "config.json").write_text("{}")
    assert "experiment" in error(log.parent)
    assert not (tmp_path / "curves.png").exists()
