"""Training: the loop, what it prints and writes, and what stops it."""

import copy
import itertools
import json
import math
import re
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import checkpoint
import data
import evaluate
import train
import utils
from augment import build_loader
from config import Config
from model import MobileNetV3
from optim import build_criterion
from tests.helpers import FILES, flags, log_rows, small_set, taken_for_official


def test_the_ema_is_validated_on_the_validation_images(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, config = [], replace(tiny, epochs=1, images_per_class=4)

    def recorded(model: torch.nn.Module, *images: torch.Tensor) -> evaluate.Scores:
        seen.append((copy.deepcopy(model.state_dict()), images))
        return evaluate.evaluate(model, *images)

    monkeypatch.setattr(train, "evaluate", recorded)
    folder = train.train(config)
    ((weights, images),) = seen
    expected = data.load_training("synthetic", "", config.validation_per_class, config.images_per_class)[1]
    assert all(torch.equal(*pair) for pair in zip(images, expected, strict=True))
    parts = checkpoint.load(folder / "last.pth")["state"]
    assert all(torch.equal(weights[name], value) for name, value in parts["average"]["network"].items())
    assert not torch.equal(weights["classifier.weight"], parts["network"]["classifier.weight"])
    best = checkpoint.load(folder / "best.pth")["weights"]
    assert all(torch.equal(weights[name], value) for name, value in best.items())


def test_a_run_prints_its_epochs_and_writes_its_files(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    config = replace(tiny, epochs=3, optimizer="adamw", lr=3e-3, schedule="step", ema=0.0, small_fraction=0.0)
    folder = train.train(config)
    lines = capsys.readouterr().out.splitlines()
    epochs = "\n".join(lines[lines.index("Epoch 1/3") :])
    number = r"\d+\.\d{4}, (Train|Validation) Accuracy: \d+\.\d\d%"
    assert re.fullmatch(
        rf"(Epoch \d/3\nTrain Loss: {number}\nValidation Loss: {number}\n(Saved Best Model\n)?"
        r"Learning Rate: \d\.\d{6}\n?){3}",
        epochs,
    )
    assert any("500 synthetic images" in line for line in lines)
    assert f"Run folder: {folder}" in lines
    log = log_rows(folder)
    assert [row["epoch"] for row in log] == ["1", "2", "3"]
    assert [float(row["lr"]) for row in log] == [3e-3, 1.5e-3, 0.75e-3], "the rate that the epoch used"
    assert float(log[2]["train_loss"]) < float(log[0]["train_loss"])
    assert json.loads((folder / "config.json").read_text()) == asdict(config)
    accuracies = [float(row["validation_accuracy"]) for row in log]
    best = checkpoint.load(folder / "best.pth")
    assert best["epoch"] == 1 + accuracies.index(max(accuracies)), "the first of the best: strict improvement only"
    assert best["metrics"]["validation_accuracy"] == max(accuracies)
    assert epochs.count("Saved Best Model") == sum(
        a > max(accuracies[:i], default=-1) for i, a in enumerate(accuracies)
    )
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not checkpoint.BEST.exists(), "synthetic runs never write under checkpoints/"
    assert sorted(p.name for p in folder.iterdir()) == FILES


def test_an_epoch_of_equal_accuracy_does_not_replace_the_best(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([50.0, 50.0, 49.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: evaluate.Scores(1.0, next(accuracies), 90.0))
    folder = train.train(replace(tiny, epochs=3, images_per_class=4))
    assert checkpoint.load(folder / "best.pth")["epoch"] == 1
    rows = checkpoint.load(folder / "last.pth")["history"]
    assert [row["validation_loss"] for row in rows] == [1.0, 1.0, 1.0]
    assert [row["validation_accuracy"] for row in rows] == [50.0, 50.0, 49.0], "top-1, not top-5"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
    ],
)
def test_too_little_memory_is_one_line(tiny: Config, error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(utils.UserError, match="too little memory for this run"):
        train.train(tiny)


def test_speed_and_time_of_an_epoch(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves on two seconds at each look; an epoch has 7 batches of 64 images."""
    clock = itertools.count(0, 2)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(clock), monotonic=time.monotonic))
    (row,) = checkpoint.load(train.train(replace(tiny, epochs=1)) / "last.pth")["history"]
    assert (row["images_per_second"], row["seconds"]) == (7 * 64 / 2, 4)


def test_the_program_ends_with_a_summary(tiny: Config, capsys: pytest.CaptureFixture, handlers: None) -> None:
    """It names the best epoch and the folder, and the command to grade it, quoted for the shell."""
    config = replace(tiny, epochs=1, images_per_class=4, runs_dir=tiny.runs_dir + " of $me")
    assert train.main(flags(**asdict(config))) == 0
    (folder,) = Path(config.runs_dir).iterdir()
    best, where, grade = capsys.readouterr().out.splitlines()[-3:]
    accuracy = checkpoint.load(folder / "best.pth")["metrics"]["validation_accuracy"]
    assert best == f"Best epoch: 1 of 1 (validation accuracy {accuracy:.2f} %)"
    assert where.endswith(str(folder))
    assert shlex.split(grade.partition(": ")[2]) == ["python", "evaluate.py", "--checkpoint", str(folder / "best.pth")]


def test_the_first_epochs_train_on_small_images(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sides, forward = [], MobileNetV3.forward

    def recorded(model: torch.nn.Module, images: Tensor) -> Tensor:
        sides.extend([images.shape[-1]] * model.training)
        return forward(model, images)

    monkeypatch.setattr(MobileNetV3, "forward", recorded)
    train.train(replace(tiny, epochs=3, small_fraction=0.6, images_per_class=4, batch_size=25))
    assert sides == 4 * [24] + 2 * 4 * [32]


def test_without_validation_the_last_epoch_is_saved(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    folder = train.train(replace(tiny, validation_per_class=0, images_per_class=1))
    printed = capsys.readouterr().out
    assert "Validation" not in printed
    assert "Saved" not in printed
    assert {row["validation_loss"] + row["validation_accuracy"] for row in log_rows(folder)} == {""}
    assert checkpoint.load(folder / "best.pth")["epoch"] == 2


def official(tiny: Config, folder: Path) -> Config:
    """Settings of a run on what is taken for the official data set."""
    return replace(
        tiny, dataset="cifar100", data_dir=str(folder), validation_per_class=1, images_per_class=0, epochs=1
    )  # fmt: skip


def test_the_last_finished_run_writes_best_pth(tiny: Config, tmp_path: Path) -> None:
    """Also where another run has written its best weights since this one's best epoch."""
    arrays = small_set()
    np.savez(tmp_path / "cifar100.npz", **arrays)
    with taken_for_official(arrays):
        folder = train.train(official(tiny, tmp_path))
        assert checkpoint.BEST.read_bytes() == (folder / "best.pth").read_bytes()
        checkpoint.BEST.write_text("another run's")
        train.train(train.resumed_config(folder, {}), folder)
    assert checkpoint.BEST.read_bytes() == (folder / "best.pth").read_bytes()


def test_an_epoch_is_kept_where_the_best_weights_cannot_be_copied(tiny: Config, tmp_path: Path) -> None:
    """A file where checkpoints/ should be."""
    arrays = small_set()
    np.savez(tmp_path / "cifar100.npz", **arrays)
    checkpoint.BEST.parent.write_text("")
    with taken_for_official(arrays), pytest.raises(OSError, match="checkpoints"):
        train.train(official(tiny, tmp_path))
    (folder,) = Path(tiny.runs_dir).iterdir()
    assert checkpoint.load(folder / "last.pth")["epoch"] == len(log_rows(folder)) == 1


@pytest.mark.parametrize("when", ["at once", "in the first step"])
def test_a_failing_torch_compile_is_one_line(
    tiny: Config, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    """As where there is no C++ compiler."""

    def fail(*arguments: object, **more: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler\n\n  was found")

    monkeypatch.setattr(torch, "compile", fail if when == "at once" else lambda *_, **more: fail)
    assert train.main(flags(**asdict(replace(tiny, epochs=1, images_per_class=4, compile=True)))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "train.py: error: torch.compile failed: no compiler was found. Train without --compile"


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tiny: Config) -> None:
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    good = (folder / "last.pth").read_bytes()
    config = replace(tiny, optimizer="sgd", lr=1e3)
    state = train.TrainState(config, torch.device("cpu"))
    state.history = checkpoint.load(folder / "last.pth")["history"]
    loader, validation = build_loader(config, torch.device("cpu"))
    with pytest.raises(utils.UserError, match=r"not finite in epoch 2 at learning rate 1000"):
        train.fit(state, loader, build_criterion(config), validation, folder)
    assert (folder / "last.pth").read_bytes() == good


@pytest.mark.parametrize("broken", ["loss", "weight", "statistic"])
def test_a_loss_or_weight_that_is_not_finite_stops_training(tiny: Config, broken: str) -> None:
    state = train.TrainState(tiny, torch.device("cpu"))
    train.check_finite(state, 1.0, 1)
    if broken != "loss":
        name = {"weight": "classifier.bias", "statistic": "stem.1.running_var"}[broken]
        state.eval_model.state_dict()[name][3] = math.inf
    with pytest.raises(utils.UserError, match="not finite in epoch 1"):
        train.check_finite(state, math.nan if broken == "loss" else 1.0, 1)


def test_a_device_that_is_not_there_is_one_line(tiny: Config, capsys: pytest.CaptureFixture, handlers: None) -> None:
    assert train.main(flags(**asdict(replace(tiny, device="cuda:99")))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"train\.py: error: cuda:99 cannot be used: .+\. Try --device cpu, or .+", line)
    assert not Path(tiny.runs_dir).exists()
