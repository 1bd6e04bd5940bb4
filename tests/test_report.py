"""The report: its figures against values computed by hand, and a page that needs nothing but itself."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import evaluate
from data import synthetic
from tests.helpers import made_up_latency, write_checkpoint
from tools import calibrate, costs, labels, report
from tools.analysis import analyse, calibration, stages, wilson


@pytest.fixture(autouse=True)
def training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generated images a class are the training and the validation images of every run."""
    images = synthetic(2, seed=0)
    monkeypatch.setattr(data, "load_training", lambda *arguments: (images, images))


def test_wilson_interval_equals_hand_computed_values() -> None:
    # z = 2: centre (8 + 2) / 14, half width 2 / 14 * sqrt(8 * 2 / 10 + 1); without any correct one 0 to z^2 / (n + z^2)
    half = 200 / 14 * 2.6**0.5
    assert wilson(8, 10, z=2) == pytest.approx((1000 / 14 - half, 1000 / 14 + half))
    assert wilson(0, 12, z=2) == pytest.approx((0, 25))
    assert wilson(50, 100) == pytest.approx((40.383, 59.617), abs=1e-3)  # Wilson's usual example


def test_calibration_error_equals_hand_computed_values() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.5, 0.05, 1.0], dtype=torch.float64)
    correct = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    error, sums = calibration(confidence, correct)
    assert error == pytest.approx((abs(1 - 1.8) + abs(1 - 0.5) + 0.05 + 0) / 5)
    assert sums.shape == (3, 15)
    assert sums[0].nonzero().flatten().tolist() == [0, 7, 13, 14]
    error, sums = calibration(torch.tensor([0.5, 0.51]).double(), torch.ones(2).double(), bins=2)
    assert sums[0].tolist() == [1, 1]  # an upper edge belongs to its bin


def test_stages_add_up_to_the_model(model: nn.Module) -> None:
    rows = stages(model)
    assert [row[0] for row in rows] == ["stem", *(f"block {i}" for i in range(1, 9)), "head", "classifier"]
    assert [row[1] for row in (rows[0], rows[8], rows[9], rows[10])] == ["16x32x32", "160x2x2", "960x2x2", "100"]
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(row.bytes for row in rows) == sum(t.numel() * t.element_size() for t in tensors)
    assert sum(row.operations for row in rows) == evaluate.count_cost(model)[0] == 11_776_320


@pytest.mark.parametrize("dataset", ["synthetic", "cifar100"])
def test_page_is_complete_and_needs_no_other_file(
    dataset: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Two generated images a class; for cifar100 under that set's names."""
    test = synthetic(2, seed=0)
    monkeypatch.setattr(data, "load_test", lambda dataset, data_dir: test)
    path, output = write_checkpoint(tmp_path / "a<b.pth", model, dataset), tmp_path / "new" / "index.html"
    assert report.main(["--checkpoint", str(path), "--output", str(output)]) == 0
    top1 = evaluate.evaluate(model, *test).top1
    assert capsys.readouterr().out.splitlines() == [str(output), f"Accuracy = {top1:.2f} %"]
    page = output.read_text()
    assert str(path).replace("<", "&lt;") in page and "epoch 1, written 2026-01-01" in page
    assert "://" not in page and "<script" not in page and "url(" not in page and "<link" not in page
    assert set(re.findall(r'(?:src|href|srcset)="([^"]{,22})', page)) == {"data:image/png;base64,"}
    assert page.count("<img") == page.count('<img alt="') and '<html lang="en">' in page
    groups, names = list(map(labels.human, labels.SUPERCLASSES)), list(map(labels.human, labels.NAMES))
    if dataset == "synthetic":
        groups = [f"pattern {i} above" for i in range(10)]
        names = [f"pattern {i // 10} over {i % 10}" for i in range(100)]
    assert all(page.count(f'<th scope="row">{name}</th>') == 1 for name in [*names, *groups])
    assert page.count(f"({dataset})</h2>") == page.count("<h2>") == 6
    assert "flops = 11776320" in page and "3814.391 kB" in page
    assert page.count("<h3>") == 12 and 24 <= page.count("<figure>") <= 12 + 12 * 4


def test_known_predictions_are_counted_right(monkeypatch: pytest.MonkeyPatch, model: nn.Module, tmp_path: Path) -> None:
    """All of class 0 taken for class 1 of its superclass, one image of class 99 for 0, all else right."""
    test = synthetic(2, seed=0)
    predicted = test.labels.clone()
    predicted[:2], predicted[-1] = 1, 0
    monkeypatch.setattr(data, "load_test", lambda dataset, data_dir: test)
    monkeypatch.setattr(evaluate, "predict_logits", lambda model, images: 9.0 * nn.functional.one_hot(predicted, 100))
    results = analyse(write_checkpoint(tmp_path / "any.pth", model))
    assert (results.images, results.top1) == (200, 197)
    assert ("pattern 9 over 9", "pattern 0 over 0") in {(m.true, m.predicted) for m in results.mistakes}
    supers, classes = {name: rest for name, *rest in results.superclasses}, dict(results.classes)
    assert supers["pattern 0 above"] == [0.9, 1.0] and supers["pattern 9 above"] == [0.95, 0.95]
    assert classes["pattern 0 over 0"] == 0 and classes["pattern 9 over 9"] == 0.5
    assert classes["pattern 5 over 5"] == 1
    page = report.render(results)
    cells = {
        name: re.findall(rf">{name}</th><td[^>]*>([\d.]+) %</td>(?:<td[^>]*>([\d.]+) %)?", page)
        for name in ("pattern 0 above", "pattern 9 above", "pattern 0 over 0", "pattern 9 over 9")
    }
    assert cells["pattern 0 above"] == [("90.00", "100.00")] and cells["pattern 9 above"] == [("95.00", "95.00")]
    assert cells["pattern 0 over 0"] == [("0.00", "")] and cells["pattern 9 over 9"] == [("50.00", "")]
    assert re.findall("<h3>(.*?)</h3>", page) == [
        "pattern 0 over 0 and pattern 0 over 1: 2",
        "pattern 0 over 0 and pattern 9 over 9: 1",
    ]


def test_latency_is_shown_for_the_checkpoint_that_it_was_measured_on(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = synthetic(1, seed=0)
    monkeypatch.setattr(data, "load_test", lambda dataset, data_dir: test)
    monkeypatch.setattr(costs, "LATENCY", tmp_path / "latency.json")
    path = write_checkpoint(tmp_path / "any.pth", model, test={"accuracy": 1.0})

    def page() -> str:
        return report.render(analyse(path))

    assert "Latency" not in page()
    costs.LATENCY.write_text(json.dumps(made_up_latency(hashlib.sha256(path.read_bytes()).hexdigest())))
    assert page().count("<h2>Latency on a box, 8 threads, 2026-02-03 (synthetic)</h2>") == 1
    cells = "".join(f"<td>{cell}</td>" for cell in ("1.20 MB", "2.00", "1,000", "0.50", "4,000"))
    assert f'<th scope="row">int8 .onnx, onnxruntime</th>{cells}' in page()
    model.classifier.bias.data[0] += 1
    write_checkpoint(path, model)
    assert "Latency" not in page()


def rows(page: str) -> dict[str, str]:
    """The values of the page's first table, by measure."""
    return dict(re.findall(r'<th scope="row">([^<]+)</th><td[^>]*>([^<]+)</td>', page.split("</table>")[0]))


def test_page_shows_the_calibration_before_and_after(monkeypatch, model: nn.Module, tmp_path: Path) -> None:
    """A temperature that is fitted on validation images, one that the checkpoint stores, or none, and why."""
    test, validation = synthetic(3, seed=9), synthetic(2, seed=0)
    monkeypatch.setattr(data, "load_test", lambda dataset, data_dir: test)
    fitted = analyse(write_checkpoint(tmp_path / "any.pth", model))
    assert fitted.temperature == calibrate.fit(evaluate.predict_logits(model, validation.images), validation.labels)
    assert fitted.scaled.loss < fitted.plain.loss and fitted.scaled.error < fitted.plain.error
    logits = evaluate.predict_logits(model, test.images).double() / fitted.temperature
    confidence, predicted = logits.softmax(1).max(1)
    error, bins = calibration(confidence, (predicted == test.labels).double())
    assert fitted.scaled.error == error and torch.equal(fitted.scaled.bins, bins)
    assert 100 * fitted.top5 / fitted.images == pytest.approx(evaluate.evaluate(model, *test).top5)
    confidences = [mistake.probability for mistake in fitted.mistakes]
    assert confidences == sorted(confidences, reverse=True)
    page = report.render(fitted)
    assert f"The temperature {fitted.temperature:.4f}, fitted on the 5000 validation images of its run" in page
    assert "the order of the classes stays, and with it the accuracy" in page
    assert rows(page)["expected calibration error"] == f"{100 * fitted.plain.error:.2f} %"
    assert rows(page)["expected calibration error, with temperature"] == f"{100 * fitted.scaled.error:.2f} %"
    assert rows(page)["loss, with temperature"] == f"{fitted.scaled.loss:.4f}"

    monkeypatch.setattr(data, "load_training", lambda *arguments: pytest.fail("training images were read"))
    stored = analyse(write_checkpoint(tmp_path / "any.pth", model, temperature=3.0))
    assert stored.temperature == 3.0 and "The temperature 3.0000, stored in the checkpoint," in report.render(stored)
    assert (stored.top1, stored.top5, stored.plain[2]) == (fitted.top1, fitted.top5, fitted.plain[2])
    config = {"dataset": "synthetic", "experiment": "any", "validation_per_class": 0}
    none = analyse(write_checkpoint(tmp_path / "any.pth", model, config=config))
    page = report.render(none)
    assert none.temperature is None and none.scaled is None and "with temperature" not in page
    assert "There is no temperature: the checkpoint stores none, and its run kept no validation images" in page


def test_errors_are_one_line(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def error(*argv: object) -> str:
        assert report.main([str(value) for value in argv]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "none.pth is not there" in error("--checkpoint", tmp_path / "none.pth")
    path = write_checkpoint(tmp_path / "any.pth", model, "cifar100")
    (tmp_path / "file").touch()

    def missing(dataset: str, data_dir: str) -> data.Images:
        raise data.DataError("no data")

    monkeypatch.setattr(data, "load_test", missing)
    assert error("--checkpoint", path) == "tools.report: error: no data"
    monkeypatch.setattr(data, "load_test", lambda dataset, data_dir: synthetic(1, seed=0))
    assert "file" in error("--checkpoint", path, "--output", tmp_path / "file" / "index.html")
    path = write_checkpoint(tmp_path / "any.pth", model, temperature=-1.0)
    assert "any.pth holds a temperature that is no number from" in error("--checkpoint", path)


def test_another_network_is_one_stage() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.Flatten(), torch.nn.Linear(4096, 100))
    (row,) = stages(network)
    assert (row.name, row.output, row.parameters) == ("network", "100", 12 + 409_700)
