"""The report: its figures against values computed by hand, and a page that needs nothing but itself."""

import io
import re
from base64 import b64decode
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn

import data
import evaluate
from data import synthetic
from tests.helpers import write_checkpoint
from tools import labels, report


@pytest.fixture
def test_set(monkeypatch: pytest.MonkeyPatch) -> data.Images:
    """Two generated images per class, whatever the data set."""
    images = synthetic(2, seed=0)
    monkeypatch.setattr(report, "load_test", lambda dataset, data_dir: images)
    return images


def test_calibration_error_equals_hand_computed_values() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.5, 0.2, 1.0], dtype=torch.float64)
    correct = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    error, sums = report.calibration(confidence, correct)
    assert error == pytest.approx((abs(1 - 1.8) + abs(1 - 0.5) + 0.2 + 0) / 5)
    assert sums.shape == (3, 15) and sums[0].nonzero().flatten().tolist() == [2, 7, 13, 14]


def test_stages_add_up_to_the_model(model: nn.Module) -> None:
    rows = report.stages(model)
    blocks = [f"block {i}" for i in range(1, len(model.blocks) + 1)]
    assert [row[0] for row in rows] == ["stem", *blocks, "head", "classifier"]
    assert rows[0][1].endswith("x32x32") and rows[-1][1] == "100"
    tensors = [*model.parameters(), *model.buffers()]
    _, _, parameters, size, operations = zip(*rows, strict=True)
    assert sum(parameters) == sum(p.numel() for p in model.parameters())
    assert sum(size) == sum(t.numel() * t.element_size() for t in tensors)
    assert sum(operations) == evaluate.count_cost(model)[0]


def test_page_is_complete_and_needs_no_other_file(
    model: nn.Module, test_set: data.Images, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, output = write_checkpoint(tmp_path / "a<b.pth", model, "cifar100"), tmp_path / "new" / "index.html"
    assert report.main(["--checkpoint", str(path), "--output", str(output)]) == 0
    scores = evaluate.evaluate(model, *test_set)
    assert capsys.readouterr().out.splitlines() == [str(output), f"Accuracy = {scores.top1:.2f} %"]
    page = output.read_text()
    assert str(path).replace("<", "&lt;") in page and "experiment default, date 2026-01-01" in page
    assert not any(text in page for text in ("://", "<script", "url(", "<link", "a<b"))
    assert set(re.findall(r'(?:src|href|srcset)="([^"]{,22})', page)) == {"data:image/png;base64,"}
    assert page.count("<img") == page.count('<img alt="') and '<html lang="en">' in page
    names = [*labels.NAMES, *labels.SUPERCLASSES]
    assert all(page.count(f'<th scope="row">{name}</th>') == 1 for name in names)
    operations, size = evaluate.count_cost(model)
    assert f"flops = {operations}" in page and f"{size:.3f} kB" in page
    total = re.findall(r">(\d+)<", page.split('scope="row">total<')[1])
    assert total == [str(sum(p.numel() for p in model.parameters())), str(evaluate.model_bytes(model)), str(operations)]
    assert page.count("<h3>") == 12 and 24 <= page.count("<figure>") <= 12 + 12 * 4
    rows = dict(re.findall(r'<th scope="row">([^<]+)</th><td[^>]*>([^<]+)</td>', page.split("</table>")[0]))
    assert float(rows["top-5 accuracy"].rstrip(" %")) == pytest.approx(scores.top5)
    assert float(rows["loss"]) == pytest.approx(scores.loss, abs=1e-4)


def test_known_predictions_are_counted_right(
    model: nn.Module, test_set: data.Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both apples taken for mushrooms, of the same superclass, one worm for an apple, all else right."""
    predicted = test_set.labels.clone()
    predicted[:2], predicted[-1] = labels.NAMES.index("mushroom"), 0
    logits = (9.0 + torch.arange(200)[:, None] / 100) * nn.functional.one_hot(predicted, 100)
    logits[:2, 0] = 1.0  # the apples' own class is the second
    monkeypatch.setattr(evaluate, "predict_logits", lambda model, images: logits)
    page, accuracy = report.report(write_checkpoint(tmp_path / "any.pth", model))
    assert accuracy == pytest.approx(98.5)
    cells = dict(re.findall(r'scope="row">([^<]+)</th>(.*?)</tr>', page))
    percents = {name: re.findall(r">([\d.]+) %<", row) for name, row in cells.items()}
    assert percents["top-1 accuracy"] == ["98.50"] and "0.86 points" in cells["top-1 accuracy"]  # 0.985, 0.015, 200
    error = abs(logits.softmax(1).amax(1).mean().item() - 0.985)  # all confidences are in the last bin
    assert percents["expected calibration error"] == [f"{100 * error:.2f}"]
    assert percents["fruit_and_vegetables"] == ["80.00", "100.00"]
    assert percents["non-insect_invertebrates"] == ["90.00", "90.00"]
    assert (percents["apple"], percents["worm"], percents["bear"]) == (["0.00"], ["50.00"], ["100.00"])
    assert re.findall("<h3>(.*?)</h3>", page) == ["apple and mushroom: 2", "apple and worm: 1"]
    mistakes = page.split("Most confident mistakes")[1]
    captions = re.findall(r"<figcaption>(.*?),", mistakes)
    assert captions == ["worm → apple", *["apple → mushroom"] * 2]  # the worm's logit is the largest
    worm = imread(io.BytesIO(b64decode(re.findall('base64,(.*?)"', mistakes)[0])), "png")  # RGBA of 0 to 1
    assert (255 * worm[:, :, :3]).round().tolist() == test_set.images[-1].permute(1, 2, 0).tolist()
