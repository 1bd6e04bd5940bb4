"""The benchmark's parts, as far as they take seconds: what is timed, and where the start's measurement ends."""

from pathlib import Path

import pytest
import torch

from tests.helpers import TINY
from tools import benchmark
from utils import UserError


class Batches(list):
    """A loader of one epoch."""

    batch_size = 4


def test_timed_counts_neither_warmup_nor_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that each batch moves on by a second."""
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    loader = benchmark.Timed(Batches([(torch.zeros(4), torch.zeros(4))] * 3), warmup=5, seconds=10)
    assert (len(loader), loader.batch_size) == (3, 4)
    taken = 0
    for _ in loader:
        taken += 1
        clock[0] += 1
    assert taken == 5 + 10 and loader.speed == 4


def test_the_programs_own_loop_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LIKE", TINY)
    monkeypatch.setattr(benchmark.Timed.__init__, "__defaults__", (1, 0.1))  # warm-up batches, seconds
    assert benchmark.our_loop() > 0


def test_the_images_of_a_growth_are_those_that_were_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of 100 images in batches of 64."""
    monkeypatch.setattr(benchmark, "LIKE", TINY)
    grown = benchmark.growth(1, 2)
    assert grown["images"] == 2 * 64 and grown["epochs"] == 2 and grown["seconds"] > 0 and grown["rss_mb"] > 0


def test_start_is_measured_up_to_the_first_step(tmp_path: Path) -> None:
    flags = [
        "--dataset",
        "synthetic",
        "--images_per_class",
        "60",
        "--validation_per_class",
        "50",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    printed = benchmark.succeed("-c", benchmark.START, "--runs_dir", str(tmp_path), *flags)
    assert "Epoch 1/" in printed and "Train Loss" not in printed
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_command_that_fails_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^-c 1 / 0 failed\. ZeroDivisionError: division by zero$"):
        benchmark.succeed("-c", "\n1 / 0")
    with pytest.raises(UserError, match=r"failed\. the reason$"):  # torchrun ends with a ruler
        benchmark.succeed("-c", "print(1); raise SystemExit('the reason\\n=====')")


def test_a_command_has_the_environment_that_is_given() -> None:
    assert benchmark.succeed("-c", "import os; print(os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="7") == "7\n"
