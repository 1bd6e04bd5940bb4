"""int8 files: small, alike, calibrated on training images alone."""

import json
import re
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import evaluate
from config import Config
from data import synthetic
from tests.helpers import SCRATCH, images, tempered
from tools import export, quantize
from tools.labels import class_names
from utils import UserError

pytestmark = pytest.mark.usefixtures("logging_again")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained weights, as a checkpoint for synthetic images, and its float32 file beside it."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    path, content = tmp_path_factory.mktemp("shipped") / "any.pth", checkpoint.load(SCRATCH)
    checkpoint.save(path, content | {"config": content["config"] | {"dataset": "synthetic"}})
    assert export.main([str(path.with_suffix(".onnx")), "--checkpoint", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def int8(shipped: Path) -> tuple[Path, list[str]]:
    """Its int8 file, in a folder of its own, and what the export found."""
    path = shipped.with_name("int8") / "any.onnx"
    return path, export.export(path, shipped, int8=True).splitlines()


def test_int8_is_a_third_of_the_size_and_alike(shipped: Path, int8: tuple[Path, list[str]]) -> None:
    import onnx

    path, lines = int8
    assert str(path) in lines[0] and lines[2] == "Calibrated on 500 synthetic training images"
    same = re.search(r"1000 synthetic test images: same top-1 class as in float32 on ([0-9.]+) %", lines[3])
    assert float(same[1]) > 75  # these images are none of those that it was trained on
    assert re.fullmatch(r"Accuracy = .+ %, in float32 .+ %: -?[0-9.]+ points lost", lines[4])
    size = path.stat().st_size
    assert size < 1.3e6 and size < shipped.with_suffix(".onnx").stat().st_size / 3
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    (scales,) = (row for row in file.graph.initializer if row.name == "model.stem.0.weight_scale")
    assert list(scales.dims) == [16]  # one a channel
    properties = {row.key: row.value for row in file.metadata_props}
    assert json.loads(properties["labels"]) == list(class_names("synthetic"))
    assert "test_accuracy" not in properties and "float32_test_accuracy" in properties
    run, (inputs, _) = quantize.read_onnx(path), images()
    together = run(inputs)
    assert together.shape == (3, 100) and together.sum(1).allclose(torch.ones(3), atol=1e-5)
    torch.testing.assert_close(torch.cat([run(image[None]) for image in inputs]), together, atol=1e-5, rtol=0)
    assert list(path.parent.iterdir()) == [path]


def test_a_stored_temperature_is_in_onnx_and_int8(
    shipped: Path, int8: tuple[Path, list[str]], tmp_path: Path, capsys
) -> None:
    """Both files give the classes that the files without it give; int8 keeps the division in float32."""
    import onnx

    model, content = evaluate.load_model(shipped)
    source, plain, small = (tmp_path / name for name in ("any.pth", "plain.onnx", "int8.onnx"))
    checkpoint.save(source, content | {"temperature": 0.5})
    assert export.main([str(plain), "--checkpoint", str(source)]) == 0
    assert export.main([str(small), "--int8", "--checkpoint", str(source)]) == 0
    output = capsys.readouterr()
    assert "points lost" in output.out.splitlines()[-1] and output.err == ""
    inputs, planes = images()
    expected, before = quantize.read_onnx(plain)(inputs), quantize.read_onnx(shipped.with_suffix(".onnx"))(inputs)
    torch.testing.assert_close(expected, tempered(planes, model, 0.5), atol=1e-5, rtol=0)
    assert torch.equal(expected.argmax(1), before.argmax(1)) and not expected.allclose(before, atol=1e-2)
    for path in (plain, small):
        file = onnx.load(path)
        assert {row.key: row.value for row in file.metadata_props}["temperature"] == "0.5"
        assert [node.op_type for node in file.graph.node][-2:] == ["Div", "Softmax"]
    odds, given = quantize.read_onnx(int8[0])(inputs), quantize.read_onnx(small)(inputs)
    torch.testing.assert_close(given, odds**2 / (odds**2).sum(1, keepdim=True), atol=1e-5, rtol=0)


def test_int8_agrees_with_float32_on_cifar100(shipped: Path, cifar100) -> None:
    plain, (inputs, what) = shipped.with_suffix(".onnx"), export.check_images("cifar100", Config.data_dir)
    content, calibrated = quantize.calibrated(plain, "cifar100", Config.data_dir)
    assert calibrated == "Calibrated on 500 cifar100 training images"
    inputs = inputs.permute(0, 2, 3, 1).contiguous()
    result = quantize.check(quantize.read_onnx(content), quantize.read_onnx(plain), inputs, what)
    assert float(re.search(r"float32 on ([0-9.]+) %", result)[1]) > 92


def test_calibration_never_reads_test_images(shipped: Path, monkeypatch) -> None:
    reads, load = [], data.load

    def watched(dataset: str, data_dir: str, source: str, per_class: int = 0) -> data.Images:
        reads.append(source)
        return load(dataset, data_dir, source, per_class)

    monkeypatch.setattr(data, "load", watched)
    monkeypatch.setattr(quantize, "CALIBRATION", 100)
    content, what = quantize.calibrated(shipped.with_suffix(".onnx"), "synthetic", "nowhere")
    assert (reads, what) == (["train"], "Calibrated on 100 synthetic training images")
    assert quantize.read_onnx(content)(images()[0]).shape == (3, 100)


def test_a_damaged_data_set_is_not_replaced_by_synthetic_images(tmp_path: Path) -> None:
    (tmp_path / "cifar100.npz").write_bytes(b"damaged")
    with pytest.raises(data.DataError, match="is damaged"):
        quantize.training_images("cifar100", str(tmp_path))
    with pytest.raises(data.DataError, match="is damaged"):
        export.check_images("cifar100", str(tmp_path))


def test_calibration_without_the_data_set_says_so(monkeypatch) -> None:
    def missing(path: Path) -> None:
        raise data.DataError("no network")

    monkeypatch.setattr(data, "build", missing)
    found, what = quantize.training_images("cifar100", "nowhere")
    assert found.shape == (100 * (200 - Config.validation_per_class), 3, 32, 32) and "CIFAR-100 cannot be had" in what


def test_int8_check_finds_bad_files() -> None:
    inputs = synthetic(2, seed=5)[0].permute(0, 2, 3, 1)
    expected = torch.rand(len(inputs), 100, generator=torch.Generator().manual_seed(0)).softmax(1)
    exact = dict(zip(map(bytes, inputs.flatten(1).numpy()), expected, strict=True))

    def run(batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([exact[bytes(image)] for image in batch.flatten(1).numpy()])

    def often_wrong(batch: torch.Tensor) -> torch.Tensor:
        wrong = batch.flatten(1).sum(1) % 3 > 0
        return torch.where(wrong[:, None], run(batch).flip(1), run(batch))

    def by_batch(batch: torch.Tensor) -> torch.Tensor:
        return run(batch) + 2e-4 * (len(batch) == 97)

    assert "same top-1 class as in float32 on 100.0 %" in quantize.check(run, run, inputs, "images")
    for bad in (often_wrong, by_batch, lambda batch: run(batch) * torch.nan):
        with pytest.raises(UserError, match=r"was not written\. 200 images"):
            quantize.check(bad, run, inputs, "images")


def test_a_bad_int8_file_is_refused(shipped: Path, monkeypatch) -> None:
    monkeypatch.setattr(quantize, "calibrated", lambda plain, *where: (plain.read_bytes(), "Calibrated"))
    monkeypatch.setattr(quantize, "SAME", 100.1)
    model = evaluate.load_model(shipped)[0]
    with pytest.raises(UserError, match=r"int8 file is not good enough.*on 100\.0 %"):
        export.to_int8(shipped.with_suffix(".onnx").read_bytes(), model, "synthetic", "nowhere")
