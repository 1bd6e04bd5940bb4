"""Comparing runs with tools.curves: the table, the notes and the figure."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import checkpoint
from config import Config
from tools import curves


def write_run(folder: Path, config: Config | None, accuracies: list[float | None]) -> Path:
    """A run folder of as many epochs as there are validation accuracies; without a config it has no last.pth."""
    folder.mkdir()
    rows = []
    for epoch, value in enumerate(accuracies, start=1):
        row = dict.fromkeys(checkpoint.COLUMNS, 1.0) | {"epoch": epoch, "train_accuracy": 50.0}
        rows.append(row | {"validation_loss": value and 1.0, "validation_accuracy": value})
    checkpoint.write_log(folder / "log.csv", rows)
    if config:
        checkpoint.save(folder / "last.pth", {"config": asdict(config)})
    return folder


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose name begins with _, which matplotlib leaves out of a legend, and one without last.pth."""
    labels, legend = [], Figure.legend
    monkeypatch.setattr(
        Figure, "legend", lambda figure, h, names, **more: [labels.extend(names), legend(figure, h, names, **more)][1]
    )
    default = Config()
    a = write_run(tmp_path / "_a", default, [10.0, 30.0, 20.0])
    b = write_run(tmp_path / "b", replace(default, epochs=default.epochs + 1), [None, None])
    c = write_run(tmp_path / "c", None, [40.0])
    output = tmp_path / "new" / "curves.png"
    assert curves.main([str(a), str(b), str(c), "--output", str(output)]) == 0
    _, *rows, note_a, note_b, last = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["_a", "3", "2", "30.00", "50.00", "20.00", "1"]
    assert rows[1].split() == ["b", "2", "2", "-", "50.00", "-", "1"]
    assert (note_a, note_b) == ("_a: default", f"b: default, epochs={default.epochs + 1}")
    assert rows[2].split()[0] == "c" and str(output) in last
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [name for name in ("_a", "b", "c") if any(f": {name}" in label for label in labels)] == ["_a", "b", "c"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = []
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        folders.append(str(write_run(tmp_path / parent / "run", None, [10.0])))
    assert curves.main([*folders, "--output", str(tmp_path / "curves.png")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == folders


def test_a_folder_without_a_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert curves.main([str(tmp_path), "--output", str(tmp_path / "curves.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "log.csv cannot be used" in line and not (tmp_path / "curves.png").exists()
