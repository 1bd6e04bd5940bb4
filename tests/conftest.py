"""Shared fixtures. The grade comes first, and again in the summary."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import checkpoint
import data
import evaluate
import model as models
import utils
from config import Config
from tests.helpers import PUBLISHED, SMALL_BLOCKS, TINY, write_checkpoint

GRADE = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[GRADE] = []
    utils.keep_freed_memory()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_grade.py")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash[GRADE]:
        terminalreporter.section("grade")
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(autouse=True)
def undo_set_up() -> Iterator[None]:
    """A run sets up its process: each test starts with torch's own settings."""
    threads = torch.get_num_threads()
    yield
    utils.set_up(threads, deterministic=False)
    torch.set_flush_denormal(False)
    torch.backends.cudnn.benchmark = False


@pytest.fixture
def tell(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture):
    """A function that prints lines at once, also without -s and with -q, and again in the summary."""

    def tell(*lines: str) -> None:
        pytestconfig.stash[GRADE] += lines
        with capsys.disabled():
            print("", *lines, sep="\n", flush=True)

    return tell


@pytest.fixture(scope="session")
def network() -> tuple[int, str, int, int]:
    """What the network of model.py measures: operations, size in kB, parameters, checksum of its modules' names."""
    model = models.MobileNetV3()
    operations, size = evaluate.count_cost(model)
    names = " ".join(type(module).__name__ for module in model.modules())
    return operations, f"{size:.3f}", sum(p.numel() for p in model.parameters()), zlib.crc32(names.encode())


@pytest.fixture(scope="session")
def published(network: tuple[int, str, int, int]) -> Path:
    """The published checkpoint; skips if model.py has another network now."""
    if network != PUBLISHED:
        pytest.skip("the shipped files belong to the published network, and model.py has another one now")
    return checkpoint.PUBLISHED


@pytest.fixture(scope="session")
def cifar100() -> str:
    """The folder of the data set; skips if it cannot be had. A damaged file is the test's to find."""
    path = utils.ROOT / Config.data_dir / "cifar100.npz"
    try:
        if not path.exists():
            data.build(path)
    except utils.UserError as error:
        pytest.skip(f"ACCURACY NOT MEASURED: {error}")
    return str(path.parent)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Settings of a short run of a small network that leaves no file outside of tmp_path."""
    monkeypatch.setattr(models, "BLOCKS", SMALL_BLOCKS)
    monkeypatch.setattr(models, "STEM", 8)
    monkeypatch.setattr(models, "HEAD", 32)
    monkeypatch.setattr(checkpoint, "BEST", tmp_path / "checkpoints" / "best.pth")
    (tmp_path / "checkpoints").mkdir()
    return replace(TINY, runs_dir=str(tmp_path / "runs"))


@pytest.fixture
def whole_files(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes of the files that were synced with all their bytes and then renamed: all that is written whole."""
    synced, renamed, fsync, rename = set(), set(), os.fsync, os.replace

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        about = os.fstat(descriptor)
        synced.add((about.st_ino, about.st_size))

    def replace_synced(source: Path, target: Path) -> None:
        about = os.stat(source)
        renamed.discard(about.st_ino)  # of an earlier file, as numbers are used again
        if (about.st_ino, about.st_size) in synced:
            renamed.add(about.st_ino)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace_synced)
    return renamed


@pytest.fixture
def model() -> nn.Module:
    """Random weights, with batch-norm statistics of real activations: otherwise all images look the same to it."""
    torch.manual_seed(0)
    model = models.MobileNetV3().train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        model(data.normalise(data.synthetic(1, seed=3).images))
        model.classifier.weight.mul_(20)
    return model.eval()


@pytest.fixture
def source(model: nn.Module, tmp_path: Path) -> Path:
    """A checkpoint of the model, as a run writes best.pth."""
    return write_checkpoint(tmp_path / "any.pth", model)


@pytest.fixture
def images() -> Tensor:
    """One synthetic image per class, uint8 (100, 3, 32, 32)."""
    return data.synthetic(1, seed=3).images
