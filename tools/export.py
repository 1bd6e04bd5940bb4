"""Write a checkpoint as one .onnx or .pt2 file, uint8 (N, 32, 32, 3) RGB to probabilities (N, 100), and check it."""

import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from config import Config, OneLineParser
from evaluate import default_checkpoint, fuse_batchnorm
from tools import quantize
from tools.predict import describe, open_checkpoint, probabilities
from utils import UserError, atomic_write, program

CHECKED, TOLERANCE = 1_000, 1e-4  # images; largest difference of a probability
SHAPES = ({0: torch.export.Dim("batch")},)


class Deployed(nn.Module):
    """The model with its preprocessing: uint8 (N, 32, 32, 3) to probabilities (N, 100)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = fuse_batchnorm(model)
        for name, value in zip(("scale", "shift"), data.normalisation(torch.device("cpu")), strict=True):
            self.register_buffer(name, value[:, :, :1, :1].clone())

    def forward(self, images: Tensor) -> Tensor:
        planes = images.permute(0, 3, 1, 2).contiguous()  # torch 2.5 cannot export channels_last strides
        return self.model(planes.float() * self.scale + self.shift).softmax(1)


def to_onnx(exported: torch.export.ExportedProgram, properties: dict[str, str]) -> bytes:
    """An ONNX file without external data, with properties as its metadata."""
    from onnx.helper import set_model_props  # optional

    names = {"input_names": ["images"], "output_names": ["probabilities"], "dynamic_shapes": SHAPES}
    model = torch.onnx.export(exported, dynamo=True, external_data=False, verbose=False, **names).model_proto
    set_model_props(model, properties)
    return model.SerializeToString()


def to_pt2(exported: torch.export.ExportedProgram, properties: dict[str, str]) -> bytes:
    """A torch.export file, with properties as extra files."""
    buffer = io.BytesIO()
    torch.export.save(exported, buffer, extra_files=properties)
    return buffer.getvalue()


def check_images(dataset: str, data_dir: str) -> tuple[Tensor, str]:
    """Test images spread over all classes, uint8 (1000, 3, 32, 32), and what they are."""
    images, name = quantize.or_synthetic(lambda name: data.load_test(name, data_dir), dataset, data_dir)
    return images[:: len(images) // CHECKED][:CHECKED], f"{name} test images"


@torch.inference_mode()
def check(run: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, what: str) -> str:
    """Compare a file's probabilities with the model's, for batches of several sizes.

    Returns what was compared, in one line. Raises UserError unless all are equal within TOLERANCE.
    """
    expected = probabilities(model, images)
    parts = images.permute(0, 2, 3, 1).contiguous().split((1, 2, 97, len(images) - 100))
    given = torch.cat([run(part) for part in parts])
    difference, same = (given - expected).abs().max(), (given.argmax(1) == expected.argmax(1)).sum()
    result = f"{len(images)} {what}: same top-1 class on {same}, probabilities differ by up to {difference:.1e}"
    if same < len(images) or not difference <= TOLERANCE:
        raise UserError(f"the file does not give the checkpoint's probabilities and was not written. {result}")
    return result


def export(path: Path, source: Path, data_dir: str = Config.data_dir, int8: bool = False) -> str:
    """Check the file, then write it. Returns what was written and checked, line by line. Raises UserError."""
    if onnx := path.suffix.lower() == ".onnx":
        quantize.need_onnx()
    model, about, labels = open_checkpoint(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    properties = {name: str(value) for name, value in about.items()} | {"labels": json.dumps(labels)}
    example = torch.zeros(2, data.SIDE, data.SIDE, 3, dtype=torch.uint8)  # a batch of 1 would become a constant
    exported = torch.export.export(Deployed(model).eval(), (example,), dynamic_shapes=SHAPES)
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders
    if int8:  # an accuracy is the float32 model's
        properties = {f"float32_{name}" if "accuracy" in name else name: text for name, text in properties.items()}
    content = (to_onnx if onnx else to_pt2)(exported, properties)
    if int8:
        content, lines = to_int8(content, model, about["dataset"], data_dir)
    else:
        run = quantize.read_onnx(content) if onnx else torch.export.load(io.BytesIO(content)).module()
        lines = [f"Checked on {check(run, model, *check_images(about['dataset'], data_dir))}"]
    atomic_write(path, lambda file: file.write(content))
    return "\n".join([f"Exported {describe(about)} to {path}, {path.stat().st_size / 1e6:.1f} MB", *lines])


def to_int8(content: bytes, model: nn.Module, dataset: str, data_dir: str) -> tuple[bytes, list[str]]:
    """A float32 ONNX file quantised to int8, and what was found when both were checked and graded. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float32.onnx"
        plain.write_bytes(content)
        small, calibrated = quantize.calibrated(plain, dataset, data_dir)
    exact, run = quantize.read_onnx(content), quantize.read_onnx(small)
    images, what = check_images(dataset, data_dir)
    check(exact, model, images, what)
    checked = quantize.check(run, exact, images.permute(0, 2, 3, 1).contiguous(), what)
    try:
        before, after = quantize.grade({"float32": exact, "int8": run}, dataset, data_dir).values()
        graded = f"Accuracy = {after:.2f} %, in float32 {before:.2f} %: {before - after:.2f} points lost"
    except data.DataError:
        graded = "Accuracy: not measured, as CIFAR-100 cannot be had"
    return small, [f"In float32 it has {len(content) / 1e6:.1f} MB", calibrated, f"Checked on {checked}", graded]


@program("tools.export")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="to write: NAME.onnx or NAME.pt2")
    parser.add_argument("--int8", action="store_true", help="quantise NAME.onnx to int8: a third of the size")
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/best.pth if there, else published.pth")
    parser.add_argument("--data_dir", default=Config.data_dir, help="folder of the data set [%(default)s]")
    arguments = parser.parse_args(argv)
    if arguments.file.suffix.lower() not in (".onnx", ".pt2"):
        parser.error(f"{arguments.file} must end in .onnx or .pt2")
    if arguments.int8 and arguments.file.suffix.lower() != ".onnx":
        parser.error(f"--int8 needs a file that ends in .onnx, not {arguments.file}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # torch.export's chatter; errors are printed
    source = arguments.checkpoint or default_checkpoint()
    print(export(arguments.file, source, arguments.data_dir, arguments.int8))
    return 0


if __name__ == "__main__":
    sys.exit(main())
