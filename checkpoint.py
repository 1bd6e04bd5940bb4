"""Checkpoints and run folders: plain types, written whole, opened without running code; logs and their curves."""

import csv
import io
import math
import pickle
import zipfile
from datetime import datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import UserError, atomic_write, one_line, provenance

History = list[dict[str, Any]]  # a dict an epoch with the columns of log.csv; None where nothing was measured

FORMAT = 1
BEST = Path("checkpoints/best.pth")  # the best of the latest training on this machine
PUBLISHED = Path("checkpoints/published.pth")
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
           "images_per_second", "seconds")  # fmt: skip

# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^Dvp*X"


class CheckpointError(UserError):
    """A checkpoint or run is missing, damaged or another program's; the message names the file and the cure."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts, with a format number. Raises UserError."""
    archive = io.BytesIO()  # torch.save's writer would hide why a file cannot be written
    torch.save({"format": FORMAT, **content}, archive)
    atomic_write(path, lambda file: file.write(archive.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """Open a checkpoint on the CPU without running any code in it. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} is not there. Give the path of one that is, or train one: python train.py")
    try:
        if path.is_dir():
            raise ValueError("it is a folder; the weights of a run are in its best.pth")
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it was not written by this version of the program")
        content.pop("digest", None)  # of older files
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to open it all the same
            reason = "it is damaged, or holds more than plain data"
        raise CheckpointError(f"{path} cannot be used: {reason}. Give another one, or an undamaged copy") from error
    return content


def check_archive(path: Path) -> None:
    """Raise ValueError or BadZipFile unless a file is a whole zip archive, uncompressed as torch writes it.

    A compressed one could unpack to gigabytes.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} in it is compressed")
            if member.external_attr & 0x10:  # MS-DOS's mark of a folder: torch would read random memory as its content
                raise ValueError(f"{member.filename} in it is marked as a folder")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} does not match its content")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of any plain state dict or of a run's best.pth, by name, on the CPU.

    Raises CheckpointError.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # optional

            weights = load_file(path)
        else:
            if zipfile.is_zipfile(path):  # older files of torch are not, and cannot be compressed
                check_archive(path)
            weights = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(weights, dict) and "format" in weights:
                weights = load(path).get("weights")
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("it holds no plain state dict")
    except ImportError as error:
        raise CheckpointError("safetensors is not installed. Run: pip install -r requirements-tools.txt") from error
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(f"{path} cannot be used: {one_line(error).split('. ')[0]}. Give another file") from error
    return weights


def new_run(runs_dir: str, name: str) -> Path:
    """Make the folder runs_dir/<time>-<name>."""
    folder = Path(runs_dir, f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another run of the same second
            folder = folder.with_name(folder.name + "+")


def save_epoch(
    folder: Path, settings: dict[str, Any], history: History, state: dict[str, Any], weights: dict[str, Tensor]
) -> bool:
    """Write last.pth, log.csv and, for the best epoch (unvalidated: the last one), best.pth. Returns whether it was.

    last.pth, from which a run goes on, comes after best.pth: a run killed between them repeats the epoch and writes
    the same best.pth again.
    """
    common = {
        "config": settings,
        "epoch": len(history),
        "metrics": history[-1],
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        **provenance(settings["device"]),
    }
    validated = history[-1]["validation_accuracy"] is not None
    best = best_row(history) is history[-1] if validated else len(history) == settings["epochs"]
    if best:
        save(folder / "best.pth", common | {"weights": weights})
    save(folder / "last.pth", common | {"state": state, "history": history})
    write_log(folder / "log.csv", history)
    return best


def load_logits(path: Path) -> Tensor | None:
    """A teacher's logits of an epoch, (batches, N, 100); None where the file is missing or damaged: made anew."""
    try:
        return load(path)["logits"]
    except CheckpointError:
        return None


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint, whole or not at all."""
    target.parent.mkdir(exist_ok=True)
    content = source.read_bytes()
    atomic_write(target, lambda file: file.write(content))


def write_log(path: Path, history: History) -> None:
    """Write a log.csv, a row an epoch: the history in last.pth is its only source."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def best_row(history: History) -> dict[str, Any]:
    """The first row of the best validation accuracy; the last row where nothing was validated."""
    if history[0]["validation_accuracy"] is None:
        return history[-1]
    return max(history, key=lambda row: row["validation_accuracy"])


def draw_curves(runs: dict[str, History], path: Path) -> None:
    """Write a PNG, 900 pixels wide: loss and accuracy in % over epochs, train dashed and validation solid.

    Each run has a colour, and a marker at its best epoch. Raises UserError where it cannot be written.
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
            train, label = [row[f"train_{name}"] for row in history], f"{run}: train"
            hidden = validated and len(runs) > 1  # the heading says what is dashed
            axes.plot(epochs, train, f"{dots}--", color=colour, linewidth=1, label=None if hidden else label)
            if validated:
                validation = [row[f"validation_{name}"] for row in history]
                axes.plot(epochs, validation, color=colour, label=f"{run}: validation, best in epoch {best['epoch']}")
                axes.plot(best["epoch"], best[f"validation_{name}"], marker, color=colour)
    legend = figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a folder's name may have a $
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))
