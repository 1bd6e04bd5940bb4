"""What several tests share: small settings, small checkpoints, a small data set, hostile content."""

import csv
import hashlib
import shutil
import signal
import sysconfig
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import data
import train
from augment import Loader, build_loader
from config import Config, preset
from data import synthetic
from optim import build_criterion

# A run of some seconds: 500 training and 300 validation images of the synthetic set, 7 steps an epoch.
# It starts from a preset, so that a default can be edited and the suite still passes.
TINY = Config(
    **preset("scratch") | {"validation_per_class": 3, "batch_size": 64, "epochs": 2},
    experiment="default", dataset="synthetic", images_per_class=8, seed=0, device="cpu", threads=1, compile=False,
    deterministic=False, tensorboard=False, data_dir="data", runs_dir="runs",
)  # fmt: skip
EVERYTHING = {  # the parts of a recipe that hold a state or draw random numbers
    "schedule": "cosine", "warmup_epochs": 1, "lr": 3e-3, "weight_decay": 0.05, "decay_norms": False, "ema": 0.9,
    "label_smoothing": 0.1, "dropout": 0.1, "trivial_augment": 0.5, "cutout": 8, "mixup": 0.2, "cutmix": 1.0,
    "mix_prob": 0.5, "small_fraction": 0.5,
}  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM)
FILES = ["best.pth", "config.json", "curves.png", "last.pth", "log.csv"]  # of a run
SCRATCH = Path("checkpoints/scratch.pth")  # trained weights, and no temperature
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)
PER_CLASS = {"train": 3, "test": 2}  # images a class of the small data set


def started(config: Config) -> tuple[train.TrainState, Loader]:
    """A run before its first step."""
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    return train.TrainState(config, device), build_loader(config, device)[0]


def train_epochs(state: train.TrainState, loader: Loader, epochs: int) -> list[train.Meter]:
    """Train so many epochs as a run does, without its files."""
    meters, criterion = [], build_criterion(state.config)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        meters.append(train.train_one_epoch(state, loader, criterion))
        state.scheduler.step()
    return meters


class Bomb:
    """Code that runs where it is unpickled."""

    exploded = False

    def __reduce__(self) -> tuple:
        return setattr, (Bomb, "exploded", True)


def write_checkpoint(path: Path, model: nn.Module, dataset: str = "synthetic", **more: Any) -> Path:
    """A checkpoint of the model, as a run writes best.pth; `more` adds to its content, or replaces parts of it."""
    config = asdict(replace(TINY, dataset=dataset, validation_per_class=50, images_per_class=0))
    content = {"config": config, "date": "2026-01-01", "epoch": 1, "weights": model.state_dict()}
    checkpoint.save(path, content | more)
    return path


def small_set() -> dict[str, np.ndarray]:
    """A synthetic stand-in for the official arrays."""
    return {
        f"{source}_images": np.ascontiguousarray(synthetic(per_class, seed=1).images.permute(0, 2, 3, 1).numpy())
        for source, per_class in PER_CLASS.items()
    }


def taken_for_official(arrays: dict[str, np.ndarray]) -> Any:
    """A context in which the program takes these arrays' shapes and digests for the official ones."""
    digests = {name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in data.SHA256}
    shapes = {name: array.shape for name, array in arrays.items()}
    return mock.patch.multiple(data, SHA256=digests, SHAPES=shapes)


def digest(content: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of everything in nested dicts and lists, in their order."""
    if isinstance(content, torch.Tensor):
        content = str(content.dtype), tuple(content.shape), content.contiguous().view(-1).view(torch.uint8).numpy()
        return hashlib.sha256(repr(content[:2]).encode() + content[2].tobytes()).hexdigest()
    if isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        content = [type(content), [(key, digest(value)) for key, value in items]]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def call_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, action: Any) -> None:
    """Let the function `name` of `owner` do what it does, and call `action` in its call of that number."""
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def counted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == count:
            action()
        return original(*arguments, **more)

    monkeypatch.setattr(owner, name, counted)


def end_state(folder: Path) -> str:
    """A digest of all that a run goes on with."""
    return digest(checkpoint.load(folder / "last.pth")["state"])


def flags(**settings: Any) -> list[str]:
    """The command line of train.py that gives these settings."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif (name, value) != ("experiment", "default"):  # which is no preset
            words += [f"--{name}", str(value)]
    return words


def log_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv without the columns of time."""
    with (folder / "log.csv").open() as file:
        timing = ("seconds", "images_per_second")
        return [{name: cell for name, cell in row.items() if name not in timing} for row in csv.DictReader(file)]


def made_up_latency(checkpoint_sha256: str) -> dict[str, Any]:
    """What docs/results/latency.json could hold: figures of no machine."""

    def file(size: int, ms: float) -> dict[str, Any]:
        threads = {"1": {"ms": ms, "images_per_second": 2000 / ms}, "8": {"ms": ms / 4, "images_per_second": 8000 / ms}}
        return {"bytes": size, "threads": threads}

    return {
        "machine": "a box, 8 threads", "torch": "2.9", "onnxruntime": "1.30", "date": "2026-02-03",
        "checkpoint": "any.pth", "checkpoint_sha256": checkpoint_sha256, "threads": 8, "batch_size": 64,
        "files": {"torch": file(4_000_000, 8.0), "float32": file(3_900_000, 4.0), "int8": file(1_200_000, 2.0)},
        "floor": {
            "batch_size": 128, "operations": 8_000_000_000, "bytes": 2_000_000_000, "operations_per_second": 200e9,
            "bytes_per_second": 20e9, "step_seconds": 0.21, "floor_seconds": 0.14, "times_floor": 1.5,
        },
        "processes": {"one": 2_000.0, "several": 2_100.0, "count": 4},
    }  # fmt: skip


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Three synthetic images, in the layout of the files and in the model's."""
    planes = synthetic(1, seed=5)[0][[3, 50, 99]]
    return planes.permute(0, 2, 3, 1).contiguous(), planes


def tempered(planes: torch.Tensor, model: nn.Module, temperature: float) -> torch.Tensor:
    """Probabilities (N, 100) of the model for uint8 (N, 3, 32, 32), by hand."""
    with torch.inference_mode():
        return (model(data.normalise(planes)) / temperature).softmax(1)


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator with that seed."""
    return torch.Generator().manual_seed(seed)
