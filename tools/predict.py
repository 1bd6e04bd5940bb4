"""Name what images show: the five likeliest classes of each, with their probabilities."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from checkpoint import load_model
from config import OneLineParser
from data import SIDE
from evaluate import add_checkpoint, predict_logits
from tools.labels import NAMES
from utils import one_line, program, shown

About = dict[str, str]  # what a checkpoint is


def read(path: Path) -> Tensor:
    """The first frame of an image file as the model's input: uint8 (1, 3, 32, 32), its centre square, antialiased.

    A 32x32 image does not change. Raises nearly anything if the file is damaged or is no image.
    """
    with Image.open(path) as image:
        square = ImageOps.fit(to_rgb(ImageOps.exif_transpose(image)), (SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).unsqueeze(0)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any 8-bit mode as RGB, on white if it is transparent. Raises ValueError if it has more bits."""
    if image.mode[0] in "IF":  # PIL would clip its values at 255
        raise ValueError("it has more than 8 bits per channel. Convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_checkpoint(path: Path) -> tuple[nn.Module, About]:
    """The model in eval mode, and what it is. Raises UserError."""
    model, content = load_model(path)
    config = content["config"]
    about = {"checkpoint": shown(path), "experiment": config.get("experiment"), "date": content.get("date")}
    about |= {"dataset": config["dataset"]}
    return model, {name: str(value or "unknown") for name, value in about.items()}


def describe_checkpoint(about: About) -> str:
    """One line: which checkpoint this is."""
    return "{checkpoint} (experiment {experiment}, date {date}, dataset {dataset})".format(**about)


def top5(model: nn.Module, image: Tensor) -> list[tuple[str, float]]:
    """The five likeliest classes of an image, uint8 (1, 3, 32, 32), with their probabilities, best first."""
    top = predict_logits(model, image).softmax(1)[0].topk(5)
    return [(NAMES[label], value) for label, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


@program("tools.predict")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.predict", description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="any image file that PIL opens")
    add_checkpoint(parser)
    arguments = parser.parse_args(argv)
    model, about = open_checkpoint(arguments.checkpoint)
    print(describe_checkpoint(about))
    failed = False
    for path in arguments.images:
        try:
            classes = top5(model, read(path))
        except Exception as error:  # PIL's decoders raise nearly anything if a file is damaged
            reason = getattr(error, "strerror", None) or one_line(error)
            print(f"tools.predict: error: {path}: {reason}", file=sys.stderr)
            failed = True
            continue
        print(path, *(f"{100 * probability:6.2f} %  {name}" for name, probability in classes), sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
