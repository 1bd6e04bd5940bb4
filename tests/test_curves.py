"""The picture of a run."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import checkpoint
from curves import draw_curves


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


def test_every_run_is_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was not validated, and names that begin with _ or hold a $."""
    labels, legend = [], Figure.legend
    monkeypatch.setattr(
        Figure, "legend", lambda self, *args, **more: labels.extend(args[1]) or legend(self, *args, **more)
    )
    unvalidated = [row | {"validation_loss": None, "validation_accuracy": None} for row in history(2)]
    runs = {"_a": history(1), r"$\frac$": history(3), "c": unvalidated}
    draw_curves(runs, tmp_path / "runs.png")
    assert len(labels) == 3 and all(name in label for name, label in zip(runs, labels, strict=True))
