"""A plot of a run: loss and accuracy over the epochs."""

import math
from itertools import cycle
from pathlib import Path

from checkpoint import History, best_row
from utils import atomic_write

# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^Dvp*X"


def draw_curves(runs: dict[str, History], path: Path) -> None:
    """Write a PNG, 900 pixels wide: loss and accuracy in % over epochs, train dashed and validation solid.

    Each run has a colour, and a marker at its best epoch. Raises UserError if the file cannot be written.
    """
    from matplotlib.figure import Figure  # here, as its import takes a second

    legend_rows = math.ceil(len(runs) / 2)
    figure = Figure(figsize=(9, 4.2 + 0.18 * max(0, legend_rows - 3)), layout="constrained")
    if len(runs) > 1:
        figure.suptitle("train dashed, validation solid, its best epoch marked", fontsize=11)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.set(xlabel="epoch", ylabel="accuracy (%)" if name == "accuracy" else name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.2)
        for (run, history), colour, marker in zip(runs.items(), cycle(COLOURS), cycle(MARKERS)):
            epochs, best = [row["epoch"] for row in history], best_row(history)
            dots = "." if len(history) == 1 else ""  # a line of one point cannot be seen
            validated = best["validation_accuracy"] is not None
            train = [row[f"train_{name}"] for row in history]
            label = None if validated and len(runs) > 1 else f"train: {run}"  # the heading says what is dashed
            axes.plot(epochs, train, f"{dots}--", color=colour, linewidth=1, label=label)
            if validated:
                validation = [row[f"validation_{name}"] for row in history]
                axes.plot(epochs, validation, color=colour, label=f"validation: {run}, best in epoch {best['epoch']}")
                axes.plot(best["epoch"], best[f"validation_{name}"], marker, color=colour)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))
