"""Comparing runs: the table, the notes and the figure."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes

import checkpoint
from config import Config, preset
from tools import curves


def write_run(folder: Path, config: Config, accuracies: list[float | None]) -> Path:
    """A run folder of as many epochs as there are validation accuracies."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    rows = []
    for epoch, value in enumerate(accuracies, start=1):
        row = dict.fromkeys(checkpoint.COLUMNS, 1.0) | {"epoch": epoch, "train_accuracy": 50.0}
        rows.append(row | {"validation_loss": value and 1.0, "validation_accuracy": value})
    checkpoint.write_log(folder / "log.csv", rows)
    return folder


def test_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write_run(tmp_path / "a", Config(), [10.0, 30.0, 20.0])
    b = write_run(tmp_path / "b", replace(Config(), epochs=7), [None, None])
    output = tmp_path / "new" / "curves.png"
    assert curves.main([str(a), str(b), "--output", str(output)]) == 0
    _, first, second, *notes = capsys.readouterr().out.splitlines()
    assert first.split() == ["a", "3", "2", "30.00", "50.00", "20.00", "1"]
    assert second.split() == ["b", "2", "2", "-", "50.00", "-", "1"]
    assert notes[:2] == ["a changed nothing", "b changed epochs=7"]
    assert output.read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_each_column_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {name: 10.0 * i + epoch for i, name in enumerate(checkpoint.COLUMNS)} | {"epoch": epoch} for epoch in (1, 2)
    ]
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda axes, x, y, *style, **more: (drawn.append((axes.get_ylabel(), y)), plot(axes, x, y, *style, **more))[1],
    )
    checkpoint.draw_curves({"a": rows}, tmp_path / "a.png")
    columns = {"loss": ("train_loss", "validation_loss"), "accuracy (%)": ("train_accuracy", "validation_accuracy")}
    expected = [(label, [row[name] for row in rows]) for label, names in columns.items() for name in names]
    assert [(label, y) for label, y in drawn if isinstance(y, list)] == expected  # a marker is no list


def test_a_name_with_a_dollar_sign_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / r"cost$\frac$", Config(), [10.0, 30.0])
    assert curves.main([str(run), "--output", str(tmp_path / "curves.png")]) == 0


def test_an_older_runs_missing_setting_is_off(tmp_path: Path) -> None:
    """Also under a setting's old name. A setting that is not known is named."""
    stored = asdict(Config(**preset("result6"), experiment="result6"))
    del stored["trivial_augment"]
    stored["small_share"] = stored.pop("small_fraction")
    folder = write_run(tmp_path / "old", Config(), [10.0])
    (folder / "config.json").write_text(json.dumps(stored))
    assert curves.note("old", folder) == "old changed nothing"
    (folder / "config.json").write_text(json.dumps(stored | {"tutor": "best"}))
    assert curves.note("old", folder).startswith("old: settings unknown (") and "tutor" in curves.note("old", folder)
    (folder / "config.json").write_text("[]")
    assert curves.note("old", folder).startswith("old: settings unknown (")


def test_read_log_gives_the_rows_that_were_written(tmp_path: Path) -> None:
    rows = [dict.fromkeys(checkpoint.COLUMNS, 1 / 3) | {"epoch": epoch} for epoch in (1, 2)]
    checkpoint.write_log(tmp_path / "log.csv", rows)
    assert curves.read_log(tmp_path / "log.csv") == rows


def test_a_folder_that_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No log, a cut one, empty cells, no settings."""

    def error(folder: Path) -> str:
        assert curves.main([str(folder), "--output", str(tmp_path / "curves.png")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "log.csv cannot be used" in error(tmp_path)
    log = write_run(tmp_path / "a", Config(), [10.0, 30.0]) / "log.csv"
    whole = log.read_text()
    for damaged in (whole.rpartition(",1.0,")[0], whole.replace("50.0", "", 1), whole.replace("30.0", "")):
        log.write_text(damaged)
        assert error(log.parent).endswith("cells are empty")
    log.write_text(whole)
    (log.parent / "config.json").unlink()
    assert "config.json" in error(log.parent)
    assert not (tmp_path / "curves.png").exists()
