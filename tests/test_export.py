"""Exported files give the checkpoint's probabilities, need no other file, and carry the labels."""

import json
import logging
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import data
from data import synthetic
from evaluate import predict_logits
from tests.helpers import random_model, write_checkpoint
from tools import export
from tools.labels import class_names
from tools.predict import probabilities
from utils import UserError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_model()


@pytest.fixture(scope="module")
def source(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "any.pth", model)


@pytest.fixture
def onnx_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def test_fused_batch_norms_give_the_same_logits(model: nn.Module, images: Tensor) -> None:
    fused = export.fuse_batchnorm(model)
    left = {type(layer) for layer in fused.modules()} & {nn.BatchNorm2d}
    assert not left and any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    torch.testing.assert_close(predict_logits(fused, images), predict_logits(model, images), atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_onnx_gives_the_checkpoints_probabilities(
    source: Path, model: nn.Module, images: Tensor, tmp_path: Path, onnx_packages: None, capsys: pytest.CaptureFixture
) -> None:
    """The process keeps its own warnings and logging."""
    import onnx
    import onnxruntime

    path, before = tmp_path / "new" / "any.onnx", (logging.root.manager.disable, list(warnings.filters))
    assert export.main([str(path), "--checkpoint", str(source)]) == 0
    assert (logging.root.manager.disable, list(warnings.filters)) == before
    output = capsys.readouterr()
    first, second = output.out.splitlines()
    assert output.err == "" and "2026-01-01" in first and str(path) in first and second.startswith("Checked:")
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    properties = {row.key: row.value for row in graph.metadata_props}
    assert json.loads(properties["labels"]) == list(class_names("synthetic"))
    assert (properties["date"], properties["dataset"]) == ("2026-01-01", "synthetic")
    assert str(Path(export.__file__).parent).encode() not in path.read_bytes()  # no folder of this machine
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert isinstance(given.shape[0], str)  # any number of images
    (result,) = session.run(["probabilities"], {"images": export.nhwc(images[:7]).numpy()})
    torch.testing.assert_close(torch.from_numpy(result), probabilities(model, images[:7]), atol=1e-5, rtol=0)
    assert list(path.parent.iterdir()) == [path]  # no external data


@pytest.mark.slow
def test_int8_of_the_published_checkpoint(
    published: Path, cifar100: str, images: Tensor, tmp_path: Path, onnx_packages: None, capsys: pytest.CaptureFixture
) -> None:
    import onnx

    path = tmp_path / "int8.onnx"
    assert export.main([str(path), "--int8", "--checkpoint", str(published), "--data_dir", cifar100]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    accuracy, exact, same = (float(word) for word in last.split() if word.replace(".", "").isdigit() and "." in word)
    assert accuracy > 73.5 and exact == pytest.approx(74.31, abs=0.02) and same > 95
    assert path.stat().st_size < 1.3e6
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    weights = [onnx.numpy_helper.to_array(row) for row in file.graph.initializer if row.data_type == 3]  # int8
    assert 32 < max(abs(int(array.min())) for array in weights if array.size > 1_000) <= 64  # reduce_range: 7 bits
    run = export.read_onnx(path.read_bytes())
    inputs = export.nhwc(images[:5])
    torch.testing.assert_close(torch.cat([run(x[None]) for x in inputs]), run(inputs), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_int8_ranges_come_from_training_images(
    source: Path, tmp_path: Path, onnx_packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, seen = data.load_test("synthetic", ""), []
    monkeypatch.setattr(export, "to_int8", lambda content, images: [seen.append(images), content][1])
    export.export(tmp_path / "any.onnx", source, int8=True)
    test_images = {bytes(image) for image in export.nhwc(test.images).flatten(1).numpy()}
    assert len(seen[0]) == export.CALIBRATION
    assert not test_images & {bytes(image) for image in seen[0].flatten(1).numpy()}


def test_check_finds_small_differences(model: nn.Module) -> None:
    """Also of one batch size alone, and NaN."""
    inputs = synthetic(2, seed=5).images
    expected = probabilities(model, inputs)
    changed = expected.clone()
    changed[150, 7] += 2e-4
    for given in (expected, changed, expected * torch.nan):
        parts = iter(given.split(export.BATCHES))
        if given is expected:
            assert "within 0.0e+00" in export.check(lambda batch, parts=parts: next(parts), expected, inputs)
            continue
        with pytest.raises(UserError, match="not written"):
            export.check(lambda batch, parts=parts: next(parts), expected, inputs)


def test_an_int8_file_is_graded_and_a_bad_one_refused() -> None:
    test = synthetic(2, seed=5)
    label_of = dict(zip(map(bytes, export.nhwc(test.images).flatten(1).numpy()), test.labels.tolist(), strict=True))

    def run(batch: Tensor, wrong: int = 0) -> Tensor:
        labels = torch.tensor([label_of[bytes(image)] for image in batch.flatten(1).numpy()])
        return nn.functional.one_hot(torch.where(labels < wrong, 99, labels), 100).float()

    expected = "Accuracy = 70.00 %, in float32 90.00 %; same class on 80.00 % of 200 images"
    assert export.compare(lambda x: run(x, 30), lambda x: run(x, 10), test) == expected
    with pytest.raises(UserError, match=r"not written.* 59\.0 %"):
        export.compare(lambda x: run(x, 41), run, test)


@pytest.mark.slow
def test_a_wrong_file_is_not_written(
    source: Path, tmp_path: Path, onnx_packages: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """An older file of that name stays. Warnings and logging are as before after an error too."""
    path, before = tmp_path / "any.onnx", (logging.root.manager.disable, list(warnings.filters))
    path.write_bytes(b"an older file")
    monkeypatch.setattr(export, "fuse_batchnorm", lambda model: nn.Sequential(nn.Flatten(), nn.Linear(3072, 100)))
    assert export.main([str(path), "--checkpoint", str(source)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "was not written" in line and path.read_bytes() == b"an older file"
    assert (logging.root.manager.disable, list(warnings.filters)) == before


def test_errors_are_one_line(source: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    def error(code: int, *argv: object) -> str:
        try:
            assert export.main([str(value) for value in argv]) == code
        except SystemExit as stopped:
            assert stopped.code == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "must end in .onnx" in error(2, tmp_path / "any.pt2")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            line = error(1, tmp_path / "any.onnx", "--checkpoint", source)
        assert name in line and line.endswith("pip install -r requirements-tools.txt")
    assert list(tmp_path.iterdir()) == []
