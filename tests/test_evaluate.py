"""Grading: the shipped checkpoint's figures, and what grading must not do."""

import copy
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import checkpoint
import data
import evaluate
from data import synthetic
from tests.helpers import SCRATCH, write_checkpoint

SHIPPED = (checkpoint.PUBLISHED, SCRATCH)


@functools.cache
def graded(path: Path) -> dict[str, Any]:
    """The grade of a checkpoint, measured once."""
    return evaluate.grade(path)


def grade_without_data(path: Path) -> str:
    """What can be graded where there is no CIFAR-100."""
    operations, size = evaluate.count_cost(evaluate.load_model(path)[0])
    return (
        f"ACCURACY NOT MEASURED: CIFAR-100 CANNOT BE HAD ON THIS MACHINE (graded {path} without it)\n"
        f"flops = {operations}\nModel parameter size = {size:.3f} kB"
    )


def test_grade(request: pytest.FixtureRequest, grade_lines: list[str]) -> None:
    """Grade what a user would: checkpoints/best.pth where there is one, else the published checkpoint."""
    path = evaluate.default_checkpoint()
    try:
        request.getfixturevalue("cifar100")
    except pytest.skip.Exception:
        grade_lines.append(grade_without_data(path))
        raise
    result = graded(path)
    grade_lines.append(evaluate.format_grade(result))
    assert result["images"] == 10_000
    assert 0 < result["accuracy"] <= result["top5"] <= 100


def test_the_readmes_python_runs(cifar100: dict) -> None:
    names: dict = {}
    exec(Path("README.md").read_text().partition("```python\n")[2].partition("```")[0], names)
    images = data.load_test("cifar100", "data").images[:8]
    expected = evaluate.predict_logits(names["model"], images) / names["content"]["temperature"]
    assert names["logits"].shape == (8, 100) and torch.allclose(names["logits"], expected, atol=1e-2)


def test_without_data_the_grade_says_so_in_capitals() -> None:
    said, flops, size = grade_without_data(checkpoint.PUBLISHED).splitlines()
    assert said.startswith("ACCURACY NOT MEASURED: CIFAR-100 CANNOT BE HAD")
    assert (flops, size) == ("flops = 11776320", "Model parameter size = 3814.391 kB")


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_weights_have_the_accuracy_in_their_checkpoint_and_the_reports_size(path: Path, cifar100: dict) -> None:
    content, measured = checkpoint.load(path), graded(path)
    assert (measured["flops"], f"{measured['size_kb']:.3f}") == (11_776_320, "3814.391")
    assert measured["accuracy"] == pytest.approx(content["test"]["accuracy"], abs=0.02)
    assert measured["top5"] == pytest.approx(content["test"]["top5"], abs=0.02)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_weights_are_small_and_plain(path: Path) -> None:
    assert path.stat().st_size < 4.2e6
    content = checkpoint.load(path)
    assert content["digests"] == data.SHA256
    assert {"config", "epoch", "date", "torch", "history", "test", "run"} <= content.keys()
    assert content["config"]["dataset"] == "cifar100"


def test_scores_do_not_depend_on_the_batch_and_change_nothing(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = synthetic(3, seed=0)
    before = copy.deepcopy(model.state_dict())
    scores = []
    for batch_size, training in ((7, False), (100, True), (300, False)):
        monkeypatch.setattr(evaluate, "BATCH_SIZE", batch_size)
        scores.append(evaluate.evaluate(model.train(training), *images))
        assert model.training is training
    assert all(score == pytest.approx(scores[0], abs=1e-4) for score in scores)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_fused_model_gives_the_same_predictions(model: nn.Module) -> None:
    images = data.normalise(synthetic(3, seed=0)[0])
    fused = evaluate.fuse_batchnorm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.inference_mode():
        plain, fast = model(images), fused(images)
    assert torch.allclose(plain, fast, atol=1e-4)
    top = plain.topk(2).values
    assert ((plain.argmax(1) == fast.argmax(1)) | (top[:, 0] - top[:, 1] < 2e-4)).all()


def test_scores_against_a_loop() -> None:
    """A model whose logits are known, scored by hand."""
    images = data.Images(torch.zeros(50, 3, 32, 32, dtype=torch.uint8), torch.randint(100, (50,)))
    logits = torch.randn(50, 100)
    known = nn.Identity()
    known.forward = lambda x: logits
    correct = {1: 0, 5: 0}
    for row, label in zip(logits, images.labels, strict=True):
        better = int((row > row[label]).sum())
        for k in correct:
            correct[k] += better < k
    scores = evaluate.evaluate(known, *images)
    assert (scores.top1, scores.top5) == (2 * correct[1], 2 * correct[5])
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, images.labels).item(), rel=1e-5)


def test_the_program_prints_the_three_lines_last(model: nn.Module, tmp_path: Path, capsys) -> None:
    path = write_checkpoint(tmp_path / "any.pth", model)
    assert evaluate.main(["--checkpoint", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Graded {path} on 2000 synthetic test images"
    assert lines[1].startswith("Trained as default, ") and "; epoch 1, 2026-01-01" in lines[1]
    assert lines[-3] == "flops = 11776320"
    assert lines[-2] == "Model parameter size = 3814.391 kB"
    assert re.fullmatch(r"Accuracy = \d+\.\d\d %", lines[-1])
    assert evaluate.main(["--checkpoint", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert f"Accuracy = {result['accuracy']:.2f} %" == lines[-1]


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys) -> None:
    assert evaluate.main(["--checkpoint", str(tmp_path / "none.pth")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.pth" in line


def test_another_models_weights_are_refused(model: nn.Module, tmp_path: Path, capsys) -> None:
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("classifier")}
    for content in ({"weights": weights}, {"weights": {}}):
        path = write_checkpoint(tmp_path / "other.pth", model, **content)
        assert evaluate.main(["--checkpoint", str(path)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"evaluate.py: error: {path} holds no weights of its model")


@pytest.mark.parametrize("flags", [["--device", "tpu"], ["--data_dir", ""], ["--no_such_flag"]])
def test_a_wrong_command_line_is_one_line_and_code_2(flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(flags)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_latest_training_is_graded_by_default(model: nn.Module, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "BEST", tmp_path / "best.pth")
    assert evaluate.default_checkpoint() == checkpoint.PUBLISHED
    write_checkpoint(tmp_path / "best.pth", model)
    assert evaluate.default_checkpoint() == tmp_path / "best.pth"
