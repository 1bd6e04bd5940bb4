"""Stopping and resuming, bit for bit."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import train
from config import Config
from tests.helpers import EVERYTHING, FILES, SIGNALS, TINY, call_at, end_state, flags, log_rows

THREE_STEPS = {"epochs": 3, "images_per_class": 4}  # one step an epoch


def command_to_go_on(printed: str) -> Path:
    """The run folder in the command that a stopped run prints last."""
    text, _, command = printed.splitlines()[-1].partition(": ")
    *words, folder = shlex.split(command)
    assert (text, words) == ("Stopped. Go on with", ["python", "train.py", "--resume"])
    return Path(folder)


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
    assert end_state(folder) == end_state(whole)
    assert log_rows(folder) == log_rows(whole)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    other = train.train(replace(config, seed=1))
    assert end_state(other) != end_state(whole)


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
    assert end_state(folder) == end_state(uninterrupted)
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
    assert train.main(flags(**asdict(tiny))) == 128 + number
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
    process = start([sys.executable, "train.py", *flags(**asdict(config))])
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
    process = start([sys.executable, "train.py", *flags(**asdict(config))])
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
    assert end_state(folder) == end_state(whole)
    assert log_rows(folder) == log_rows(whole)
