"""Shared fixtures, and the grade in pytest's terminal summary."""

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the programs do, before torch is imported

import numpy as np
import pytest
import torch

import checkpoint
import data
import utils
from config import Config
from model import MobileNetV3
from tests.helpers import SIGNALS, TINY

GRADE = pytest.StashKey[list[str]]()


def pytest_configure() -> None:
    """As the programs do, too."""
    utils.keep_freed_memory()
    torch.set_flush_denormal(True)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Settings of a short synthetic run that leaves nothing outside of tmp_path."""
    monkeypatch.setattr(checkpoint, "BEST", tmp_path / "checkpoints" / "best.pth")
    return replace(TINY, runs_dir=str(tmp_path / "runs"))


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts pytest's own signal handlers back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def logging_again() -> Iterator[None]:
    """The program holds back log lines for its whole process."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def cifar100() -> dict[str, np.ndarray]:
    """The official arrays; skips where they cannot be had, fails where the file is there but damaged."""
    path = Path(Config.data_dir) / "cifar100.npz"
    try:
        if not path.exists():
            data.build(path)
    except data.DataError as error:
        pytest.skip(f"CIFAR-100 cannot be had: {error}")
    return {name: data.read(path, name) for name in data.SHAPES}


@pytest.fixture
def model() -> torch.nn.Module:
    """The model with random weights and batch-norm statistics, in eval mode; its probabilities differ by much."""
    torch.manual_seed(0)
    model = MobileNetV3()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    model.classifier.weight.data.mul_(30)
    return model.eval()


@pytest.fixture(scope="session")
def grade_lines(request: pytest.FixtureRequest) -> list[str]:
    """Lines for the terminal summary; a test that grades writes them."""
    return request.config.stash.setdefault(GRADE, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the grade last, also with -q and without -s."""
    lines = terminalreporter.config.stash.get(GRADE, [])
    if lines:
        terminalreporter.section("grade")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture
def images() -> torch.Tensor:
    """One synthetic image a class, uint8 (100, 3, 32, 32)."""
    return data.synthetic(1, seed=3)[0]
