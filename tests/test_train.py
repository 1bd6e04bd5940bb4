"""Training: loop, files, stopping, resuming and refusing."""

import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import checkpoint
import train
from augment import Batches
from config import Config
from conftest import EVERYTHING
from soak import rows, small_set, taken_for_official


def state(folder: Path) -> list[tuple[str, object]]:
    return list(checkpoint.leaves(checkpoint.load(folder / "last.pth")["state"]))


def same(a: list[tuple[str, object]], b: list[tuple[str, object]]) -> bool:
    return len(a) == len(b) and all(
        x == y and (torch.equal(v, w) if isinstance(v, Tensor) else v == w) for (x, v), (y, w) in zip(a, b, strict=True)
    )


def test_the_averaged_network_is_validated_on_the_validation_images(tiny: Config, monkeypatch) -> None:
    seen, evaluate = [], train.evaluate

    def recorded(network: torch.nn.Module, images: train.data.Images) -> object:
        seen.append((copy.deepcopy(network.state_dict()), images))
        return evaluate(network, images)

    monkeypatch.setattr(train, "evaluate", recorded)
    folder = train.train(replace(tiny, epochs=1))
    ((weights, images),) = seen
    assert torch.equal(images.images, train.data.load_training(tiny)[1].images)
    parts = checkpoint.load(folder / "last.pth")["state"]
    assert all(torch.equal(weights[name], value) for name, value in parts["average"]["network"].items())
    assert not torch.equal(weights["classifier.weight"], parts["network"]["classifier.weight"])


def test_a_run_prints_and_writes_what_it_should(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    config = replace(tiny, epochs=3, optimizer="adamw", lr=3e-3, schedule="step", ema=0.0, small_share=0.0)
    folder = train.train(config)
    lines = capsys.readouterr().out.splitlines()
    epochs = "\n".join(lines[lines.index("Epoch 1/3") :])
    number = r"\d+\.\d{4}, (Train|Validation) Accuracy: \d+\.\d\d%"
    assert re.fullmatch(
        rf"(Epoch \d/3\nTrain Loss: {number}\nValidation Loss: {number}\n(Saved Best Model\n)?"
        r"Learning Rate: \d\.\d{6}\n?){3}",
        epochs,
    )
    assert any("synthetic" in line for line in lines)
    log = rows(folder)
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
    assert sorted(p.name for p in folder.iterdir()) == ["best.pth", "config.json", "curves.png", "last.pth", "log.csv"]


def test_seeds_give_mean_and_deviation(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    train.train_seeds(replace(tiny, epochs=1), 2, lambda: 0)
    lines = capsys.readouterr().out.splitlines()
    best = [
        float(re.search(r"validation accuracy (\S+) %", line)[1]) for line in lines if line.startswith("Best epoch")
    ]
    assert len(best) == 2
    assert lines[-1] == (
        f"Best validation accuracy of 2 seeds: {sum(best) / 2:.2f} % ± {abs(best[0] - best[1]) / 2**0.5:.2f} "
        "(standard deviation)"
    )


def test_the_first_epochs_train_on_small_images(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sides, step = [], train.Training.step

    def recorded(run: train.Training, inputs: Tensor, *rest: Tensor) -> None:
        sides.append(inputs.shape[-1])
        step(run, inputs, *rest)

    monkeypatch.setattr(train.Training, "step", recorded)
    train.train(replace(tiny, epochs=3, small_share=0.6))
    assert sides == 7 * [24] + 2 * 7 * [32]


def test_without_validation_the_last_epoch_is_saved(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    folder = train.train(replace(tiny, validation_per_class=0))
    printed = capsys.readouterr().out
    assert "Validation" not in printed
    assert "Saved" not in printed
    assert {row["validation_loss"] + row["validation_accuracy"] for row in rows(folder)} == {""}
    assert checkpoint.load(folder / "best.pth")["epoch"] == 2


@pytest.mark.parametrize("recipe", [EVERYTHING, {"optimizer": "sgd", "schedule": "step"}], ids=["all", "sgd"])
def test_resuming_equals_never_stopping(tiny: Config, recipe: dict) -> None:
    """Stopped in the middle of the second epoch; weights, optimizer and log are the same, bit for bit."""
    config = replace(tiny, **recipe)
    whole = train.train(config)
    steps = iter(range(1000))
    with pytest.raises(train.Stopped) as stopped:
        train.train(config, stop=lambda: 15 if next(steps) == 10 else 0)  # 7 steps an epoch
    number, folder = stopped.value.args
    assert (number, len(rows(folder))) == (15, 1)
    assert train.train(config, folder) == folder
    assert same(state(folder), state(whole))
    assert rows(folder) == rows(whole)
    other = train.train(replace(config, seed=1))
    assert not same(state(other), state(whole))


def test_a_signal_before_the_first_step_leaves_no_run(tiny: Config) -> None:
    with pytest.raises(train.Stopped) as stopped:
        train.train(tiny, stop=lambda: 15)
    assert stopped.value.args == (15, None)
    assert not Path(tiny.runs_dir).exists()


def test_the_last_finished_run_is_the_one_that_is_graded(tiny: Config, tmp_path: Path) -> None:
    """Also where another run has written its best weights since this one's best epoch."""
    arrays = small_set()
    np.savez(tmp_path / "cifar100.npz", **arrays)
    settings = {"dataset": "cifar100", "data_dir": str(tmp_path), "validation_per_class": 1, "images_per_class": 0}
    with taken_for_official(arrays):
        folder = train.train(replace(tiny, **settings, epochs=1))
        checkpoint.BEST.write_text("another run's")
        train.train(checkpoint.run_config(folder, {}), folder)
    assert checkpoint.BEST.read_bytes() == (folder / "best.pth").read_bytes()


def test_an_epoch_is_kept_where_its_weights_cannot_be_offered(tiny: Config, tmp_path: Path) -> None:
    """A file where checkpoints/ should be."""
    arrays = small_set()
    np.savez(tmp_path / "cifar100.npz", **arrays)
    checkpoint.BEST.parent.write_text("")
    settings = {"dataset": "cifar100", "data_dir": str(tmp_path), "validation_per_class": 1, "images_per_class": 0}
    with taken_for_official(arrays), pytest.raises(OSError, match="checkpoints"):
        train.train(replace(tiny, **settings, epochs=1))
    (folder,) = Path(tiny.runs_dir).iterdir()
    assert checkpoint.load(folder / "last.pth")["epoch"] == len(rows(folder)) == 1


def test_other_settings_are_refused_on_resuming(tiny: Config) -> None:
    folder = train.train(replace(tiny, epochs=1))
    assert checkpoint.run_config(folder, {"epochs": 1}) == replace(tiny, epochs=1)
    with pytest.raises(checkpoint.CheckpointError, match=r"epochs 1 \(now 5\), lr 0.2 \(now 0.1\)"):
        checkpoint.run_config(folder, {"epochs": 5, "lr": 0.1})
    moved = checkpoint.run_config(folder, {"device": "auto", "threads": 2, "data_dir": "elsewhere"})
    assert moved == replace(tiny, epochs=1, device="auto", threads=2, data_dir="elsewhere")
    content = checkpoint.load(folder / "last.pth")
    del content["config"]["small_share"]
    checkpoint.save(folder / "last.pth", content)
    with pytest.raises(checkpoint.CheckpointError, match=r"another version .* small_share"):
        checkpoint.run_config(folder, {})
    shutil.copy(folder / "best.pth", folder / "last.pth")
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pth is not what"):
        checkpoint.run_config(folder, {})
    (folder / "last.pth").unlink()
    (folder / "config.json").write_text("[]")
    for other in (folder, folder.parent):
        with pytest.raises(checkpoint.CheckpointError, match="no run"):
            checkpoint.run_config(other, {})


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tiny: Config) -> None:
    folder = train.train(replace(tiny, epochs=1))
    good = (folder / "last.pth").read_bytes()
    config = replace(tiny, optimizer="sgd", lr=1e3)
    run = train.Training(config, torch.device("cpu"))
    run.history = checkpoint.load(folder / "last.pth")["history"]
    images, validation = train.data.load_training(config)
    with pytest.raises(train.Diverged, match=r"epoch 2 at learning rate 1000"):
        train.finish_epoch(run, Batches(config, images), validation, lambda: 0, folder)
    assert (folder / "last.pth").read_bytes() == good


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_within_a_step_and_give_the_command(tmp_path: Path, number: int) -> None:
    """An epoch of this run has 234 steps and takes half a minute at least."""
    command = [
        sys.executable, "train.py", "--dataset", "synthetic", "--epochs", "2", "--validation_per_class", "50",
        "--batch_size", "64", "--small_share", "0", "--threads", "1", "--device", "cpu", "--runs_dir", str(tmp_path),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/config.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    start = time.monotonic()
    printed, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 10  # a step takes about 0.2 s
    assert "Train Loss" not in printed, "it went on to the end of the epoch"
    assert process.returncode == 128 + number
    (folder,) = tmp_path.iterdir()
    assert printed.splitlines()[-1].endswith(f"python train.py --resume {folder}")
    assert errors == "\nStopping after this step; once more to stop at once\n", "no bar where it is no terminal"
    assert not (folder / "log.csv").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_what_is_no_step(number: int) -> None:
    """As a download is none: nobody asks there whether to stop."""
    code = (
        "import time, train\n"
        "def wait(*arguments, **more):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "train.train = wait\n"
        "train.main(train.parse_command_line([]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)  # the first one only asks
    process.send_signal(number)
    assert process.wait(timeout=20) == -number
