"""Name what images show: the five likeliest classes of each, with their probabilities."""

import argparse
import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

import evaluate
from config import OneLineParser
from data import SIDE, normalise
from tools import calibrate
from tools.labels import class_names, human
from utils import UserError, one_line, program

TOP = 5
DRAFT = 4 * SIDE  # pixels: JPEG is decoded at 1/2, 1/4 or 1/8 where no side falls below this


class ImageError(UserError):
    """An image cannot be read. The message names the file and the reason."""


def read(path: Path) -> Tensor:
    """The first frame of any file that PIL opens, as the model's input: uint8 (1, 3, 32, 32). Raises ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of the size that is refused below
            with Image.open(path) as image:
                image.draft("RGB", (DRAFT, DRAFT))
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise Image.DecompressionBombError
                with suppress(Exception):  # damaged metadata: the image as it is stored
                    ImageOps.exif_transpose(image, in_place=True)
                pixels = np.array(to_rgb(shrink(widen(image))))
    except Exception as error:  # PIL's decoders raise nearly anything where a file is damaged
        raise ImageError(f"{path}: {reason(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)


def reason(error: Exception) -> str:
    """Why an image cannot be read, in one line."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too large, more than {Image.MAX_IMAGE_PIXELS:,} pixels to decode (PIL's limit). Make it smaller first"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a kind that PIL does not open"
    return getattr(error, "strerror", None) or one_line(error)


def widen(image: Image.Image) -> Image.Image:
    """An image of any mode as RGBA, RGB, or F from 0 to 255, which can be averaged without loss.

    White is 65535 in integers of more than 8 bits, which PIL would clip. In floats it is 1, or 255 where any value is
    above 1. Values that are not finite become black.
    """
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
        white = 65_535 if image.mode[0] == "I" else 1 if values.max() <= 1 else 255
        return Image.fromarray((values * (255 / white)).clip(0, 255))
    transparent = image.getbands()[-1] == "A" or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def shrink(image: Image.Image) -> Image.Image:
    """The centre square at 32x32, antialiased, colours weighted by their opacity. A 32x32 image does not change."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box, reducing_gap=3.0)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of an image that `widen` gave, transparency on white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "F":
        image = Image.fromarray(np.asarray(image).clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")


def open_checkpoint(path: Path) -> tuple[nn.Module, dict[str, Any], tuple[str, ...]]:
    """The model in eval mode, what it is (plain values), and its classes' names. Raises CheckpointError.

    The model's logits are divided by the temperature that the checkpoint stores, if it stores one.
    """
    model, content = evaluate.load_model(path)
    config = content["config"]
    about = {"checkpoint": str(path), "experiment": config["experiment"], "date": content["date"]}
    about["dataset"] = config["dataset"]
    for source, key in (("test", "accuracy"), ("metrics", "validation_accuracy")):
        if (content.get(source) or {}).get(key) is not None:
            about[f"{source.replace('metrics', 'validation')}_accuracy"] = content[source][key]
    if (temperature := calibrate.stored(content, path)) is not None:
        model, about["temperature"] = calibrate.Scaled(model, temperature).eval(), temperature
    return model, about, class_names(config["dataset"])


def describe(about: dict[str, Any]) -> str:
    """One line: which checkpoint this is."""
    return "{checkpoint} (experiment {experiment}, {date}, trained on {dataset})".format(**about)


@torch.inference_mode()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """uint8 (N, 3, 32, 32) to the classes' probabilities (N, 100)."""
    return model(normalise(images)).softmax(1)


def predict(model: nn.Module, names: tuple[str, ...], path: Path) -> list[dict[str, Any]]:
    """The likeliest classes of an image, best first. Raises ImageError."""
    top = probabilities(model, read(path))[0].topk(TOP)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [{"name": human(names[label]), "probability": probability} for label, probability in pairs]


def show(model: nn.Module, names: tuple[str, ...], path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict one image and print the result, or one line on stderr. Returns what --json prints of it."""
    try:
        top = predict(model, names, path)
    except ImageError as error:
        print(f"tools.predict: error: {error}", file=sys.stderr)
        return {"image": str(path), "error": str(error)}
    if not arguments.json:
        print(path, *(f"{100 * row['probability']:6.2f} %  {row['name']}" for row in top), sep="\n", flush=True)
    return {"image": str(path), "top": top}


@program("tools.predict")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="any image file that PIL opens")
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/best.pth if there, else published.pth")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    arguments = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    model, about, names = open_checkpoint(arguments.checkpoint or evaluate.default_checkpoint())
    if not arguments.json:
        print(describe(about))
    results = [show(model, names, path, arguments) for path in arguments.images]
    if arguments.json:
        print(json.dumps(about | {"images": results}))
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
