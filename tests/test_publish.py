"""Publishing: the record, the shipped checkpoint, and what is refused."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import data
import evaluate
import train
from config import Config
from tests.helpers import TINY, small_set, taken_for_official, write_checkpoint
from tools import calibrate, publish
from tools.curves import read_log

RECORD = Path("docs/results/small.json")


CIFAR100 = {"dataset": "cifar100", "data_dir": ".", "runs_dir": "runs", "images_per_class": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set that is taken for the official one, and a finished run of two epochs on it."""
    folder, arrays = tmp_path_factory.mktemp("trained"), small_set()
    np.savez(folder / "cifar100.npz", **arrays)
    with pytest.MonkeyPatch.context() as patch, taken_for_official(arrays):
        patch.chdir(folder)
        train.train(replace(TINY, **CIFAR100, validation_per_class=1))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The finished run, in a copy of that folder that is now the current one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with taken_for_official(small_set()):
        yield next(Path("runs").iterdir())


def main(*argv: object) -> int:
    return publish.main([str(value) for value in ("--data_dir", ".", *argv)])


def test_record_holds_what_was_measured(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(run, "--name", "small", "--commit", "abc1234", "--machine", "two cores") == 0
    assert str(RECORD) in capsys.readouterr().out.splitlines()[-1]
    record, best = json.loads(RECORD.read_text()), checkpoint.load(run / "best.pth")
    assert (record["name"], record["commit"], record["machine"]) == ("small", "abc1234", "two cores")
    assert (record["run"], record["torch"], record["date"]) == (run.name, best["torch"], best["date"])
    assert (record["seed"], record["epochs"], record["best_epoch"]) == (0, 2, best["epoch"])
    assert record["config"]["lr"] == 0.2 and not record["config"].keys() & {"data_dir", "device", "seed"}
    history = read_log(Path(record["log"]))
    assert history == read_log(run / "log.csv") and Path(record["log"]) == Path("docs/logs/small.csv")
    row = history[record["best_epoch"] - 1]
    for name in ("train", "validation"):
        assert record[name]["accuracy"] == pytest.approx(row[f"{name}_accuracy"], abs=1e-5)
        assert record[name]["loss"] == pytest.approx(row[f"{name}_loss"], abs=1e-5)
    graded = evaluate.grade(run / "best.pth", data_dir=".")
    assert record["test"] == pytest.approx({key: graded[key] for key in ("accuracy", "top5", "loss", "images")}, 1e-4)
    assert record["test"]["images"] == 200 and record["cost"] == {"operations": 11_776_320, "size_kb": 3814.391}
    assert Path(record["curves"]).read_bytes().startswith(b"\x89PNG")
    assert not checkpoint.PUBLISHED.exists()


def test_train_eval_is_measured_in_eval_mode_on_the_runs_own_images(run: Path) -> None:
    main(run, "--name", "small")
    images = data.load_training("cifar100", ".", 1)[0]
    model = evaluate.load_model(run / "best.pth")[0]
    scores = evaluate.evaluate(model, *images)
    expected = {"accuracy": scores.top1, "loss": scores.loss, "images": 200}
    assert json.loads(RECORD.read_text())["train_eval"] == pytest.approx(expected, abs=1e-4)


def test_a_temperature_is_fitted_on_validation_images(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the record and in the shipped checkpoint, and no test image is read for it."""
    fits, fit, fit_on_validation, load = [], calibrate.fit, calibrate.fit_on_validation, data.load

    def load_training_alone(dataset: str, data_dir: str, source: str, per_class: int = 0) -> data.Images:
        assert source == "train"
        return load(dataset, data_dir, source, per_class)

    def watched(*arguments: Any) -> float | None:
        with monkeypatch.context() as patch:
            patch.setattr(data, "load", load_training_alone)
            return fit_on_validation(*arguments)

    monkeypatch.setattr(calibrate, "fit_on_validation", watched)
    monkeypatch.setattr(calibrate, "fit", lambda *given: fits.append(given) or fit(*given))
    assert main(run, "--name", "small", "--ship", checkpoint.PUBLISHED) == 0
    ((outputs, labels),) = fits
    validation = data.load_training("cifar100", ".", 1)[1]
    expected = evaluate.predict_logits(evaluate.load_model(run / "best.pth")[0], validation.images)
    assert len(labels) == 100 and outputs.cpu().allclose(expected, atol=1e-3)
    temperature = json.loads(RECORD.read_text())["temperature"]
    assert temperature == pytest.approx(fit(expected, validation.labels), rel=1e-3) and temperature != 1
    assert checkpoint.load(checkpoint.PUBLISHED)["temperature"] == temperature
    graded = evaluate.grade(checkpoint.PUBLISHED, data_dir=".")
    assert graded["accuracy"] == evaluate.grade(run / "best.pth", data_dir=".")["accuracy"]


def test_without_validation_images_the_temperature_is_null(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = train.train(replace(TINY, **CIFAR100, epochs=1, validation_per_class=0))
    monkeypatch.setattr(calibrate, "fit", lambda *arguments: pytest.fail("a temperature was fitted"))
    assert main(everything, "--name", "small", "--ship", checkpoint.PUBLISHED) == 0
    record = json.loads(RECORD.read_text())
    assert "temperature" in record and record["temperature"] is None and record["validation"] is None
    assert checkpoint.load(checkpoint.PUBLISHED)["temperature"] is None


def test_a_run_is_graded_once(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(run, "--name", "small") == 0
    written = RECORD.read_bytes()
    capsys.readouterr()
    assert main(run, "--name", "small", "--commit", "other") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is measured" in line and "--again" in line and RECORD.read_bytes() == written
    assert main(run, "--name", "small", "--commit", "other", "--again") == 0
    assert json.loads(RECORD.read_text())["commit"] == "other"


def test_nothing_is_graded_where_a_file_is_in_the_way(run: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """A log that belongs to no record, a folder under the name of the weights."""
    log = Path("docs/logs/other.csv")
    log.parent.mkdir(parents=True)
    log.write_text("of another run")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "grade", lambda *arguments, **more: pytest.fail("the run was graded"))
        assert main(run, "--name", "other") == 1
        assert "docs/logs/other.csv: there already" in capsys.readouterr().err
        assert main(run, "--name", "small", "--ship", "docs") == 1
        assert "docs is a folder" in capsys.readouterr().err
    assert log.read_text() == "of another run" and not RECORD.exists()
    assert main(run, "--name", "small", "--ship", "new/folder/any.pth") == 0
    assert Path("new/folder/any.pth").exists()


def test_a_claim_and_its_title_are_kept(run: Path, capsys: pytest.CaptureFixture) -> None:
    """A record of other settings, and a file that is no record, are not overwritten."""
    config = publish.recipe(Config(**checkpoint.load(run / "best.pth")["config"]))
    claimed = {"accuracy": 99.0, "epoch": "best"}
    claim = {"title": "small run", "config": config, "seed": 0, "test": None, "claimed": claimed}
    RECORD.parent.mkdir(parents=True)
    for wrong, text in (
        (claim | {"seed": 1}, "seed 1 (now 0)"),
        (claim | {"config": config | {"lr": 0.5}}, "lr 0.5 (now 0.2)"),
        ([claim], "not the record of a run"),
        ({"cores": 2}, "not the record of a run"),
    ):
        RECORD.write_text(json.dumps(wrong))
        assert main(run, "--name", "small") == 1
        assert text in capsys.readouterr().err
        assert json.loads(RECORD.read_text()) == wrong
    RECORD.write_text(json.dumps(claim))
    assert main(run, "--name", "small") == 0
    record = json.loads(RECORD.read_text())
    assert (record["title"], record["claimed"]) == ("small run", claimed) and record["test"]


def test_shipping_adds_provenance(run: Path) -> None:
    assert main(run, "--ship", checkpoint.PUBLISHED) == 0
    best, shipped = checkpoint.load(run / "best.pth"), checkpoint.load(Path("checkpoints/published.pth"))
    assert shipped.keys() - best.keys() == {"run", "test", "history", "digests", "temperature"}
    assert shipped["history"] == checkpoint.load(run / "last.pth")["history"] and shipped["run"] == run.name
    assert shipped["digests"] == data.SHA256
    assert shipped["test"]["accuracy"] == evaluate.grade(checkpoint.PUBLISHED, data_dir=".")["accuracy"]
    assert Path("docs/results/default.json").exists(), "the name is the experiment's unless one is given"


def test_half_precision_is_graded_as_it_is_shipped(run: Path, tmp_path: Path) -> None:
    """And a path of this machine does not go along."""
    for name in ("last.pth", "best.pth"):
        content = checkpoint.load(run / name)
        content["config"] |= {"weights": str(tmp_path / "start.pth"), "teacher": "checkpoints/teacher.pth"}
        checkpoint.save(run / name, content)
    path = Path("checkpoints/half.pth")
    assert main(run, "--name", "small", "--ship", path, "--half") == 0
    best, shipped, record = checkpoint.load(run / "best.pth"), checkpoint.load(path), json.loads(RECORD.read_text())
    for name, value in shipped["weights"].items():
        assert value.dtype == (torch.float16 if value.ndim > 1 else best["weights"][name].dtype)
        assert torch.allclose(value.float(), best["weights"][name].float(), rtol=1e-3, atol=1e-6)
    assert record["test"]["loss"] == pytest.approx(evaluate.grade(path, data_dir=".")["loss"], abs=1e-5)
    assert record["cost"]["size_kb"] == 3814.391, "the model computes in float32"
    for config in (record["config"], shipped["config"]):
        assert (config["weights"], config["teacher"]) == ("start.pth", "checkpoints/teacher.pth")


def test_unfinished_and_synthetic_runs_are_refused(model: nn.Module, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)

    def error() -> str:
        assert main(tmp_path) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "last.pth is not there" in error()
    write_checkpoint(tmp_path / "best.pth", model)
    write_checkpoint(tmp_path / "last.pth", model)
    assert "synthetic data" in error()
    config = {"dataset": "cifar100", "experiment": "default", "epochs": 3}
    for name in ("best.pth", "last.pth"):
        write_checkpoint(tmp_path / name, model, config=config, epoch=2)
    assert "2 of 3 epochs" in error() and "--resume" in error()
    for name in ("best.pth", "last.pth"):
        write_checkpoint(tmp_path / name, model, config=config | {"tutor": "any"}, epoch=3)
    assert "cannot be published" in error() and "tutor" in error()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth", "last.pth"]


def test_a_path_is_refused_as_a_name(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main("any", "--name", "../any")
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "--name" in line
