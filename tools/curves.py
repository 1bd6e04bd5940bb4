"""Compare runs: python -m tools.curves RUN [RUN ...] draws their loss and accuracy and prints a table."""

import csv
import json
import statistics
import sys
from pathlib import Path

from checkpoint import COLUMNS, CheckpointError, History, best_row, draw_curves
from config import OneLineParser, changes, restore
from utils import program


def read_log(path: Path) -> History:
    """The rows of a log.csv as numbers. Raises CheckpointError."""
    try:
        with path.open() as file:
            rows = [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]
        history = [row | {"epoch": int(row["epoch"])} for row in rows]
        if not history or history[0].keys() != set(COLUMNS):
            raise ValueError("no epoch is finished, or other columns")
        empty = {tuple(name for name, value in row.items() if value is None) for row in history}
        if empty not in ({()}, {("validation_loss", "validation_accuracy")}):
            raise ValueError("cells are empty")
    except (OSError, ValueError, OverflowError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    return history


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


def note(name: str, folder: Path) -> str:
    """The settings in which a run differs from the preset or the defaults that it started from."""
    try:
        differences = changes(restore(json.loads((folder / "config.json").read_text())))
    except ValueError as error:
        return f"{name}: settings unknown ({error})"
    return f"{name} changed {', '.join(f'{k}={v}' for k, v in differences.items()) or 'nothing'}"


@program("tools.curves")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG to write [%(default)s]")
    arguments = parser.parse_args(argv)
    names = [folder.name for folder in arguments.runs]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in arguments.runs]
    runs = {name: read_log(folder / "log.csv") for name, folder in zip(names, arguments.runs, strict=True)}
    notes = [note(name, folder) for name, folder in zip(names, arguments.runs, strict=True)]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, arguments.output)
    print(table(runs), *notes, sep="\n")
    print(f"Drawn from {', '.join(f'{folder}/log.csv' for folder in arguments.runs)} to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
