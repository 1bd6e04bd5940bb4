"""The report: its figures against values computed by hand, and a page that needs nothing but itself."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
import data
import evaluate
from config import Config
from tools import labels, report


def save(path: Path, network: nn.Module, dataset: str) -> Path:
    config = asdict(Config(dataset=dataset))
    checkpoint.save(path, {"config": config, "date": "2026-01-01", "epoch": 1, "weights": network.state_dict()})
    return path


def test_wilson_interval_by_hand() -> None:
    # z = 2: centre (8 + 2) / 14, half width 2 / 14 * sqrt(8 * 2 / 10 + 1); without any hit 0 to z^2 / (n + z^2)
    half = 200 / 14 * 2.6**0.5
    assert report.wilson(8, 10, z=2) == pytest.approx((1000 / 14 - half, 1000 / 14 + half))
    assert report.wilson(0, 12, z=2) == pytest.approx((0, 25))
    assert report.wilson(50, 100) == pytest.approx((40.383, 59.617), abs=1e-3)  # Wilson's usual example


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.5, 0.05, 1.0], dtype=torch.float64)
    correct = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    error, sums = report.calibration(confidence, correct)
    assert error == pytest.approx((abs(1 - 1.8) + abs(1 - 0.5) + 0.05 + 0) / 5)
    assert sums.shape == (3, 15)
    assert sums[0].nonzero().flatten().tolist() == [0, 7, 13, 14]
    error, sums = report.calibration(torch.tensor([0.5, 0.51]).double(), torch.ones(2).double(), bins=2)
    assert sums[0].tolist() == [1, 1]  # an upper edge belongs to its bin


def test_stages_add_up_to_the_network(network: nn.Module) -> None:
    *rows, total = report.stages(network)
    assert [row[0] for row in rows] == ["stem", *(f"block {i}" for i in range(1, 9)), "head", "classifier"]
    assert [row[1] for row in (rows[0], rows[8], rows[9], rows[10])] == ["16x32x32", "160x2x2", "960x2x2", "100"]
    tensors = [*network.parameters(), *network.buffers()]
    assert total[2] == sum(row[2] for row in rows) == sum(p.numel() for p in network.parameters())
    assert total[3] == sum(row[3] for row in rows) == sum(t.numel() * t.element_size() for t in tensors)
    assert total[4] == sum(row[4] for row in rows) == evaluate.measure(network)[0] == 11_776_320


@pytest.mark.parametrize("dataset", ["synthetic", "cifar100"])
def test_the_page_is_whole_and_stands_alone(
    dataset: str, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Two generated images a class; for cifar100 under that set's names."""
    test = data.Images(*data.synthetic(2, seed=0))
    monkeypatch.setattr(data, "load_test", lambda config: test)
    path, output = save(tmp_path / "a<b.pth", network, dataset), tmp_path / "new" / "index.html"
    assert report.main(["--checkpoint", str(path), "--output", str(output)]) == 0
    top1 = evaluate.evaluate(network, test).top1
    assert capsys.readouterr().out.splitlines() == [str(output), f"Accuracy = {top1:.2f} %"]
    page = output.read_text()
    assert str(path).replace("<", "&lt;") in page and "epoch 1, written 2026-01-01" in page
    assert "://" not in page and "<script" not in page and "url(" not in page and "<link" not in page
    assert set(re.findall(r'(?:src|href|srcset)="([^"]{,22})', page)) == {"data:image/png;base64,"}
    assert page.count("<img") == page.count('<img alt="') and '<html lang="en">' in page
    synthetic = [f"shape {i // 10}, texture {i % 10}" for i in range(100)]
    names = synthetic if dataset == "synthetic" else [labels.human(name) for name in labels.NAMES]
    groups = [f"shape {i}" for i in range(10)] if dataset == "synthetic" else map(labels.human, labels.SUPERCLASSES)
    assert all(page.count(f'<th scope="row">{name}</th>') == 1 for name in [*names, *groups])
    assert page.count(f"({dataset})</h2>") == page.count("<h2>") == 6
    assert "flops = 11776320" in page and "3814.391 kB" in page
    assert page.count("<h3>") == 12 and 24 <= page.count("<figure>") <= 12 + 12 * 4


def test_known_predictions_are_counted_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of class 0 taken for class 1 of its superclass, one image of 99 for 0, all else right."""
    test = data.Images(*data.synthetic(2, seed=0))
    guesses = test.labels.clone()
    guesses[:2], guesses[-1] = 1, 0
    known = nn.Identity()
    known.forward = lambda x: 9.0 * nn.functional.one_hot(guesses[: len(x)] if first.pop() else guesses[-len(x) :], 100)
    first = [False, True]
    monkeypatch.setattr(data, "load_test", lambda config: test)
    monkeypatch.setattr(evaluate, "folded", lambda network: known)
    torch.manual_seed(0)
    path = save(tmp_path / "any.pth", report.evaluate.MobileNetV3(), "synthetic")
    page, accuracy = report.build(path)
    assert accuracy == pytest.approx(98.5)
    cells = {
        name: re.findall(rf"{name}</th><td[^>]*>([\d.]+) %</td>(?:<td[^>]*>([\d.]+) %)?", page)
        for name in ("shape 0", "shape 9", "shape 0, texture 0", "shape 9, texture 9", "shape 5, texture 5")
    }
    assert cells["shape 0"] == [("90.00", "100.00")] and cells["shape 9"] == [("95.00", "95.00")]
    assert cells["shape 0, texture 0"] == [("0.00", "")] and cells["shape 9, texture 9"] == [("50.00", "")]
    assert cells["shape 5, texture 5"] == [("100.00", "")]
    assert re.findall("<h3>(.*?)</h3>", page) == [
        "shape 0, texture 0 and shape 0, texture 1: 2",
        "shape 0, texture 0 and shape 9, texture 9: 1",
    ]


def test_errors_are_one_line(network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def error(*argv: object) -> str:
        assert report.main([str(value) for value in argv]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "none.pth is not there" in error("--checkpoint", tmp_path / "none.pth")
    path = save(tmp_path / "any.pth", network, "cifar100")
    (tmp_path / "file").touch()

    def missing(config: Config) -> data.Images:
        raise data.DataError("no data")

    monkeypatch.setattr(data, "load_test", missing)
    assert error("--checkpoint", path) == "tools.report: error: no data"
    monkeypatch.setattr(data, "load_test", lambda config: data.Images(*data.synthetic(1, seed=0)))
    assert "file" in error("--checkpoint", path, "--output", tmp_path / "file" / "index.html")
    assert "data_dir must not be empty" in error("--checkpoint", path, "--data_dir", "")
