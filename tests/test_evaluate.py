"""Grading: scores against counting, what the program prints, and what it leaves behind."""

import copy
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import checkpoint
import data
import evaluate
from config import Config
from tests.helpers import write_checkpoint
from utils import ROOT


def grade(path: Path, *words: str) -> int:
    return evaluate.main(["--checkpoint", str(path), "--device", "cpu", *words])


def test_scores_against_counting() -> None:
    """A model whose logits are known, scored by hand."""
    torch.manual_seed(0)
    images = data.Images(torch.zeros(50, 3, 32, 32, dtype=torch.uint8), torch.randint(100, (50,)))
    logits = torch.randn(50, 100)
    logits[torch.arange(0, 50, 2), images.labels[::2]] += 2  # half of them are likely to be among the first
    known = nn.Identity()
    known.forward = lambda x: logits
    better = (logits > logits.gather(1, images.labels[:, None])).sum(1)  # classes ahead of the right one
    correct = {k: int((better < k).sum()) for k in (1, 5)}
    scores = evaluate.evaluate(known, *images)
    assert (scores.top1, scores.top5) == (2 * correct[1], 2 * correct[5]) and 0 < correct[1] < correct[5] < 50
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, images.labels).item(), rel=1e-5)


def test_logits_are_those_of_the_normalised_images_in_eval_mode(images: Tensor) -> None:
    """No dropout, no batch statistics, no augmentation, whatever the model's mode, which stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(1800, 100))
    before, images = copy.deepcopy(model.state_dict()), torch.cat([images, images.flip(0)])[:150]
    with torch.inference_mode():
        expected = copy.deepcopy(model).eval()(data.normalise(images))
    for training in (True, False):
        logits = evaluate.predict_logits(model.train(training), images)
        assert torch.allclose(logits, expected, atol=1e-5) and model.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_program_prints_the_three_lines_last(tiny: Config, model: nn.Module, tmp_path: Path, capsys) -> None:
    path, (operations, size) = write_checkpoint(tmp_path / "any.pth", model), evaluate.count_cost(model)
    scores = evaluate.evaluate(model, *data.load_test("synthetic", ""))
    assert grade(path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Graded {path} on 2000 synthetic test images" and f"{scores.top5:.2f} %" in lines[2]
    assert "epoch 1, date 2026-01-01" in lines[1]
    assert lines[-3:-1] == [f"flops = {operations}", f"Model parameter size = {size:.3f} kB"]
    assert lines[-1] == f"Accuracy = {scores.top1:.2f} %"
    assert not any("total_" in name for name in model.state_dict()), "thop's counters stay off the caller's model"
    assert grade(path, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["accuracy"], result["top5"], result["flops"]) == (scores.top1, scores.top5, operations)


def test_the_repositorys_files_are_found_from_any_folder(
    tiny: Config, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The latest training is graded by default; a relative path of a flag is the current folder's. A bare state dict is
    graded on CIFAR-100."""
    assert evaluate.default_checkpoint() == checkpoint.PUBLISHED
    torch.save(model.state_dict(), checkpoint.BEST)
    assert evaluate.default_checkpoint() == checkpoint.BEST
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    stand_in, asked = data.load_test("synthetic", ""), []
    monkeypatch.setattr(evaluate, "load_test", lambda name, folder: asked.append((name, ROOT / folder)) or stand_in)
    assert evaluate.main(["--device", "cpu"]) == 0
    assert grade(Path("../checkpoints/best.pth"), "--data_dir", "here") == 0
    assert asked == [("cifar100", ROOT / Config.data_dir), ("cifar100", tmp_path / "elsewhere" / "here")]
    assert "Experiment unknown, epoch unknown, date unknown" in capsys.readouterr().out


def test_tf32_is_off_while_grading_and_on_again_after_it(tiny: Config, model: nn.Module) -> None:
    parts, seen = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), []
    model.register_forward_pre_hook(lambda *_: seen.append([part.fp32_precision for part in parts]))
    with ExitStack() as undo:
        for part in (*parts, torch.backends):  # as other code may have set them
            undo.callback(setattr, part, "fp32_precision", part.fp32_precision)
            part.fp32_precision = "tf32"
        evaluate.evaluate(model, *data.synthetic(1, 0))
        assert seen == [["ieee", "ieee"]] and [part.fp32_precision for part in parts] == ["tf32", "tf32"]
