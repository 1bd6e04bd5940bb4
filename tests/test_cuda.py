"""Training and grading on a GPU; all of it is skipped without CUDA."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import augment
import evaluate
import train
from augment import Loader
from config import Config
from data import load_training
from model import MobileNetV3
from tests.helpers import TINY, seeded, write_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")
BFLOAT16 = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
RECIPE = {"batch_size": 64, "images_per_class": 8, "validation_per_class": 3, "ema": 0.9, "label_smoothing": 0.1,
          "flip": True, "crop_padding": 4, "trivial_augment": 1.0, "lr": 1e-3}  # fmt: skip


def second_loss(seed: int, device: torch.device, amp: bool = False, compiled: bool = False) -> float:
    """The loss of the second epoch, on batches that a CPU made: a GPU draws other random numbers."""
    config = replace(TINY, **RECIPE, seed=seed)
    batches = [(x.to(device), y.to(device)) for x, y in Loader(load_training("synthetic", "", 3, 8)[0], config)]
    torch.manual_seed(seed)
    model = MobileNetV3().to(device, memory_format=torch.channels_last)
    loader, ema = MagicMock(batch_size=64), train.EMA(model, 0.9)
    loader.__len__.return_value, loader.__iter__.side_effect = len(batches), lambda: iter(batches)
    optimizer, criterion = train.build_optimizer(model, config), train.build_criterion(config, device)
    wrapped = torch.compile(model, dynamic=False, mode="reduce-overhead") if compiled else model
    losses = [train.train_one_epoch(wrapped, loader, criterion, optimizer, ema, amp)[0] for _ in range(2)]
    return losses[1]


@pytest.fixture
def sync_mode() -> Iterator[Any]:
    """Sets whether waiting for the device is an error."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("taught", [False, True])
def test_a_step_never_synchronises(taught: bool, tmp_path: Path, sync_mode: Any, monkeypatch: Any) -> None:
    teacher = str(write_checkpoint(tmp_path / "teacher.pth", MobileNetV3())) if taught else "none"
    config = replace(TINY, **RECIPE, teacher=teacher)
    model = MobileNetV3().to(CUDA, memory_format=torch.channels_last)
    loader, ema = Loader(load_training("synthetic", "", 3, 8)[0].to(CUDA), config), train.EMA(model, 0.9)
    optimizer, criterion = train.build_optimizer(model, config), train.build_criterion(config, CUDA)
    means = train.means
    monkeypatch.setattr(train, "means", lambda sums: (sync_mode("default"), means(sums))[1])
    for mode in ("default", "error"):  # the first use may set up
        sync_mode(mode)
        assert train.train_one_epoch(model, loader, criterion, optimizer, ema, taught and BFLOAT16)[0] > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_gpu_trains_as_a_cpu_does(seed: int) -> None:
    """In bfloat16 too, on GPUs that have it."""
    expected = second_loss(seed, torch.device("cpu"))
    assert second_loss(seed, CUDA) == pytest.approx(expected, rel=0.05)
    assert second_loss(seed, CUDA, amp=BFLOAT16) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_compiled_and_eager_train_alike() -> None:
    try:
        compiled = second_loss(0, CUDA, compiled=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"torch.compile needs a C compiler and Python's headers: {error}")
    assert compiled == pytest.approx(second_loss(0, CUDA), rel=0.05)


def test_a_run_is_graded_as_on_the_cpu(tiny: Config) -> None:
    folder = train.train(replace(tiny, device="cuda"))
    device, cpu = (evaluate.grade(folder / "best.pth", name) for name in ("cuda", "cpu"))
    assert (device["flops"], device["size_kb"], device["images"]) == (cpu["flops"], cpu["size_kb"], cpu["images"])
    assert device["accuracy"] == pytest.approx(cpu["accuracy"], abs=0.1)  # 2 of 2,000 images
    assert device["loss"] == pytest.approx(cpu["loss"], rel=1e-3)


def test_augmentation_does_what_it_does_on_the_cpu(images: Tensor) -> None:
    images, level = images.float(), 2 * torch.rand(len(images), 1, 1, 1, generator=seeded()) - 1
    for name, operation in augment.OPERATIONS.items():
        changed, expected = operation(images.to(CUDA), level.to(CUDA)).cpu(), operation(images, level)
        # A rounded value may fall on the other side.
        assert ((changed - expected).abs() > 0.01).float().mean() < 1e-3, name
