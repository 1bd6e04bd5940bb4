"""Shared fixtures, and the grade in pytest's terminal summary."""

from dataclasses import replace
from pathlib import Path

from config import EXPERIMENTS, Config  # before torch, see there

import numpy as np
import pytest
import torch

import checkpoint
import data
import evaluate
from model import MobileNetV3

GRADE = pytest.StashKey[list[str]]()
# A run of some seconds: 500 training and 300 validation images of the synthetic set, 7 steps an epoch.
# The recipe is a named set's, so that a default can be edited and the suite still passes.
TINY = Config(
    **EXPERIMENTS["scratch"] | {"validation_per_class": 3, "batch_size": 64, "epochs": 2},
    dataset="synthetic", images_per_class=8, device="cpu", threads=1, seed=0, compile=False,
)  # fmt: skip
EVERYTHING = {  # the parts of a recipe that hold a state or draw random numbers
    "schedule": "cosine", "warmup_epochs": 1, "lr": 3e-3, "weight_decay": 0.05, "decay_norms": False, "ema": 0.9,
    "label_smoothing": 0.1, "dropout": 0.1, "trivial_augment": 0.5, "cutout": 8, "mixup": 0.2, "cutmix": 1.0,
    "mix_share": 0.5, "small_share": 0.5,
}  # fmt: skip


def pytest_configure() -> None:
    """As the programs do."""
    evaluate.keep_freed_memory()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Settings of a short synthetic run that leaves nothing outside of tmp_path."""
    monkeypatch.setattr(checkpoint, "BEST", tmp_path / "checkpoints" / "best.pth")
    return replace(TINY, runs_dir=str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def cifar100() -> dict[str, np.ndarray]:
    """The official arrays; skips where they cannot be had."""
    path = Path(Config.data_dir) / "cifar100.npz"
    try:
        if not path.exists():
            data.build(path)
        return data.read(path, "train") | data.read(path, "test")
    except data.DataError as error:
        pytest.skip(f"CIFAR-100 is not to be had: {error}")


@pytest.fixture
def network() -> torch.nn.Module:
    """The graded network with random weights and random batch-norm statistics, in eval mode."""
    torch.manual_seed(0)
    network = MobileNetV3()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture(scope="session")
def summary(request: pytest.FixtureRequest) -> list[str]:
    """Lines for the terminal summary; a test that grades writes them."""
    return request.config.stash.setdefault(GRADE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the grade last, also with -q and without -s."""
    lines = terminalreporter.config.stash.get(GRADE, [])
    if lines:
        terminalreporter.section("grade")
        terminalreporter.write_line("\n".join(lines))


def grade_without_data(path: Path) -> str:
    """What can be graded where there is no CIFAR-100."""
    operations, size = evaluate.measure(evaluate.load_network(checkpoint.load(path), path))
    return (
        f"ACCURACY NOT MEASURED: CIFAR-100 CANNOT BE HAD ON THIS MACHINE (graded {path} without it)\n"
        f"flops = {operations}\nModel parameter size = {size:.3f} kB"
    )
