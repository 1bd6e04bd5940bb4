"""Write a checkpoint as one .onnx file, uint8 (N, 32, 32, 3) RGB to probabilities (N, 100), and check it."""

import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import data
from config import Config, OneLineParser, add_data_dir
from evaluate import add_checkpoint, predict_logits
from tools.labels import NAMES
from tools.predict import describe_checkpoint, open_checkpoint
from utils import UserError, atomic_write, program

Run = Callable[[Tensor], Tensor]  # uint8 (N, 32, 32, 3) to probabilities (N, 100)

BATCHES = (1, 2, 97, 100)  # images per call when a file is checked
TOLERANCE = 1e-4  # largest difference of a probability
CALIBRATION = 500  # training images that give the ranges of int8 values
MIN_AGREEMENT = 60.0  # % of images whose top-1 class an int8 file must share with the float32 file


class Deployed(nn.Module):
    """A model with its preprocessing: uint8 (N, 32, 32, 3) to probabilities (N, 100)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name, value in zip(("scale", "shift"), data.normalisation(torch.device("cpu")), strict=True):
            self.register_buffer(name, value[:, :, :1, :1].clone())

    def forward(self, images: Tensor) -> Tensor:
        planes = images.permute(0, 3, 1, 2).contiguous()
        return self.model(planes.float() * self.scale + self.shift).softmax(1)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the warnings, logs and prints of torch.export and of onnxruntime's quantiser; errors are raised."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), ExitStack() as undo:
        warnings.simplefilter("ignore")
        undo.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        yield


def to_onnx(model: nn.Module, properties: dict[str, str]) -> bytes:
    """A deployed model as an ONNX file without external data, with properties as its metadata. torch's exporter fuses
    each batch normalisation into the convolution before it."""
    from onnx.helper import set_model_props  # optional

    example = torch.zeros(2, data.SIDE, data.SIDE, 3, dtype=torch.uint8)  # a batch of 1 would become a constant
    exported = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names this machine's folders
    names = {"input_names": ["images"], "output_names": ["probabilities"]}
    proto = torch.onnx.export(exported, dynamo=True, external_data=False, verbose=False, **names).model_proto
    set_model_props(proto, properties)
    return proto.SerializeToString()


def read_onnx(content: bytes) -> Run:
    """A function that runs the content of an .onnx file in onnxruntime."""
    from onnxruntime import InferenceSession, SessionOptions  # optional

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # otherwise it pins threads to cores
    session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])


def to_int8(content: bytes, images: Tensor) -> bytes:
    """An int8 version of a float32 .onnx file, with ranges of activations from uint8 images (N, 32, 32, 3).

    Weights have a scale per channel; an activation's range holds 99.995 % of its values. What comes before the first
    convolution (the preprocessing) and after the classifier (softmax) stays in float32.
    """
    import onnx  # optional
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    model = onnx.load_from_string(content)
    names = [node.name for node in model.graph.node]
    layers = [i for i, node in enumerate(model.graph.node) if node.op_type in ("Conv", "Gemm", "MatMul")]
    batches = iter([{"images": batch.numpy()} for batch in images.split(100)])
    with tempfile.TemporaryDirectory() as folder:
        quantize_static(
            model,
            path := Path(folder, "int8.onnx"),
            SimpleNamespace(get_next=lambda: next(batches, None)),
            activation_type=QuantType.QUInt8,
            calibrate_method=CalibrationMethod.Percentile,
            extra_options={"CalibPercentile": 99.995},  # chosen on validation images
            per_channel=True,
            reduce_range=True,  # weights of 7 bits: sums of 8-bit products saturate on CPUs without VNNI instructions
            nodes_to_exclude=names[: layers[0]] + names[layers[-1] + 1 :],
        )
        return path.read_bytes()


def nhwc(images: Tensor) -> Tensor:
    """(N, 3, 32, 32) to the exported files' layout (N, 32, 32, 3)."""
    return images.permute(0, 2, 3, 1).contiguous()


@torch.inference_mode()
def check(run: Run, expected: Tensor, images: Tensor) -> str:
    """Compare a file's probabilities for batches of several sizes with those that are expected (200, 100).

    Returns a line on it. Raises UserError unless all are equal within TOLERANCE.
    """
    difference = (torch.cat([run(batch) for batch in nhwc(images).split(BATCHES)]) - expected).abs().max()
    if not difference <= TOLERANCE:  # true for NaN
        raise UserError(f"the file was not written, as its probabilities are wrong by {difference:.1e}")
    return f"batches of {', '.join(map(str, BATCHES))} images give probabilities within {difference:.1e}"


def compare(run: Run, exact: Run, test: data.Images) -> str:
    """Grade an int8 file and its float32 file on the test images. Returns a line. Raises UserError if they disagree."""
    batches = nhwc(test.images).split(500)
    given, expected = (torch.cat([file(batch).argmax(1) for batch in batches]) for file in (run, exact))
    pairs = (given, expected), (given, test.labels), (expected, test.labels)
    same, after, before = (100 * (one == other).double().mean().item() for one, other in pairs)
    if same < MIN_AGREEMENT:
        raise UserError(f"the int8 file was not written: its class is that of float32 on {same:.1f} % of test images")
    return f"Accuracy = {after:.2f} %, in float32 {before:.2f} %; same class on {same:.2f} % of {len(given)} images"


def export(path: Path, source: Path, data_dir: str = Config.data_dir, int8: bool = False) -> list[str]:
    """Check the file, then write it. Returns lines on what was written and checked. Raises UserError.

    Only int8 reads the data set: training images for the ranges, and the test images to grade it.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        import_module(name)  # raises ModuleNotFoundError at once and not after a minute
    model, about = open_checkpoint(source)
    properties = about | {"labels": json.dumps(NAMES)}
    images = data.synthetic(2, seed=0).images
    expected = predict_logits(model, images).softmax(1)
    with quiet():
        content = to_onnx(Deployed(model).eval(), properties)
    run = read_onnx(content)
    lines = [f"Checked: {check(run, expected, images)} of the checkpoint's"]
    if int8:
        train_set, _ = data.load_training(about["dataset"], data_dir, Config.validation_per_class)
        chosen = train_set.images[:: len(train_set.images) // CALIBRATION][:CALIBRATION]
        with quiet():
            content = to_int8(content, nhwc(chosen))
        small = read_onnx(content)
        lines.append(f"Checked: int8 {check(small, small(nhwc(images)), images)} of each other")
        lines.append(compare(small, run, data.load_test(about["dataset"], data_dir)))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(content))
    return [f"Exported {describe_checkpoint(about)} to {path}, {len(content) / 1e6:.1f} MB", *lines]


@program("tools.export")
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("file", type=Path, help="to write: NAME.onnx")
    parser.add_argument("--int8", action="store_true", help="quantise to int8: a third of the size")
    add_checkpoint(parser)
    add_data_dir(parser)
    arguments = parser.parse_args(argv)
    if arguments.file.suffix.lower() != ".onnx":
        parser.error(f"{arguments.file} must end in .onnx")
    print(*export(arguments.file, arguments.checkpoint, arguments.data_dir, arguments.int8), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
