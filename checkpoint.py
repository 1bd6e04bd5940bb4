"""Checkpoints and run folders: plain types, written whole, opened without running code; models from any such file."""

import csv
import io
import re
import textwrap
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import PLAIN, Config
from data import CLASSES, SIDE
from model import Enlarge, build_model
from utils import ROOT, UserError, atomic_write, one_line, shown

History = list[dict[str, Any]]  # a dict per epoch with the columns of log.csv; None where nothing was measured

BEST = ROOT / "checkpoints" / "best.pth"  # the best of the latest run of our network on all of CIFAR-100
PUBLISHED = ROOT / "checkpoints" / "published.pth"
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy",
           "images_per_second", "seconds")  # fmt: skip


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts, whole or not at all. Raises UserError."""
    archive = io.BytesIO()  # torch.save's writer would hide why a file cannot be written
    torch.save(content, archive)
    atomic_write(path, lambda file: file.write(archive.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """Open a file of torch.save on the CPU without running any code in it. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist. Give another file, or train a model: python train.py")
    try:
        if path.is_dir():
            raise ValueError("it is a folder; the weights of a run are in its best.pth")
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    except Exception as error:  # a damaged file raises nearly anything
        # torch's own text advises to open it all the same.
        reason = "it is damaged, or holds more than plain data, as torch.save(model.state_dict(), FILE) writes it"
        if isinstance(error, ValueError | OSError):
            reason = one_line(error)
        raise UserError(f"{path} cannot be used: {reason}. Give another file") from error
    return content


def check_archive(path: Path) -> None:
    """Raise ValueError or BadZipFile unless a file can be opened safely.

    A zip archive, as torch writes it, must be whole and uncompressed: it could unpack to gigabytes.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK":
        return  # torch.save's format before 2020, which torch.load checks itself
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} in it is compressed")
            if member.external_attr & 0x10:  # MS-DOS's mark of a folder: torch would read random memory as its content
                raise ValueError(f"{member.filename} in it is marked as a folder")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} does not match its content")


def tensors_in(content: Any, folder: str = "") -> dict[str, Tensor]:
    """All tensors of nested dicts, each by the keys that lead to it, as in "model/stem.0.weight"."""
    tensors = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        tensors |= {f"{folder}{key}": value} if isinstance(value, Tensor) else tensors_in(value, f"{folder}{key}/")
    return tensors


def load_weights(model: nn.Module, content: dict[str, Any], path: Path, fine_tune: bool = False) -> None:
    """Load the weights in the content of a file: a state dict, nested or with prefixed names as it may be.

    With `fine_tune`, a classifier for another number of classes keeps its random weights. Raises UserError with the
    start of torch's list of what does not fit.
    """
    if isinstance(model, nn.Sequential) and isinstance(model[0], Enlarge):
        model = model[1]
    own, tensors = model.state_dict(), tensors_in(content)
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in tensors if f"/{name}".endswith((f"/{first}", f".{first}"))]
    if not prefixes:
        found = ", ".join(list(tensors)[:3]) or "no tensors"
        raise UserError(f"{path} holds no weights of this model: there is no {first} in it, but {found}. Give another")
    # Of several state dicts, averaged weights come first, then those called weights.
    prefix = min(prefixes, key=lambda prefix: (not re.search("ema|average|swa", prefix), "weights" not in prefix))
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    counters = ("total_ops", "total_params")  # thop's
    weights = {name: tensors[prefix + name] for name in names if "/" not in name and not name.endswith(counters)}
    for name, value in own.items() if fine_tune else ():
        other = name not in weights or weights[name].shape != value.shape
        if other and value.shape[:1] == (CLASSES,):
            weights[name] = value
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)
        raise UserError(f"{path} does not fit the model: {reason}. Give a file of this network") from error


def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint in eval mode, and the file's content. Raises UserError.

    The content's config has at least model, image_size and dataset. A file that this project did not write is taken as
    our network for CIFAR-100.
    """
    content = load(path)
    assumed = {"model": "mobilenetv3", "image_size": 32, "dataset": "cifar100"}
    config = content.get("config")
    ours = isinstance(config, dict) and "experiment" in config  # other programs save a config with other names too
    config = assumed | config if ours else assumed
    try:
        Config(**PLAIN | {name: config[name] for name in assumed})
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}. Give another file") from error
    model = build_model(config["model"], image_size=config["image_size"])
    load_weights(model, content, path)
    with torch.inference_mode():
        if not model.eval()(torch.zeros(1, 3, SIDE, SIDE)).isfinite().all():
            raise UserError(f"{path} cannot be used: its logits are not finite. Give another file")
    return model, content | {"config": config}


def new_run(config: Config) -> Path:
    """Make the folder <runs_dir>/<time>-<experiment>. Raises OSError."""
    name = config.experiment if config.dataset == "cifar100" else f"{config.experiment}-{config.dataset}"
    time = f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # to a microsecond, as several runs may start in the same second
    folder = shown(ROOT / config.runs_dir / f"{time}-{name}")
    folder.mkdir(parents=True)
    return folder


def save_epoch(folder: Path, about: dict[str, Any], history: History, stateful: dict[str, Any]) -> bool:
    """Write log.csv and last.pth, and best.pth if this epoch is the best so far. Returns whether it is.

    last.pth, from which a run is resumed, comes last: a run that is killed before it is written repeats the epoch and
    writes the same files again.
    """
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    common = {**about, "epoch": len(history), "metrics": history[-1], "date": date}
    states = {name: part.state_dict() for name, part in stateful.items()}
    best = best_row(history) is history[-1]
    if best:
        weights = {name: value.cpu() for name, value in states["ema"]["model"].items()}  # for machines without a GPU
        save(folder / "best.pth", common | {"weights": weights})
    write_log(folder / "log.csv", history)
    save(folder / "last.pth", common | {"history": history} | states)
    return best


def resumed_config(folder: Path, given: dict[str, Any]) -> Config:
    """The settings of the run in a folder, with those that flags gave. Raises UserError."""
    try:
        return Config(**load(folder / "last.pth")["config"] | given)
    except (KeyError, TypeError, ValueError) as error:  # as of a run of an older version
        raise UserError(
            f"cannot resume {folder}: its settings do not suit config.py ({one_line(error)}). Its best.pth can be "
            f"graded; to train on, start a new run with --weights {folder}/best.pth"
        ) from error


def restore(folder: Path, stateful: dict[str, Any]) -> History:
    """Give each part of a run the state that it had in the folder's last.pth. Returns the history. Raises UserError."""
    content = load(folder / "last.pth")
    for partial in folder.glob(".*.part"):  # that a killed process left
        partial.unlink(missing_ok=True)
    try:
        for name, part in stateful.items():
            part.load_state_dict(content[name])
        return content["history"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"cannot resume {folder}: last.pth does not fit the code, {one_line(error)}") from error


def best_row(history: History) -> dict[str, Any]:
    """The first row with the best validation accuracy; the last row if nothing was validated."""
    if history[0]["validation_accuracy"] is None:
        return history[-1]
    return max(history, key=lambda row: row["validation_accuracy"])


def write_log(path: Path, history: History) -> None:
    """Write a log.csv, a row per epoch: the history in last.pth is its only source."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def read_log(path: Path) -> History:
    """The rows of a log.csv as numbers. Raises UserError."""
    try:
        with path.open() as file:
            rows = [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]
        if not rows or rows[0].keys() != set(COLUMNS):
            raise ValueError("no epoch is finished, or it has other columns")
        return [row | {"epoch": int(row["epoch"])} for row in rows]
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {one_line(error)}") from error
