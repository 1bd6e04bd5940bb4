"""Grading: the shipped checkpoint's figures, and what grading must not do."""

import copy
import csv
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import augment
import checkpoint
import data
import evaluate
from config import Config
from conftest import grade_without_data


def test_grade(request: pytest.FixtureRequest, summary: list[str]) -> None:
    """Grade what a user would: checkpoints/best.pth where there is one, else the published checkpoint."""
    path = evaluate.default_checkpoint()
    try:
        request.getfixturevalue("cifar100")
    except pytest.skip.Exception:
        summary.append(grade_without_data(path))
        raise
    result = evaluate.grade(path)
    summary.append(evaluate.report(result))
    assert (result["flops"], f"{result['size_kb']:.3f}", result["images"]) == (11_776_320, "3814.391", 10_000)
    assert 0 < result["accuracy"] <= result["top5"] <= 100


def test_published_accuracy_is_the_one_in_its_provenance_and_in_the_readme(cifar100: dict) -> None:
    content = checkpoint.load(checkpoint.PUBLISHED)
    measured = evaluate.grade(checkpoint.PUBLISHED)
    assert measured["accuracy"] == pytest.approx(content["test"]["accuracy"], abs=0.02)
    assert measured["top5"] == pytest.approx(content["test"]["top5"], abs=0.02)
    (figure,) = re.findall(r"^Accuracy = (\d+\.\d\d) %$", Path("README.md").read_text(), re.MULTILINE)
    assert float(figure) == pytest.approx(content["test"]["accuracy"], abs=0.006)


def test_the_readmes_comparisons_are_their_logs() -> None:
    """Each row's figures are what its logs end with, and every log of a comparison has its place in a row."""
    pattern = r"^\|[^|]*\|([^|]*)\|[^|]*\|([^|]*docs/logs/ablation-[^|]*)\|$"
    seen: list[Path] = []
    for figures, links in re.findall(pattern, Path("README.md").read_text(), re.MULTILINE):
        logs = [Path(path) for path in re.findall(r"\((\S+)\)", links)]
        ends = [list(csv.DictReader(log.open()))[-1] for log in logs]
        assert [end["epoch"] for end in ends] == ["12"] * len(logs)
        assert re.findall(r"\d+\.\d\d", figures) == [f"{float(end['validation_accuracy']):.2f}" for end in ends]
        seen += logs
    assert sorted(seen) == sorted(Path("docs/logs").glob("ablation-*.csv")) != []


def test_published_checkpoint_is_small_and_plain() -> None:
    assert checkpoint.PUBLISHED.stat().st_size < 4.2e6
    content = checkpoint.load(checkpoint.PUBLISHED)
    assert content["digests"] == data.SHA256
    assert {"config", "epoch", "date", "torch", "history", "test", "run", "choice"} <= content.keys()
    assert content["config"]["dataset"] == "cifar100"


def test_scores_do_not_depend_on_the_batch_and_change_nothing(network: nn.Module) -> None:
    images = data.Images(*data.synthetic(3, seed=0))
    before = copy.deepcopy(network.state_dict())
    scores = [evaluate.evaluate(network, images, batch) for batch in (7, 100, 300)]
    assert all(score == pytest.approx(scores[0], abs=1e-4) for score in scores)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_folded_network_gives_the_same_predictions(network: nn.Module) -> None:
    images = augment.normalise(data.synthetic(3, seed=0)[0])
    folded = evaluate.folded(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        plain, fast = network(images), folded(images)
    assert torch.allclose(plain, fast, atol=1e-4)
    top = plain.topk(2).values
    assert ((plain.argmax(1) == fast.argmax(1)) | (top[:, 0] - top[:, 1] < 2e-4)).all()


def test_scores_against_a_loop() -> None:
    """A network whose logits are known, scored by hand."""
    images = data.Images(torch.zeros(50, 3, 32, 32, dtype=torch.uint8), torch.randint(100, (50,)))
    logits = torch.randn(50, 100)
    known = nn.Identity()
    known.forward = lambda x: logits
    hits = {1: 0, 5: 0}
    for row, label in zip(logits, images.labels, strict=True):
        place = int((row > row[label]).sum())
        for k in hits:
            hits[k] += place < k
    scores = evaluate.evaluate(known, images)
    assert (scores.top1, scores.top5) == (2 * hits[1], 2 * hits[5])
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, images.labels).item(), rel=1e-5)


def write_checkpoint(path: Path, network: nn.Module) -> Path:
    config = {"dataset": "synthetic", "experiment": "default"}
    checkpoint.save(path, {"config": config, "date": "2026-01-01", "epoch": 1, "weights": network.state_dict()})
    return path


def test_the_program_prints_the_three_lines_last(network: nn.Module, tmp_path: Path, capsys) -> None:
    path = write_checkpoint(tmp_path / "any.pth", network)
    assert evaluate.main(["--checkpoint", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(path) in lines[0] and "synthetic" in lines[0] and "2026-01-01" in lines[0]
    assert lines[-3] == "flops = 11776320"
    assert lines[-2] == "Model parameter size = 3814.391 kB"
    assert re.fullmatch(r"Accuracy = \d+\.\d\d %", lines[-1])
    assert evaluate.main(["--checkpoint", str(path), "--json", "--batch_size", "64"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert f"Accuracy = {result['accuracy']:.2f} %" == lines[-1]


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys) -> None:
    assert evaluate.main(["--checkpoint", str(tmp_path / "none.pth")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.pth" in line


def test_an_unfinished_or_synthetic_run_is_not_published(network: nn.Module, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "best.pth", network)
    write_checkpoint(tmp_path / "last.pth", network)
    with pytest.raises(checkpoint.CheckpointError, match="synthetic data"):
        evaluate.publish(tmp_path)
    for name, epochs in (("best.pth", 3), ("last.pth", 3)):
        config = {"dataset": "cifar100", "experiment": "default", "epochs": epochs}
        checkpoint.save(tmp_path / name, {"config": config, "epoch": 2, "weights": network.state_dict()})
    with pytest.raises(checkpoint.CheckpointError, match=r"2 of 3 epochs.*--resume"):
        evaluate.publish(tmp_path)


def test_publishing_adds_its_provenance(cifar100: dict, network: nn.Module, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "PUBLISHED", tmp_path / "published.pth")
    config = {"dataset": "cifar100", "experiment": "scratch", "epochs": 1, "data_dir": Config.data_dir}
    common = {"config": config, "epoch": 1}
    checkpoint.save(tmp_path / "best.pth", common | {"date": "2026-01-01", "weights": network.state_dict()})
    checkpoint.save(tmp_path / "last.pth", common | {"history": [{"epoch": 1}]})
    result, content = evaluate.publish(tmp_path), checkpoint.load(tmp_path / "published.pth")
    assert content["test"] == {name: result[name] for name in ("accuracy", "top5", "loss", "images")}
    assert content["history"] == [{"epoch": 1}]
    assert content["choice"].keys() == {path.stem for path in Path("docs/logs").glob("ablation-*.csv")} != set()
    assert all(1 < accuracy < 100 for accuracy in content["choice"].values())
