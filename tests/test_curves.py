"""The plot of a run, and runs compared with tools.curves: the table, the notes and the figure."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import checkpoint
from config import Config
from curves import draw_curves
from tools import curves


def history(epochs: int) -> checkpoint.History:
    """A number of its own in each cell; the last epoch is the best."""
    rows = [{name: 10.0 * i + epoch for i, name in enumerate(checkpoint.COLUMNS)} for epoch in range(1, epochs + 1)]
    return [row | {"epoch": epoch} for epoch, row in enumerate(rows, start=1)]


def test_each_column_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_files: set[int]) -> None:
    plot, drawn, rows, expected = Axes.plot, [], history(2), []

    def note(axes: Axes, x: Any, y: Any, *style: Any, **more: Any) -> Any:
        drawn.append((axes.get_ylabel(), x, y))
        return plot(axes, x, y, *style, **more)

    monkeypatch.setattr(Axes, "plot", note)
    draw_curves({"a": rows}, tmp_path / "a.png")
    for axis, name in (("loss", "loss"), ("accuracy (%)", "accuracy")):
        expected += [(axis, [1, 2], [row[f"{part}_{name}"] for row in rows]) for part in ("train", "validation")]
        expected.append((axis, 2, rows[1][f"validation_{name}"]))  # the marker
    assert drawn == expected
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_ino in whole_files


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
    """Also a log alone."""
    labels, legend = [], Figure.legend
    monkeypatch.setattr(
        Figure, "legend", lambda figure, h, names, **more: [labels.extend(names), legend(figure, h, names, **more)][1]
    )
    default = Config(experiment="default")
    a = write_run(tmp_path / "a", default, [10.0, 30.0, 20.0])
    b = write_run(tmp_path / "b", replace(default, epochs=default.epochs + 1), [None, None])
    c = write_run(tmp_path / "c", None, [40.0]) / "log.csv"
    output = tmp_path / "new" / "curves.png"
    assert curves.main([str(a), str(b), str(c), "--output", str(output)]) == 0
    _, *rows, note_a, note_b, last = capsys.readouterr().out.splitlines()
    assert rows[0].split() == [str(a), "3", "2", "30.00", "50.00", "20.00", "1"]
    assert rows[1].split() == [str(b), "2", "2", "-", "50.00", "-", "1"]
    assert (note_a, note_b) == (f"{a}: default", f"{b}: default, epochs={default.epochs + 1}")
    assert rows[2].split()[0] == str(c) and str(output) in last
    assert len(labels) == 3 and all(str(run) in label for run, label in zip((a, b, c), labels, strict=True))


def test_a_folder_without_a_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert curves.main([str(tmp_path), "--output", str(tmp_path / "curves.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "log.csv cannot be used" in line and not (tmp_path / "curves.png").exists()
