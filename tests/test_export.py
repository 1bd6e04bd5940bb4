"""Exported files give the checkpoint's probabilities, need no other file, and carry the labels."""

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import data
from evaluate import predict_logits
from tools import export
from tools.labels import NAMES
from utils import UserError


@pytest.fixture
def onnx_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


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
    assert json.loads(properties["labels"]) == list(NAMES)
    assert (properties["date"], properties["dataset"]) == ("2026-01-01", "synthetic")
    assert str(Path(export.__file__).parent).encode() not in path.read_bytes()  # no folder of this machine
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert isinstance(given.shape[0], str)  # any number of images
    (result,) = session.run(["probabilities"], {"images": export.nhwc(images[:7]).numpy()})
    expected = predict_logits(model, images[:7]).softmax(1)
    torch.testing.assert_close(torch.from_numpy(result), expected, atol=1e-5, rtol=0)
    assert list(path.parent.iterdir()) == [path]  # no external data


@pytest.mark.slow
def test_int8_of_the_published_checkpoint(
    published: Path, cifar100: str, tmp_path: Path, onnx_packages: None, capsys: pytest.CaptureFixture
) -> None:
    import onnx

    path = tmp_path / "int8.onnx"
    assert export.main([str(path), "--int8", "--checkpoint", str(published), "--data_dir", cifar100]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    accuracy, exact, same = (float(word) for word in last.split() if word.replace(".", "").isdigit() and "." in word)
    assert accuracy > 76.2 and exact == pytest.approx(76.83, abs=0.02) and same > 95
    assert path.stat().st_size < 1.3e6
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    weights = [onnx.numpy_helper.to_array(row) for row in file.graph.initializer if row.data_type == 3]  # int8
    assert 32 < max(abs(int(array.min())) for array in weights if array.size > 1_000) <= 64  # reduce_range: 7 bits
    assert file.graph.node[-1].op_type == "Softmax"  # in float32: in 8 bits small probabilities would be 0


@pytest.mark.slow
def test_int8_ranges_come_from_training_images(
    source: Path, tmp_path: Path, onnx_packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    test, seen = data.load_test("synthetic", ""), []
    monkeypatch.setattr(export.Config, "validation_per_class", 50)  # whatever the default is
    monkeypatch.setattr(export, "to_int8", lambda content, images: [seen.append(images), content][1])
    export.export(tmp_path / "any.onnx", source, int8=True)
    test_images = {bytes(image) for image in export.nhwc(test.images).flatten(1).numpy()}
    assert len(seen[0]) == export.CALIBRATION
    assert not test_images & {bytes(image) for image in seen[0].flatten(1).numpy()}


def test_check_finds_small_differences(model: nn.Module) -> None:
    """Also of one batch size alone, and NaN."""
    inputs = data.synthetic(2, seed=5).images
    expected = predict_logits(model, inputs).softmax(1)
    changed = expected.clone()
    changed[150, 7] += 2e-4
    for given in (changed, expected * torch.nan):
        parts = iter(given.split(export.BATCHES))
        with pytest.raises(UserError, match="not written"):
            export.check(lambda batch, parts=parts: next(parts), expected, inputs)


def test_an_int8_file_is_graded_and_a_bad_one_refused() -> None:
    test = data.synthetic(2, seed=5)

    def file(wrong: int) -> export.Run:
        labels = torch.where(test.labels < wrong, 99, test.labels)
        return lambda batch: nn.functional.one_hot(labels, 100)

    expected = "Accuracy = 70.00 %, in float32 90.00 %; same class on 80.00 % of 200 images"
    assert export.compare(file(30), file(10), test) == expected
    with pytest.raises(UserError, match=r"not written.* 59\.0 %"):
        export.compare(file(10), file(51), test)
