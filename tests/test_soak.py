"""What a run of hours must survive: kills, damage, a full disk, two processes at once."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import checkpoint
import data
import train
import utils
from config import Config
from tests import soak


def new_run(config: Config) -> Path:
    """The folder of a run that has not begun to train."""
    folder = checkpoint.new_run(config.runs_dir, "new")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder


def test_resume_is_bit_exact_after_kills() -> None:
    """Five random moments; `python -m tests.soak --kills 50` does more."""
    killed, early, identical = soak.kill(5, seed=0)
    assert killed == early + identical == 5
    assert identical > 0


def test_damaged_files_are_never_used() -> None:
    """Ten of each kind; `python -m tests.soak --damage 200` does more."""
    refused, harmless, accepted = soak.damage(10, seed=0)
    assert accepted == 0
    assert refused + harmless == 100
    assert refused >= 80


@pytest.mark.parametrize("name", ["last.pth", "log.csv"])
def test_a_full_disk_stops_training_and_leaves_the_last_epoch(tiny: Config, monkeypatch, name: str) -> None:
    """In the second epoch. Once there is room, the run goes on."""
    config, good, write = replace(tiny, epochs=2, images_per_class=4), [], checkpoint.atomic_write

    def full(path: Path, fill: Callable) -> None:
        def no_space(file: object) -> None:
            raise OSError(28, "No space left on device")

        write(path, no_space if path.name == name and good else fill)
        if path.name == "log.csv":  # the last file of an epoch
            good.append((path.parent / "last.pth").read_bytes())

    with (
        monkeypatch.context() as patch,
        pytest.raises(utils.UserError, match=f"{name} cannot be written: No space left on device. Stopped"),
    ):
        patch.setattr(checkpoint, "atomic_write", full)
        train.train(config)
    (folder,) = Path(tiny.runs_dir).iterdir()
    assert checkpoint.load(folder / "last.pth")["epoch"] == (1 if name == "last.pth" else 2)
    assert [(folder / "last.pth").read_bytes()] == good or name == "log.csv"
    assert not list(folder.glob(".*.part"))
    train.train(config, folder)
    assert checkpoint.load(folder / "last.pth")["epoch"] == len((folder / "log.csv").read_text().splitlines()) - 1 == 2


def test_a_vanished_run_folder_stops_training_with_one_line(tiny: Config, monkeypatch) -> None:
    evaluate = train.evaluate

    def vanish(*arguments: object) -> object:
        for folder in Path(tiny.runs_dir).iterdir():
            folder.rename(folder.with_name("elsewhere"))
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", vanish)
    with pytest.raises(utils.UserError, match="cannot be written: No such file or directory"):
        train.train(replace(tiny, images_per_class=4))


def test_the_program_ends_with_one_line_where_it_cannot_write(tmp_path: Path) -> None:
    """A file where the run folder's parent should be."""
    (tmp_path / "runs").write_text("")
    command = [sys.executable, "train.py", "--dataset", "synthetic", "--images_per_class", "2", "--device", "cpu"]
    command += ["--validation_per_class", "1", "--threads", "1", "--runs_dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "runs") in line


def test_a_run_folder_has_one_process(tiny: Config) -> None:
    folder = new_run(tiny)
    with utils.locked(folder), pytest.raises(utils.UserError, match="in use by another process"):
        train.train(tiny, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]
    with utils.locked(folder):
        pass  # free again


def test_a_second_builder_waits_and_uses_what_the_first_built(tmp_path: Path) -> None:
    """The first holds the folder and puts the finished file there; the second then has nothing to do."""
    path, done = tmp_path / "cifar100.npz", threading.Event()
    second = threading.Thread(target=lambda: (data.build(path), done.set()))
    with utils.locked(tmp_path):
        second.start()
        assert not done.wait(1.0)
        path.write_bytes(b"built by the first")
    second.join(10)
    assert done.is_set()
    assert path.read_bytes() == b"built by the first"


def test_temporary_files_of_a_killed_run_are_removed(tiny: Config) -> None:
    config = replace(tiny, epochs=1, images_per_class=4)
    folder = new_run(config)
    (folder / ".last.pth.abc.part").write_text("half")
    train.train(config, folder)
    assert not list(folder.glob(".*"))
