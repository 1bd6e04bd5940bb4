"""Compare runs: python -m tools.curves RUN [RUN ...] draws their loss and accuracy and prints a table."""

import csv
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import checkpoint
from config import OneLineParser, changes, restore

# Told apart by colour-blind readers (Okabe and Ito, 2008); further runs differ by their markers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^Dvp*"
History = list[dict[str, Any]]  # the rows of log.csv; what was not measured is None


def best_row(history: History) -> dict[str, Any]:
    """The first row of the best validation accuracy; the last row where nothing was validated."""
    if history[0]["validation_accuracy"] is None:
        return history[-1]
    return max(history, key=lambda row: row["validation_accuracy"])


def title(config: dict[str, Any], history: History) -> str:
    """Experiment, data and figures of one run."""
    best = best_row(history)
    name = "accuracy" if best["validation_accuracy"] is None else "validation accuracy"
    figure = best["train_accuracy"] if best["validation_accuracy"] is None else best["validation_accuracy"]
    kind = "train " * (best["validation_accuracy"] is None)
    return f"{config['experiment']} on {config['dataset']}: {kind}{name} {figure:.2f} % in epoch {best['epoch']}"


def draw(runs: dict[str, History], heading: str, path: Path) -> None:
    """Write a PNG, 900 pixels wide, with two panels, loss and accuracy over epochs, of one run or several."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(heading, fontsize=11)
    for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy", "%"), strict=True):
        for place, (run, history) in enumerate(runs.items()):
            draw_run(axes, history, name, place, run if len(runs) > 1 else "")
        if len(runs) == 1:
            mark_decays(axes, next(iter(runs.values())))
        axes.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.2)
        if len(runs) == 1:
            axes.legend(fontsize=8)
    if len(runs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    checkpoint.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


def draw_run(axes: Axes, history: History, name: str, place: int, run: str) -> None:
    """Train dashed, validation solid with its best epoch marked; two colours for one run, a colour each for several."""
    epochs, best = [row["epoch"] for row in history], best_row(history)
    colour = COLOURS[place % len(COLOURS)]
    train_colour = colour if run else COLOURS[1]
    dots = "." if len(history) == 1 else ""  # a line of one point is not seen
    values = [row[f"train_{name}"] for row in history]
    axes.plot(epochs, values, "--", marker=dots, color=train_colour, linewidth=1, label=None if run else "train")
    if best["validation_accuracy"] is not None:
        values = [row[f"validation_{name}"] for row in history]
        axes.plot(epochs, values, color=colour, linewidth=1.5, label=run or "validation")
        marker, label = MARKERS[place % len(MARKERS)], f"best epoch {best['epoch']}" if not run else None
        axes.plot(best["epoch"], best[f"validation_{name}"], marker, color=colour, markersize=6, label=label)


def mark_decays(axes: Axes, history: History) -> None:
    """A thin line before each epoch in which the learning rate fell by a step."""
    drops = [(before, after) for before, after in pairwise(history) if after["lr"] < before["lr"]]
    steps = all(after["lr"] < 0.9 * before["lr"] for before, after in drops)
    if steps and len(drops) <= len(history) / 4:  # a smooth schedule has none to show
        for place, epoch in enumerate(after["epoch"] - 0.5 for _, after in drops):
            axes.axvline(epoch, color="0.6", linewidth=0.7, label="learning rate falls" if place == 0 else None)


def table(runs: dict[str, History]) -> str:
    """A line a run: epochs, best epoch, its accuracies in % and their gap, and the median images/s."""
    width = max(map(len, runs))
    lines = [f"{'run':{width}} {'epochs':>6} {'best':>5} {'validation':>10} {'train':>7} {'gap':>7} {'images/s':>8}"]
    for run, history in runs.items():
        best = best_row(history)
        train, validation = best["train_accuracy"], best["validation_accuracy"]
        shown = ("-", "-") if validation is None else (f"{validation:.2f}", f"{train - validation:.2f}")
        speed = statistics.median(row["images_per_second"] for row in history)
        lines.append(
            f"{run:{width}} {len(history):6} {best['epoch']:5} {shown[0]:>10} {train:7.2f} {shown[1]:>7} {speed:8.0f}"
        )
    return "\n".join(lines)


def note(folder: Path) -> str:
    """In which settings a run differs from the set or the defaults that it started from."""
    try:
        differences = changes(restore(json.loads((folder / "config.json").read_text())))
    except ValueError as error:
        return f"{folder.name}: settings unknown ({error})"
    return f"{folder.name} changed {', '.join(f'{k}={v}' for k, v in differences.items()) or 'nothing'}"


def read(folder: Path) -> History:
    """The rows of a run's log.csv as numbers; raises CheckpointError."""
    try:
        with (folder / "log.csv").open() as file:
            rows = [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]
        history = [row | {"epoch": int(row["epoch"])} for row in rows]
        if not history or history[0].keys() != set(checkpoint.COLUMNS):
            raise ValueError("no epoch is finished, or other columns")
        empty = {tuple(name for name, value in row.items() if value is None) for row in history}
        if empty not in ({()}, {("validation_loss", "validation_accuracy")}):
            raise ValueError("cells are empty")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise checkpoint.CheckpointError(f"{folder} has no log.csv that can be drawn: {error}") from error
    return history


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="[%(default)s]")
    arguments = parser.parse_args(argv)
    try:
        names = [folder.name for folder in arguments.runs]
        names = names if len(set(names)) == len(names) else [str(folder) for folder in arguments.runs]
        runs = {name: read(folder) for name, folder in zip(names, arguments.runs, strict=True)}
        heading = "validation (solid, best epoch marked) and train (dashed)"
        if len(runs) == 1:
            heading = title(json.loads((arguments.runs[0] / "config.json").read_text()), *runs.values())
        notes = [note(folder) for folder in arguments.runs]
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        draw(runs, heading, arguments.output)
    except (checkpoint.CheckpointError, OSError, KeyError, TypeError, ValueError) as error:
        print(f"tools.curves: error: {error}", file=sys.stderr)
        return 1
    print(table(runs), *notes, sep="\n")
    print(f"Drawn from {', '.join(f'{folder}/log.csv' for folder in arguments.runs)} to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
