"""What only real processes show: kill -9, torchrun, imports without side effects."""

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
import model as models
import train
from config import Config
from tests.helpers import TINY, flags, log_rows, same, states
from utils import ROOT

pytestmark = pytest.mark.slow
TRAIN = [sys.executable, "-u", "train.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]


def started(*words: str) -> subprocess.Popen:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(process: subprocess.Popen, start: str, count: int = 1) -> None:
    """Until the process has printed so many lines that begin so."""
    while count:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        count -= line.startswith(start)


def run(*words: str) -> str:
    """What a process prints that ends well."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A short run of the whole network."""
    recipe = {"ema": 0.9, "dropout": 0.1, "trivial_augment": 1.0, "mixup": 0.2, "lr_step": 4, "warmup_epochs": 1}
    return replace(TINY, **recipe, epochs=6, images_per_class=2, runs_dir=str(tmp_path / "runs"))


def test_importing_changes_nothing_and_help_works() -> None:
    code = """
import os, signal, sys, torch
def found():
    precision = torch.backends.cudnn.conv.fp32_precision
    return dict(os.environ), signal.getsignal(15), torch.get_num_threads(), torch.initial_seed(), precision
before = found()
import augment, checkpoint, config, curves, data, distill, evaluate, model, train, utils
assert found() == before and "torchvision" not in sys.modules and "thop" not in sys.modules
"""
    run(sys.executable, "-c", code)
    for program in ("train.py", "evaluate.py"):
        assert run(sys.executable, program, "-h").startswith(f"usage: {program} [-h] [--")


def test_the_default_run_starts(cifar100: str, tmp_path: Path) -> None:
    """Up to its first step."""
    with started(*TRAIN, "--data_dir", cifar100, "--runs_dir", str(tmp_path)) as process:
        wait_for(process, "Epoch 1/")
        process.kill()


def test_kill_at_any_moment_and_resume_is_bit_exact(config: Config, tmp_path: Path) -> None:
    """Killed three times, at random moments of an epoch."""
    config = replace(config, epochs=20)  # more than can pass before the third kill
    rng, command = random.Random(), [*TRAIN, *flags(config)]
    for _ in range(3):
        with started(*command) as process:
            wait_for(process, "Epoch ", 2)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        (folder,) = Path(config.runs_dir).iterdir()
        command = [*TRAIN, "--resume", str(folder)]
    run(*command)
    whole = train.train(replace(config, runs_dir=str(tmp_path / "whole")))
    assert same(states(folder), states(whole)) and log_rows(folder) == log_rows(whole)
    assert same(*(checkpoint.load(path / "best.pth")["weights"] for path in (folder, whole)))
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight."""
    return max((one[name] - other[name]).abs().max().item() for name in one if one[name].is_floating_point())


def test_two_processes_train_what_one_trains(config: Config, tmp_path: Path) -> None:
    """A network without batch norm, whose result does not depend on how a batch is divided. With SGD: AdamW would turn
    rounding into steps of full size where a gradient is nearly 0."""
    pytest.importorskip("timm")
    recipe = {"model": "test_convnext", "image_size": 64, "optimizer": "sgd", "lr": 0.05, "dropout": 0.0, "epochs": 2}
    config, folders = replace(config, **recipe | {"warmup_epochs": 0, "lr_step": 1}), []
    for command, name in ((TRAIN, "one"), (TORCHRUN, "two")):
        printed = run(*command, *flags(config, runs_dir=tmp_path / name))
        assert printed.count("Epoch 2/2") == 1, "the first process prints, the other does not"
        folders += (tmp_path / name).iterdir()
    one, two = folders
    torch.manual_seed(config.seed)
    start = models.build_model("test_convnext", image_size=64).state_dict()
    assert differ(states(one)["model"], states(two)["model"]) < 1e-4 * differ(states(one)["model"], start)
    averages = [states(folder)["ema"]["model"] for folder in folders]
    assert differ(*averages) < 1e-4 * differ(averages[0], start)
    for row, other in zip(log_rows(one), log_rows(two), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
