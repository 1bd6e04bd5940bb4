"""Exported files give the checkpoint's probabilities, need no other file, and carry the labels."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import data
from data import synthetic
from tests.helpers import images, tempered, write_checkpoint
from tools import export, quantize
from tools.labels import NAMES, SUPERCLASSES, class_names
from tools.predict import probabilities
from utils import UserError

pytestmark = pytest.mark.usefixtures("logging_again")


def test_labels_are_in_the_official_order() -> None:
    assert len(SUPERCLASSES) == 20 and all(len(names) == 5 for names in SUPERCLASSES.values())
    assert len(set(NAMES)) == 100
    assert [NAMES[label] for label in (0, 1, 47, 58, 99)] == [
        "apple",
        "aquarium_fish",
        "maple_tree",
        "pickup_truck",
        "worm",
    ]
    assert class_names("synthetic")[37] == "pattern 3 over 7"


def test_pt2_gives_the_checkpoints_probabilities(model: nn.Module, tmp_path: Path, capsys) -> None:
    source, path = write_checkpoint(tmp_path / "any.pth", model), tmp_path / "any.pt2"
    assert export.main([str(path), "--checkpoint", str(source)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    first, second = output.out.splitlines()
    assert str(source) in first and "2026-01-01" in first and str(path) in first
    assert "1000 synthetic test images: same top-1 class on 1000" in second
    extra = dict.fromkeys(("labels", "checkpoint", "experiment", "date", "dataset", "temperature"), "")
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra["labels"])[42] == "pattern 4 over 2"
    assert (extra["checkpoint"], extra["experiment"]) == (str(source), "default")
    assert extra["temperature"] == "" and not [node for node in program.graph.nodes if "div" in str(node.target)]
    given, expected = images()
    torch.testing.assert_close(program.module()(given), probabilities(model, expected), atol=1e-5, rtol=0)
    assert {path.name for path in tmp_path.iterdir()} == {"any.pth", "any.pt2"}


def test_onnx_gives_the_checkpoints_probabilities(model: nn.Module, tmp_path: Path, capsys) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source, path = write_checkpoint(tmp_path / "any.pth", model, test={"accuracy": 71.25}), tmp_path / "any.onnx"
    assert export.main([str(path), "--checkpoint", str(source)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "1000 synthetic test images: same top-1 class on 1000" in output.out.splitlines()[-1]
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    properties = {row.key: row.value for row in graph.metadata_props}
    assert json.loads(properties["labels"]) == list(class_names("synthetic"))
    assert (properties["checkpoint"], properties["date"]) == (str(source), "2026-01-01")
    assert (properties["dataset"], properties["test_accuracy"]) == ("synthetic", "71.25")
    assert str(Path(export.__file__).parent).encode() not in path.read_bytes()  # no folder of this machine
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert isinstance(given.shape[0], str)  # any number of images
    given, expected = images()
    (result,) = session.run(["probabilities"], {"images": given.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), probabilities(model, expected), atol=1e-5, rtol=0)
    assert {path.name for path in tmp_path.iterdir()} == {"any.pth", "any.onnx"}  # no external data


def test_a_stored_temperature_is_in_pt2(model: nn.Module, tmp_path: Path) -> None:
    source, path = write_checkpoint(tmp_path / "any.pth", model, temperature=2.5), tmp_path / "any.pt2"
    assert export.main([str(path), "--checkpoint", str(source)]) == 0
    program = torch.export.load(path, extra_files=(extra := {"temperature": ""}))
    given, planes = images()
    torch.testing.assert_close(program.module()(given), tempered(planes, model, 2.5), atol=1e-5, rtol=0)
    assert extra["temperature"] == "2.5"
    assert not tempered(planes, model, 2.5).allclose(tempered(planes, model, 1.0), atol=1e-2)


@pytest.mark.parametrize("name", ["any.pt2", "any.onnx"])
def test_a_wrong_stored_temperature_exports_nothing(name: str, model: nn.Module, tmp_path: Path, capsys) -> None:
    pytest.importorskip("onnxscript")
    source = write_checkpoint(tmp_path / "any.pth", model, temperature=float("nan"))
    assert export.main([str(tmp_path / name), "--checkpoint", str(source)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a temperature that is no number" in line and not (tmp_path / name).exists()


def test_a_file_with_other_probabilities_is_not_written(model: nn.Module, tmp_path: Path, monkeypatch, capsys) -> None:
    source, path = write_checkpoint(tmp_path / "any.pth", model), tmp_path / "any.pt2"
    path.write_bytes(b"an older file")
    monkeypatch.setattr(export, "probabilities", lambda model, images: torch.rand(len(images), 100).softmax(1))
    assert export.main([str(path), "--checkpoint", str(source)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not give the checkpoint's probabilities" in line and "not written" in line
    assert path.read_bytes() == b"an older file"


def test_check_finds_small_differences(model: nn.Module) -> None:
    inputs = synthetic(2, seed=5)[0]
    expected = probabilities(model, inputs)
    parts = iter(expected.split((1, 2, 97, len(inputs) - 100)))
    assert "same top-1 class on 200" in export.check(lambda images: next(parts), model, inputs, "images")
    changed = expected.clone()
    changed[150, 7] += 2e-4
    for wrong in (changed, expected * torch.nan):
        parts = iter(wrong.split((1, 2, 97, len(inputs) - 100)))
        with pytest.raises(UserError, match="200 images"):
            export.check(lambda images, parts=parts: next(parts), model, inputs, "images")


def test_without_the_data_set_synthetic_images_are_checked(monkeypatch) -> None:
    def missing(path: Path) -> None:
        raise data.DataError("no network")

    monkeypatch.setattr(data, "build", missing)
    checked, what = export.check_images("cifar100", "nowhere")
    assert checked.shape == (1000, 3, 32, 32) and "CIFAR-100 cannot be had" in what


def test_export_errors_are_one_line(model: nn.Module, tmp_path: Path, monkeypatch, capsys) -> None:
    source = write_checkpoint(tmp_path / "any.pth", model)

    def error(*argv: object) -> str:
        assert export.main([str(value) for value in argv]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "none.pth" in error(tmp_path / "any.pt2", "--checkpoint", tmp_path / "none.pth")
    found = importlib.util.find_spec
    monkeypatch.setattr(quantize, "find_spec", lambda name: None if name == "onnxscript" else found(name) or "there")
    line = error(tmp_path / "any.onnx", "--int8", "--checkpoint", source)
    assert "onnxscript" in line and "pip install -r requirements-tools.txt" in line
    with pytest.raises(SystemExit) as stopped:
        export.main([str(tmp_path / "any.txt")])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and ".onnx or .pt2" in line
    with pytest.raises(SystemExit) as stopped:
        export.main([str(tmp_path / "any.pt2"), "--int8"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "--int8" in line and ".onnx" in line
    assert {path.name for path in tmp_path.iterdir()} == {"any.pth"}
