"""Run folders and checkpoints: plain types, written whole or not at all, opened without running code, digested."""

import csv
import hashlib
import io
import json
import os
import pickle
import shlex
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from config import MACHINE, Config, restore

FORMAT = 1
BEST = Path("checkpoints/best.pth")
PUBLISHED = Path("checkpoints/published.pth")
LARGEST = 256 * 2**20  # bytes unpacked; ours have 4 to 16 MB
COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "images_per_second",
    "seconds",
)


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or another program's; the message names the file and the cure."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts, with format number and digest."""
    content = {"format": FORMAT, **content}
    content["digest"] = digest(content)
    archive = io.BytesIO()  # torch.save's writer would hide why a file cannot be written
    torch.save(content, archive)
    write_whole(path, lambda file: file.write(archive.getbuffer()))


def load(path: Path) -> dict[str, Any]:
    """Open a checkpoint on the CPU without running any code in it; raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} is not there. Give the path of one that is, or train one: python train.py")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST:
                raise ValueError(f"it unpacks to more than {LARGEST // 2**20} MiB")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "digest" not in content:
            raise ValueError("it was not written by this program")
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}, this program reads {FORMAT}")
        if content.pop("digest") != digest(content):
            raise ValueError("its digest does not match its content")
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError, MemoryError,
            NotImplementedError, OverflowError, pickle.UnpicklingError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to open it all the same
            reason = "it is damaged, or holds more than plain data"
        raise CheckpointError(f"{path} cannot be used: {reason}. Give another one, or an undamaged copy") from error
    return content


def digest(content: dict[str, Any]) -> str:
    """SHA-256 over the names, types, shapes and bytes of everything in a nested dict, in its order."""
    sha = hashlib.sha256()
    for name, value in leaves(content):
        if isinstance(value, Tensor):
            sha.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            sha.update(f"{name}:{value!r};".encode())
    return sha.hexdigest()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The (path, value) of everything in nested dicts and lists that is neither."""
    if isinstance(value, dict | list | tuple) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key!r}")
    else:
        yield name, value


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file, sync it to the disk and give it its name: never a half-written file.

    Raises CheckpointError where the disk is full, the folder read-only or gone; the file before stays as it was.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} cannot be written: {reason}. Stopped; the files before it are whole. Make room or mend the "
            "folder, then run again (a training run with --resume)"
        ) from error


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process alone; raises CheckpointError where another one holds it, or waits for it.

    The system gives the lock back when the process ends, however it ends. Where there is no flock (Windows), nothing
    is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise CheckpointError(f"{folder} is in use by another process: wait for it, or stop it first") from None
    finally:
        os.close(handle)


def new_run(config: Config) -> Path:
    """Make the folder runs/<time>-<experiment>, with the settings in config.json."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.experiment}" + "-synthetic" * (config.dataset == "synthetic")
    folder = Path(config.runs_dir, name)
    while folder.exists():  # another run of the same second
        folder = folder.with_name(folder.name + "+")
    folder.mkdir(parents=True)
    text = json.dumps(asdict(config), indent=1)
    write_whole(folder / "config.json", lambda file: file.write(text.encode()))
    return folder


def run_config(folder: Path, given: dict[str, Any]) -> Config:
    """The settings of the run in `folder`, on the given machine's device, threads and data_dir.

    Raises CheckpointError, also where another given setting differs from the run's.
    """
    try:
        if (folder / "last.pth").exists():
            content = load(folder / "last.pth")
            if not {"state", "history"} <= content.keys():
                raise ValueError("its last.pth is not what a run writes under that name")
            config = restore(content["config"])
        else:
            config = restore(json.loads((folder / "config.json").read_text()))
        config = replace(config, **{name: given[name] for name in MACHINE & given.keys()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is no run that can go on: {error}") from error
    stored = asdict(config)
    differing = [f"{name} {stored[name]} (now {value})" for name, value in given.items() if stored[name] != value]
    if differing:
        raise CheckpointError(f"{folder} was started with other settings: {', '.join(differing)}")
    return config


def summary(folder: Path) -> str:
    """What a finished run gave, where it is, and what to type next."""
    best = load(folder / "best.pth")
    accuracy = best["metrics"]["validation_accuracy"]
    data_dir = best["config"]["data_dir"]
    elsewhere = f" --data_dir {shlex.quote(data_dir)}" * (data_dir != Config.data_dir)
    validated = "the last, without validation" if accuracy is None else f"validation accuracy {accuracy:.2f} %"
    return (
        f"Best epoch: {best['epoch']} of {best['config']['epochs']} ({validated})\n"
        f"Log, curves and checkpoints: {folder}\n"
        f"Grade it: python evaluate.py --checkpoint {shlex.quote(str(folder / 'best.pth'))}{elsewhere}"
    )


def save_epoch(
    folder: Path, config: Config, history: list[dict[str, Any]], state: dict[str, Any], best: dict[str, Any] | None
) -> None:
    """Write last.pth, log.csv and, from the weights `best`, best.pth (on real data also for the next grading).

    last.pth, from which a run goes on, comes after best.pth: a run killed between them repeats the epoch and
    writes the same best.pth again. What lies outside of the run's folder is written last.
    """
    common = {
        "config": asdict(config),
        "epoch": len(history),
        "metrics": history[-1],
        "torch": str(torch.__version__),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    if best is not None:
        save(folder / "best.pth", common | {"weights": best})
    save(folder / "last.pth", common | {"state": state, "history": history})
    write_log(folder, history)
    if best is not None:
        offer(folder, config)


def offer(folder: Path, config: Config) -> None:
    """Make a run's best weights those that are graded next; of a synthetic run, nothing."""
    if config.dataset != "synthetic":
        BEST.parent.mkdir(exist_ok=True)
        write_whole(BEST, lambda file: file.write((folder / "best.pth").read_bytes()))


def write_log(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write log.csv, a row an epoch, whole: the history in last.pth is its only source."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_whole(folder / "log.csv", lambda file: file.write(text.getvalue().encode()))
