"""The log for TensorBoard: each finished epoch once, also after a resume."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train
from augment import Loader
from config import Config
from tests.helpers import call_at, log_rows
from utils import UserError


def test_tensorboard_has_the_log_also_after_a_resume(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(tiny, images_per_class=4, epochs=2, tensorboard=True)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        call_at(patch, Loader, "set_epoch", 2, interrupt)
        train.train(config)
    (folder,) = Path(config.runs_dir).iterdir()
    train.train(config, folder)
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("train_loss", "validation_accuracy", "lr"):
        logged = [(int(row["epoch"]), pytest.approx(float(row[name]), rel=1e-6)) for row in log_rows(folder)]
        assert [(event.step, event.value) for event in events.Scalars(name)] == logged


def test_without_tensorboard_installed_it_is_one_line(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"needs tensorboard. Run: pip install -r requirements-tools.txt"):
        train.train(replace(tiny, images_per_class=4, tensorboard=True))
