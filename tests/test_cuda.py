"""Training and grading on a GPU; all of it is skipped where there is no CUDA."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import evaluate
import train
from augment import OPERATIONS
from config import Config
from model import MobileNetV3
from optim import Teacher, build_criterion
from tests.helpers import (
    EVERYTHING,
    TINY,
    end_state,
    flags,
    log_rows,
    needs_compiler,
    seeded,
    started,
    train_epochs,
    write_checkpoint,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = "cuda"
ON_DEVICE = replace(TINY, device=DEVICE)
# The command line of train.py, but the run is stopped once its first epoch is on the disk.
ONE_EPOCH = """
import sys, checkpoint, train
save_epoch = checkpoint.save_epoch
def save_and_stop(*given):
    save_epoch(*given)
    raise KeyboardInterrupt(15)
checkpoint.save_epoch = save_and_stop
sys.exit(train.main())
"""


@pytest.fixture
def sync_mode_again() -> Iterator[None]:
    """Puts CUDA's own mode back, in which waiting for the device is no error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "taught"])
def test_a_step_never_synchronises(teacher: bool, sync_mode_again: None) -> None:
    config = replace(ON_DEVICE, **EVERYTHING)
    state, loader = started(config)
    if teacher:
        state.teacher = Teacher(MobileNetV3().eval(), state.device, torch.bfloat16)
    criterion = build_criterion(config, state.teacher)
    for mode in ("default", "error"):  # first use may set up
        torch.cuda.set_sync_debug_mode(mode)
        for epoch in range(config.epochs):
            loader.set_epoch(epoch)
            meter = train.train_one_epoch(state, loader, criterion)
    torch.cuda.set_sync_debug_mode("default")
    assert meter.sums.isfinite().all()


def test_batches_keep_their_layout() -> None:
    """Another one would be compiled anew."""
    _, loader = started(replace(ON_DEVICE, **EVERYTHING | {"mix_prob": 1.0}))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in loader)


def test_float16_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    state, loader = started(ON_DEVICE)
    first, second = train_epochs(state, loader, 2)
    assert state.scaler.is_enabled() and state.autocast.fast_dtype is torch.float16
    assert second.compute()[0] < first.compute()[0]


@needs_compiler
@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "taught"])
def test_compiled_and_eager_train_alike(tmp_path: Path, teacher: bool) -> None:
    """One epoch of 24x24 and one of 32x32 images; rounding apart."""
    config = replace(ON_DEVICE, ema=0.9, mixup=0.2, lr=0.02)
    if teacher:
        config = replace(config, teacher=str(write_checkpoint(tmp_path / "teacher.pth", MobileNetV3())))
    losses = []
    for compiled in (False, True):
        state, loader = started(replace(config, compile=compiled))
        criterion = build_criterion(config, state.teacher)
        for epoch in range(config.epochs):
            loader.set_epoch(epoch)
            losses.append(train.train_one_epoch(state, loader, criterion).compute()[0])
    assert losses[2:] == pytest.approx(losses[:2], rel=0.05)


def command(config: Config, folder: Path) -> list[str]:
    """Flags of a run with deterministic kernels."""
    return flags(**asdict(replace(config, deterministic=True, runs_dir=str(folder))))


@pytest.mark.parametrize("recipe", [EVERYTHING, {}], ids=["everything", "sgd"])
def test_deterministic_runs_resume_bit_for_bit(tmp_path: Path, recipe: dict) -> None:
    """In processes of their own, as the kernels are chosen for a whole process."""
    config = replace(ON_DEVICE, **recipe)
    subprocess.run([sys.executable, "train.py", *command(config, tmp_path / "whole")], check=True)
    stopped = subprocess.run([sys.executable, "-c", ONE_EPOCH, *command(config, tmp_path / "stopped")])
    (whole,), (folder,) = ((tmp_path / name).iterdir() for name in ("whole", "stopped"))
    assert (stopped.returncode, len(log_rows(folder))) == (128 + 15, 1)
    subprocess.run([sys.executable, "train.py", "--resume", str(folder)], check=True)
    assert end_state(folder) == end_state(whole)
    assert log_rows(folder) == log_rows(whole)


def test_a_run_is_graded_as_on_the_cpu(tiny: Config) -> None:
    """Its checkpoint too, which another device has written."""
    folder = train.train(replace(tiny, device=DEVICE))
    device, cpu = (evaluate.grade(folder / "best.pth", name) for name in (DEVICE, "cpu"))
    assert (device["flops"], device["size_kb"], device["images"]) == (cpu["flops"], cpu["size_kb"], cpu["images"])
    assert device["accuracy"] == pytest.approx(cpu["accuracy"], abs=0.1)  # 2 of 2,000 images
    assert device["loss"] == pytest.approx(cpu["loss"], rel=1e-3)


def test_logits_are_those_of_the_cpu(model: nn.Module, images: Tensor) -> None:
    expected = evaluate.predict_logits(model, images)
    logits = evaluate.predict_logits(model.to(DEVICE, memory_format=torch.channels_last), images.to(DEVICE)).cpu()
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    best, second = expected.topk(2).values.T
    clear = best - second > 1e-2 * expected.std()
    assert clear.sum() > 90
    assert torch.equal(logits.argmax(1)[clear], expected.argmax(1)[clear])


def test_augmentation_does_what_it_does_on_the_cpu(images: Tensor) -> None:
    images, level = images.float(), 2 * torch.rand(len(images), 1, 1, 1, generator=seeded()) - 1
    for name, operation in OPERATIONS.items():
        changed, expected = operation(images.to(DEVICE), level.to(DEVICE)).cpu(), operation(images, level)
        # A rounded value may fall on the other side.
        assert ((changed - expected).abs() > 0.01).float().mean() < 1e-3, name
