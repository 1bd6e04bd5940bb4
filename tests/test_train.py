"""Training: loop, files, stopping, resuming and refusing."""

import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import checkpoint
import data
import evaluate
import train
import utils
from augment import build_loader
from config import Config
from data import Images
from model import MobileNetV3
from optim import build_criterion
from tests.helpers import EVERYTHING, TINY, log_rows, small_set, taken_for_official

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FILES = ["best.pth", "config.json", "curves.png", "last.pth", "log.csv"]


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts pytest's own signal handlers back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def flags(config: Config) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type is bool:
            words.append(f"--{f.name}" if value else f"--no-{f.name}")
        elif f.name != "experiment":
            words += [f"--{f.name}", str(value)]
    return words


def end_state(folder: Path) -> list[tuple[str, object]]:
    return list(checkpoint.leaves(checkpoint.load(folder / "last.pth")["state"]))


def same(a: list[tuple[str, object]], b: list[tuple[str, object]]) -> bool:
    return len(a) == len(b) and all(
        x == y and (torch.equal(v, w) if isinstance(v, Tensor) else v == w) for (x, v), (y, w) in zip(a, b, strict=True)
    )


def command_to_go_on(printed: str) -> Path:
    """The run folder in the command that a stopped run prints last."""
    text, _, command = printed.splitlines()[-1].partition(": ")
    *words, folder = shlex.split(command)
    assert (text, words) == ("Stopped. Go on with", ["python", "train.py", "--resume"])
    return Path(folder)


def call_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, action: Any) -> None:
    """Let the function `name` of `owner` do what it does, and call `action` in its call of that number."""
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def counted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == count:
            action()
        return original(*arguments, **more)

    monkeypatch.setattr(owner, name, counted)


def test_the_ema_is_validated_on_the_validation_images(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, config = [], replace(tiny, epochs=1, images_per_class=4)

    def recorded(model: torch.nn.Module, images: Images) -> evaluate.Scores:
        seen.append((copy.deepcopy(model.state_dict()), images, model.training))
        return evaluate.evaluate(model, images)

    monkeypatch.setattr(train, "evaluate", recorded)
    folder = train.train(config)
    ((weights, images, training),) = seen
    assert not training
    expected = data.load_training("synthetic", "", config.validation_per_class, config.images_per_class)[1]
    assert torch.equal(images.images, expected.images) and torch.equal(images.labels, expected.labels)
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


def test_a_gpu_with_too_little_memory_is_one_line(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(utils.UserError, match="lower --batch_size"):
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
    assert train.main(flags(config)) == 0
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


@pytest.mark.parametrize("recipe", [EVERYTHING, {"optimizer": "sgd", "schedule": "step"}], ids=["everything", "sgd"])
def test_resume_is_bit_exact(
    tiny: Config, recipe: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Interrupted in the middle of the second epoch; weights, optimizer and log are those of a run that was not."""
    config = replace(tiny, **recipe)
    whole = train.train(config)

    def interrupt() -> None:
        raise KeyboardInterrupt(15)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        call_at(patch, torch.nn.functional, "cross_entropy", 12, interrupt)  # 7 steps and 1 validation an epoch
        train.train(config)
    folder = command_to_go_on(capsys.readouterr().out)
    assert (stopped.value.args, len(log_rows(folder))) == ((15,), 1)
    assert train.train(config, folder) == folder
    assert same(end_state(folder), end_state(whole))
    assert log_rows(folder) == log_rows(whole)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    other = train.train(replace(config, seed=1))
    assert not same(end_state(other), end_state(whole))


THREE_STEPS = {"epochs": 3, "images_per_class": 4}  # one step an epoch


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps."""
    return train.train(replace(TINY, **THREE_STEPS, runs_dir=str(tmp_path_factory.mktemp("runs"))))


@pytest.mark.parametrize(
    ("owner", "name", "call", "finished"),
    [
        (torch.Tensor, "backward", 1, 0),
        (train.EMA, "update", 2, 1),
        (train, "evaluate", 2, 1),
        (os, "replace", 2, 0),  # config.json, then best.pth, last.pth and log.csv of the first epoch
        (os, "replace", 3, 0),
        (os, "replace", 4, 1),
        (checkpoint, "write_log", 3, 3),
        (checkpoint, "draw_curves", 1, 3),
    ],
)
def test_resume_is_bit_exact_wherever_a_run_was_interrupted(
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    uninterrupted: Path,
    owner: Any,
    name: str,
    call: int,
    finished: int,
) -> None:
    """In a step, in the validation, before each file gets its name, and after the last epoch."""

    def interrupt() -> None:
        raise KeyboardInterrupt(2)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        call_at(patch, owner, name, call, interrupt)
        train.train(replace(tiny, **THREE_STEPS))
    assert stopped.value.args == (2,)
    folder = command_to_go_on(capsys.readouterr().out)
    assert not list(folder.glob(".*.part")), "no temporary file is left"
    epochs = checkpoint.load(folder / "last.pth")["epoch"] if (folder / "last.pth").exists() else 0
    assert epochs == finished
    train.train(train.resumed_config(folder, {}), folder)
    assert same(end_state(folder), end_state(uninterrupted))
    assert log_rows(folder) == log_rows(uninterrupted)
    assert sorted(p.name for p in folder.iterdir()) == FILES


def test_a_finished_run_can_be_resumed(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    good = (folder / "last.pth").read_bytes()
    capsys.readouterr()
    train.train(train.resumed_config(folder, {}), folder)
    assert (folder / "last.pth").read_bytes() == good
    assert "Train Loss" not in capsys.readouterr().out


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_leaves_no_run(
    tiny: Config, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    """As during a download; at once, with the first signal."""

    def wait(*_: object) -> None:
        signal.raise_signal(number)
        raise AssertionError("it went on")

    monkeypatch.setattr(train, "build_loader", wait)
    assert train.main(flags(tiny)) == 128 + number
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "Stopped before any step"
    assert err == ""
    assert not Path(tiny.runs_dir).exists()


def test_ctrl_c_while_a_resumed_run_loads_its_data_gives_the_command(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    folder = train.train(replace(tiny, epochs=1, images_per_class=4, runs_dir=f"{tiny.runs_dir} of $me"))
    capsys.readouterr()
    monkeypatch.setattr(train, "build_loader", lambda *_: signal.raise_signal(signal.SIGINT))
    assert train.main(["--resume", str(folder)]) == 128 + signal.SIGINT
    out, err = capsys.readouterr()
    assert (command_to_go_on(out), err) == (folder, "")


def start(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_stop_at_once_and_give_the_command(tiny: Config, number: int) -> None:
    """An epoch of this run has 234 steps and takes half a minute at least."""
    config = replace(tiny, images_per_class=0, validation_per_class=50, small_fraction=0.0)
    process = start([sys.executable, "train.py", *flags(config)])
    while "Epoch 1/2" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(number)
    begun = time.monotonic()
    printed, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10  # a step takes about 0.2 s
    assert "Train Loss" not in printed, "it went on to the end of the epoch"
    assert process.returncode == 128 + number
    (folder,) = Path(config.runs_dir).iterdir()
    assert printed.splitlines()[-1] == f"Stopped. Go on with: python train.py --resume {folder}"
    assert errors == "", "no traceback, and no bar where it is no terminal"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json"]


def test_the_printed_command_goes_on_bit_exactly(tiny: Config) -> None:
    """Stopped by SIGTERM in the second epoch; the runs' folder has a name that a shell would split."""
    config = replace(tiny, runs_dir=f"{tiny.runs_dir} of $me")
    process = start([sys.executable, "train.py", *flags(config)])
    while "Epoch 2/2" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    python, *command = shlex.split(printed.splitlines()[-1].partition("Go on with: ")[2])
    assert python == "python"
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    (folder,) = Path(config.runs_dir).iterdir()
    whole = train.train(tiny)
    assert same(end_state(folder), end_state(whole))
    assert log_rows(folder) == log_rows(whole)


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


def test_other_settings_are_refused_on_resuming(tiny: Config) -> None:
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    config = replace(tiny, epochs=1, images_per_class=4)
    assert train.resumed_config(folder, {"epochs": 1}) == config
    with pytest.raises(utils.UserError, match=r"epochs 1 \(now 5\), lr 0.2 \(now 0.1\)"):
        train.resumed_config(folder, {"epochs": 5, "lr": 0.1})
    how = {"device": "auto", "threads": 2, "data_dir": "elsewhere", "compile": True, "tensorboard": True}
    assert train.resumed_config(folder, how) == replace(config, **how)


def test_resuming_after_the_network_was_changed_is_one_line(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    """Other names, other shapes; the run's files stay as they are."""
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for other in (nn.Sequential(MobileNetV3()), MobileNetV3()):
        if isinstance(other, MobileNetV3):
            other.classifier = nn.Linear(960, 50)
        monkeypatch.setattr(train, "build_model", lambda *_, other=other: other)
        assert train.main(["--resume", str(folder)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"train.py: error: {folder} cannot go on, its model is another one: ")
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("when", ["at once", "in the first step"])
def test_a_failing_torch_compile_is_one_line(
    tiny: Config, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    """As where there is no C++ compiler."""

    def fail(*arguments: object, **more: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler\n\n  was found")

    monkeypatch.setattr(torch, "compile", fail if when == "at once" else lambda *_, **more: fail)
    assert train.main(flags(replace(tiny, epochs=1, images_per_class=4, compile=True))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "train.py: error: torch.compile failed: no compiler was found. Train without --compile"


def test_an_older_run_goes_on_and_a_newer_one_is_refused(tiny: Config) -> None:
    """Settings that it lacks are off, old names are read, unknown ones are named."""
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    content = checkpoint.load(folder / "last.pth")
    settings = content["config"]
    settings["small_share"] = settings.pop("small_fraction")
    del settings["cutout"], settings["trivial_augment"]
    checkpoint.save(folder / "last.pth", content)
    expected = replace(tiny, epochs=1, images_per_class=4, cutout=0, trivial_augment=0.0)
    assert train.resumed_config(folder, {}) == expected
    settings["tutor"] = "resnet"
    checkpoint.save(folder / "last.pth", content)
    with pytest.raises(utils.UserError, match=r"cannot go on: config.py does not know tutor"):
        train.resumed_config(folder, {})


def test_resuming_a_folder_without_a_run_is_refused(
    tiny: Config, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    folder = train.train(replace(tiny, epochs=1, images_per_class=4))
    shutil.copy(folder / "best.pth", folder / "last.pth")
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pth is not what"):
        train.resumed_config(folder, {})
    (folder / "last.pth").unlink()
    for settings in ("[]", "{", '{"epochs": "many"}'):
        (folder / "config.json").write_text(settings)
        with pytest.raises(utils.UserError, match=r"no run|cannot go on") as caught:
            train.resumed_config(folder, {})
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(checkpoint.CheckpointError, match="no run"):
        train.resumed_config(folder.parent, {})
    assert train.main(["--resume", str(folder.parent / "none")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ") and "none" in line


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


def test_a_device_that_is_not_there_is_one_line(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, handlers: None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.main(flags(replace(tiny, device="cuda:7"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "train.py: error: cuda:7 is not there: torch sees 1 CUDA devices. Try --device cpu"
    assert not Path(tiny.runs_dir).exists()
