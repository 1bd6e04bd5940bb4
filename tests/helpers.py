"""What several tests share: explicit settings, a small network, small checkpoints, hostile content."""

import hashlib
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import data
from config import PLAIN, Config
from model import BlockConfig, Hardswish, ReLU

# What thop counts for the published network, its size in kB, its parameters, and a checksum of its modules' names, as
# activations count for nothing in the others. The only place in the tests.
PUBLISHED = (11_776_320, "3814.391", 966_412, 3_010_732_822)

# A run of a second: 200 training and 100 validation images, 12 steps per epoch. Every setting is given, so that the
# tests pass after an edit of any default in config.py.
TINY = Config(
    **PLAIN | {"epochs": 2, "batch_size": 16, "lr": 3e-3, "lr_step": 1, "lr_gamma": 0.5, "validation_per_class": 1},
    experiment="default", dataset="synthetic", images_per_class=3, seed=0, device="cpu", threads=1, compile=False,
    deterministic=False, tensorboard=False, data_dir="/nowhere/data", runs_dir="/nowhere/runs",
)  # fmt: skip
SMALL_BLOCKS = (
    BlockConfig(8, 3, 2, 16, True, ReLU),
    BlockConfig(8, 3, 1, 16, False, Hardswish),  # with a residual
)
FILES = ["best.pth", "curves.png", "last.pth", "log.csv"]  # of a run


class Bomb:
    """Code that runs if it is unpickled."""

    exploded = False

    def __reduce__(self) -> tuple:
        return setattr, (Bomb, "exploded", True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flags(settings: Config | dict[str, Any], **more: Any) -> list[str]:
    """The command line of train.py that gives these settings."""
    settings = asdict(settings) if isinstance(settings, Config) else settings
    words = []
    for name, value in (settings | more).items():
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def write_checkpoint(path: Path, model: nn.Module, dataset: str = "synthetic", **more: Any) -> Path:
    """A checkpoint of the model as a run writes best.pth; `more` replaces parts of it."""
    config = asdict(replace(TINY, dataset=dataset))
    content = {"config": config, "date": "2026-01-01", "epoch": 1, "weights": model.state_dict()}
    checkpoint.save(path, content | more)
    return path


def last(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "last.pth")


def states(folder: Path) -> dict[str, Any]:
    """All that a run is resumed from."""
    return {name: last(folder)[name] for name in ("model", "ema", "optimizer", "scheduler")}


def same(one: Any, other: Any) -> bool:
    """Whether two nests of dicts, lists, tensors and plain values are equal bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def log_rows(folder: Path) -> checkpoint.History:
    """The rows of a run's log.csv without the columns of time."""
    rows = checkpoint.read_log(folder / "log.csv")
    return [{name: row[name] for name in checkpoint.COLUMNS[:-2]} for row in rows]


def in_call(monkeypatch: Any, owner: Any, name: str, number: int, action: Callable[..., Any]) -> None:
    """Let `action` take the place of one call of a function, the one of that number."""
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))
    monkeypatch.setattr(owner, name, lambda *args: (action if next(calls) == number else original)(*args))


def interrupt(*args: Any) -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def official(monkeypatch: Any, folder: Path) -> dict[str, np.ndarray]:
    """Arrays of a small data set that the program takes for CIFAR-100, three per class, written to the folder."""
    arrays = {}
    for seed, name in enumerate(data.SHA256):
        arrays[name] = np.ascontiguousarray(data.synthetic(3, seed).images.permute(0, 2, 3, 1).numpy())
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    monkeypatch.setattr(data, "SHA256", digests)
    folder.mkdir(exist_ok=True)
    np.savez(folder / "cifar100.npz", **arrays)
    return arrays
