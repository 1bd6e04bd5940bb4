"""Records and pages: a run is graded once, its record holds what was measured, and the pages show the records."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import checkpoint
import data
import evaluate
import train
from config import PLAIN, Config
from tests.helpers import official
from tools import results
from utils import ROOT


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages, records, logs and curves, in which the tool works; the pages are up to date."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(results, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(results, "README", tmp_path / "README.md")
    assert results.main([]) == 0
    return tmp_path / "docs"


@pytest.fixture
def run(docs: Path, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on a small data set that the program takes for CIFAR-100. Its first epoch is the best."""
    folder, accuracies = tmp_path / "data", iter((60.0, 50.0))
    official(monkeypatch, folder)
    monkeypatch.setattr(train, "evaluate", lambda *_: evaluate.Scores(1.0, next(accuracies), 100.0))
    monkeypatch.setattr(Config, "device", "cpu")  # a GPU may differ in one image
    return train.train(replace(tiny, dataset="cifar100", seed=7, images_per_class=0, data_dir=str(folder)))


def change(run: Path, **settings: Any) -> None:
    """Change settings in the checkpoints of a run."""
    for name in ("last.pth", "best.pth"):
        content = checkpoint.load(run / name)
        checkpoint.save(run / name, content | {"config": content["config"] | settings})


def record(run: Path) -> int:
    return results.main([str(run), "--name", "mine", "--data_dir", str(run.parents[1] / "data")])


def test_a_run_is_graded_and_recorded_once(run: Path, docs: Path, capsys: pytest.CaptureFixture) -> None:
    path = docs / "results" / "mine.json"
    change(run, teacher="/home/me/teacher.pth")
    assert record(run) == 0
    content, best = json.loads(path.read_text()), checkpoint.load(run / "best.pth")
    model, folder = checkpoint.load_model(run / "best.pth")[0], str(run.parents[1] / "data")
    images = {"test": data.load_test("cifar100", folder), "train_eval": data.load_training("cifar100", folder, 1)[0]}
    for part, (pixels, labels) in images.items():
        scores = evaluate.evaluate(model, pixels, labels)
        expected = {"accuracy": scores.top1, "loss": scores.loss, "images": len(labels)}
        assert {key: content[part][key] for key in expected} == pytest.approx(expected, abs=1e-4), part
    for part in ("train", "validation"):
        assert content[part]["accuracy"] == pytest.approx(best["metrics"][f"{part}_accuracy"], abs=1e-5), part
    assert content["config"] == {name: best["config"][name] for name in PLAIN} | {"teacher": "teacher.pth"}
    assert (content["seed"], content["epochs"], content["best_epoch"], content["commit"]) == (7, 2, 1, best["commit"])
    grade = evaluate.grade(run / "best.pth", "cpu", folder)
    assert (content["test"]["top5"], content["cost"]["operations"]) == (pytest.approx(grade["top5"]), grade["flops"])
    assert (docs / "logs" / "mine.csv").read_text() == (run / "log.csv").read_text()
    assert (docs / "curves" / "mine.png").read_bytes().startswith(b"\x89PNG")

    text = path.read_text()
    assert str(run.parents[1]) not in text, "no folder of this machine"
    assert record(run) == 1 and "graded once" in capsys.readouterr().err
    assert path.read_text() == text
    assert results.main(["--check"]) == 1, "the page lacks the new run"
    assert results.main([]) == 0 and results.main(["--check"]) == 0
    assert f"{content['test']['accuracy']:.2f} %" in (docs / "results.md").read_text().partition("| `mine` |")[2]


def test_what_is_refused_leaves_nothing(run: Path, docs: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(docs.rglob("*"))

    def refused(cure: str) -> None:
        capsys.readouterr()
        assert record(run) == 1, cure
        error = capsys.readouterr().err
        assert cure in error and error.count("\n") == 1
        assert sorted(docs.rglob("*")) == before

    change(run, epochs=3)
    refused("python train.py --resume")
    change(run, epochs=2, dataset="synthetic")
    refused("all images of CIFAR-100")
    change(run, dataset="cifar100", images_per_class=3)
    refused("all images of CIFAR-100")


def test_pages_follow_the_records(docs: Path, capsys: pytest.CaptureFixture) -> None:
    for path in (docs / "results").glob("default-*.json"):
        path.unlink()
    taught = json.loads((docs / "results" / "taught.json").read_text())
    for seed, accuracy in enumerate((70.0, 72.0)):
        content = taught | {"name": f"default-{seed}", "seed": seed, "test": taught["test"] | {"accuracy": accuracy}}
        (docs / "results" / f"default-{seed}.json").write_text(json.dumps(content))
        shutil.copy(docs / "logs" / "taught.csv", docs / "logs" / f"default-{seed}.csv")
    assert results.main(["--check"]) == 1
    assert results.main([]) == 0 and results.main(["--check"]) == 0
    assert "**71.00 %** ± 1.41 (mean and standard deviation of seeds 0, 1)" in results.README.read_text()
    assert (docs / "curves" / "default.png").exists()
    page = docs / "results.md"
    page.write_text(page.read_text().replace("<!-- /runs -->", ""))
    assert results.main(["--check"]) == 1 and "lack markers" in capsys.readouterr().err
    other = json.dumps(taught | {"config": taught["config"] | {"lr": 0.1}})
    (docs / "results" / "default-1.json").write_text(other.replace('"taught"', '"default-1"'))
    assert results.main([]) == 1 and "different settings" in capsys.readouterr().err


def test_records_agree_with_their_logs() -> None:
    for name, content in results.read_records().items():
        row = content["history"][content["best_epoch"] - 1]
        for part in ("train", "validation"):
            logged = results.scores(row[f"{part}_accuracy"], row[f"{part}_loss"])
            assert content[part] == (logged and pytest.approx(logged, abs=1e-5)), (name, part)
