"""Compare runs, or logs as in docs/logs/: python -m tools.curves RUN [RUN ...] draws them and prints a table."""

import statistics
import sys
from contextlib import suppress
from pathlib import Path

from checkpoint import History, best_row, read_log, resumed_config
from config import OneLineParser, describe
from curves import draw_curves
from utils import UserError, program


def table(runs: dict[str, History]) -> str:
    """A line per run: epochs, best epoch, its accuracies in % and their gap, and the median images/s."""
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


@program("tools.curves")
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m tools.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders or logs")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG to write [%(default)s]")
    arguments = parser.parse_args(argv)
    runs = {str(run): read_log(run if run.suffix == ".csv" else run / "log.csv") for run in arguments.runs}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, arguments.output)
    print(table(runs))
    for run in arguments.runs:
        with suppress(UserError):  # it has no last.pth that this version of the program can read
            print(f"{run}: {describe(resumed_config(run, {}))}")
    print(f"Drawn to {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
