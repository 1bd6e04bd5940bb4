"""Quantise a float32 .onnx file to int8 by onnxruntime's own quantiser, for tools/export.py."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import data
from config import Config
from data import Images
from utils import UserError

Run = Callable[[Tensor], Tensor]  # uint8 (N, 32, 32, 3) to probabilities (N, 100)

CALIBRATION = 500  # training images
SAME = 60.0  # % of images whose top-1 class the int8 file must share with the float32 file
TOLERANCE = 1e-4  # largest difference of an int8 file's probability between batch sizes


class Batches:
    """Images as the quantiser reads them."""

    def __init__(self, images: Tensor, size: int = 100) -> None:
        self.batches = iter(images.split(size))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def need_onnx() -> None:
    """Raise UserError where ONNX cannot be written or checked."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)}. Run: pip install -r requirements-tools.txt")


def read_onnx(file: Path | bytes) -> Run:
    """A function that runs the file, or its content, in onnxruntime."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # else it pins threads to cores, which containers refuse
    session = InferenceSession(
        file if isinstance(file, bytes) else str(file), options, providers=["CPUExecutionProvider"]
    )
    return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])


def spread_out(images: Tensor, count: int) -> Tensor:
    """So many of the images (N, 3, 32, 32), over all classes, in the files' layout (count, 32, 32, 3)."""
    return images[:: len(images) // count][:count].permute(0, 2, 3, 1).contiguous()


def or_synthetic(load: Callable[[str], Images], dataset: str, data_dir: str) -> tuple[Tensor, str]:
    """The images that `load` gives for a data set, and its name; the synthetic ones where CIFAR-100 cannot be had.

    Raises DataError where it is there but damaged.
    """
    try:
        return load(dataset).images, dataset
    except data.DataError:
        if Path(data_dir, "cifar100.npz").exists():
            raise
        return load("synthetic").images, "synthetic (CIFAR-100 cannot be had)"


def training_images(dataset: str, data_dir: str) -> tuple[Tensor, str]:
    """The images that a run with default settings trains on, and what they are."""
    images, name = or_synthetic(
        lambda name: data.load_training(name, data_dir, Config.validation_per_class)[0], dataset, data_dir
    )
    return images, f"{name} training images"


def quantize(source: Path, images: Tensor) -> bytes:
    """An int8 version of a float32 .onnx file, for the range of each activation on uint8 images (N, 32, 32, 3).

    Weights have a scale for each channel. An activation's range holds 99.999 % of its values. What comes before the
    first convolution (the preprocessing) and after the classifier (temperature, softmax) stays in float32.
    """
    import onnx  # optional
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    nodes = list(onnx.load(source).graph.node)
    layers = [i for i, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm", "MatMul")]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it prints its steps
        path = Path(folder) / "int8.onnx"
        quantize_static(
            source,
            path,
            Batches(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.Percentile,
            per_channel=True,
            reduce_range=True,  # weights of 7 bits: sums of 8-bit products saturate on CPUs without VNNI instructions
            nodes_to_exclude=[node.name for node in (*nodes[: layers[0]], *nodes[layers[-1] + 1 :])],
        )
        return path.read_bytes()


def calibrated(source: Path, dataset: str, data_dir: str) -> tuple[bytes, str]:
    """The int8 version of a float32 .onnx file, and what it was calibrated on."""
    images, what = training_images(dataset, data_dir)
    return quantize(source, spread_out(images, CALIBRATION)), f"Calibrated on {CALIBRATION} {what}"


def check(run: Run, exact: Run, images: Tensor, what: str) -> str:
    """Compare an int8 file with the float32 file on images (N, 32, 32, 3), and with itself for several batch sizes.

    Returns what was compared, in one line. Raises UserError where it differs by too much.
    """
    whole = run(images)
    given = torch.cat([run(part) for part in images.split((1, 2, 97, len(images) - 100))])
    same, difference = agreement(whole, exact(images)), (given - whole).abs().max()
    result = f"{len(images)} {what}: same top-1 class as in float32 on {same:.1f} %, "
    result += f"probabilities differ between batch sizes by up to {difference:.1e}"
    if same < SAME or not difference <= TOLERANCE:
        raise UserError(f"the int8 file is not good enough and was not written. {result}")
    return result


def agreement(given: Tensor, expected: Tensor) -> float:
    """% of images with the same top-1 class."""
    return 100 * (given.argmax(1) == expected.argmax(1)).double().mean().item()


def grade(runs: dict[str, Run], dataset: str, data_dir: str) -> dict[str, float]:
    """Accuracy in % of each file on all test images. Raises DataError."""
    images, labels = data.load_test(dataset, data_dir)
    batches = images.permute(0, 2, 3, 1).contiguous().split(500)
    found = {name: torch.cat([run(batch).argmax(1) for batch in batches]) for name, run in runs.items()}
    return {name: 100 * (classes == labels).double().mean().item() for name, classes in found.items()}
