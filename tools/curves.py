"""Draw a run's loss and accuracy curves."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

import checkpoint

matplotlib.use("Agg")
BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by colour-blind readers (Okabe and Ito, 2008)


def draw(history: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG with two panels, loss and accuracy over epochs, of the rows of a run's log."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    epochs = [row["epoch"] for row in history]
    validated = history[0]["validation_accuracy"] is not None
    best = max(history, key=lambda row: row["validation_accuracy"]) if validated else history[-1]
    for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy", "%"), strict=True):
        for before, after in pairwise(history):
            if after["lr"] < 0.9 * before["lr"]:
                axes.axvline(before["epoch"] + 0.5, color="0.85", linewidth=0.8)
        axes.plot(epochs, [row[f"train_{name}"] for row in history], "--", color=ORANGE, label="train")
        if validated:
            axes.plot(epochs, [row[f"validation_{name}"] for row in history], color=BLUE, label="validation")
            axes.plot(best["epoch"], best[f"validation_{name}"], "o", color=BLUE, label=f"best epoch {best['epoch']}")
        axes.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axes.legend()
    checkpoint.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))
