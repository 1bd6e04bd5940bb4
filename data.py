"""CIFAR-100 (Krizhevsky, 2009) and a synthetic stand-in: loading, checking, splitting."""

import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
from config import Config
from model import CLASSES

SHAPES = {
    "train_images": (50_000, 32, 32, 3),
    "train_labels": (50_000,),
    "test_images": (10_000, 32, 32, 3),
    "test_labels": (10_000,),
}
SHA256 = {  # of the image arrays' bytes, sorted by label, within a label in the official order
    "train_images": "a678f5ab6ac125c4dfba98c64d1562b510eff50354e165b75e65d808f7be34c5",
    "test_images": "8532fd42ce092c665328a7201998ab7e8768dad37afff89be94e13106523a495",
}
# Of the 50,000 training images, RGB, on the scale 0..1, whatever the split.
MEAN = (0.5070751592, 0.4865488733, 0.4409178434)
STD = (0.2673342859, 0.2564384629, 0.2761504713)
SPLIT_SEED = 100  # fixed, so that all runs are compared on the same validation images
SYNTHETIC = {"train": {"per_class": 200, "seed": 5}, "test": {"per_class": 20, "seed": 4}}


class DataError(Exception):
    """The data set is missing or damaged; the message names the file and the cure."""


class Images(NamedTuple):
    """Images as uint8 (N, 3, 32, 32), channels_last, and labels as int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


def load_training(config: Config) -> tuple[Images, Images]:
    """The images that are trained on and those kept for validation, on the CPU; raises DataError."""
    images, labels = load(config, "train", config.images_per_class)
    train, validation = split(labels, config.validation_per_class, config.images_per_class)
    if not len(train):
        raise DataError(f"validation_per_class {config.validation_per_class} leaves no image to train on. Lower it")
    return Images(images[train], labels[train]), Images(images[validation], labels[validation])


def load_test(config: Config) -> Images:
    """The test images, which nothing but grading may read; raises DataError."""
    return load(config, "test")


def load(config: Config, source: str, per_class: int = 0) -> Images:
    """All "train" or "test" images of the configured set; of the synthetic set only so many a class as asked for."""
    if config.dataset == "synthetic":
        return Images(*synthetic(**SYNTHETIC[source] | ({"per_class": per_class} if per_class else {})))
    path = Path(config.data_dir) / "cifar100.npz"
    if not path.exists():
        build(path)
    arrays = read(path, source)
    images = torch.from_numpy(arrays[f"{source}_images"]).permute(0, 3, 1, 2)
    return Images(images, torch.from_numpy(arrays[f"{source}_labels"]).long())


def split(labels: Tensor, validation_per_class: int, images_per_class: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted indices of the training and of the validation images: the same for every run with these counts."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, validation = [], []
    for label in range(CLASSES):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)][: images_per_class or None]
        validation.append(members[:validation_per_class])
        train.append(members[validation_per_class:])
    return torch.cat(train).sort().values, torch.cat(validation).sort().values


def read(path: Path, source: str) -> dict[str, np.ndarray]:
    """The "train" or "test" arrays of the file, checked against their digests; raises DataError."""
    names = [name for name in SHAPES if name.startswith(source)]
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > 200e6:  # a bomb is not even unpacked
                raise ValueError("it unpacks to more than 200 MB")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names}
        check(arrays)
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    except (OSError, EOFError, ValueError, KeyError, MemoryError, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {one_line(error)}. Delete it and run again to build it anew.") from error
    return arrays


def check(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError unless the arrays are the official images and labels, sorted by label."""
    for name, array in arrays.items():
        if array.dtype != np.uint8 or array.shape != SHAPES[name]:
            raise ValueError(f"{name} is {array.dtype}{array.shape}, not uint8{SHAPES[name]}")
        if name in SHA256 and hashlib.sha256(np.ascontiguousarray(array)).hexdigest() != SHA256[name]:
            raise ValueError(f"the SHA-256 of {name} differs from the official images'")
        if name not in SHA256 and not np.array_equal(array, np.arange(CLASSES).repeat(len(array) // CLASSES)):
            raise ValueError(f"{name} are not the sorted official labels")


def build(path: Path) -> None:
    """Download CIFAR-100 (or use the archive beside `path`) and write it as one npz file; raises DataError."""
    from torchvision.datasets import CIFAR100  # only here: its import takes a second

    folder = path.parent
    arrays = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with checkpoint.locked(folder, wait=True):
            if path.exists():  # built by another process meanwhile
                return
            for left in folder.glob(f".{path.name}.*.part"):  # of a killed process
                left.unlink()
            for source in ("train", "test"):
                official = CIFAR100(folder, train=source == "train", download=True)
                labels = np.asarray(official.targets, dtype=np.uint8)
                order = np.argsort(labels, kind="stable")
                arrays[f"{source}_images"] = np.ascontiguousarray(official.data[order])
                arrays[f"{source}_labels"] = labels[order]
            check(arrays)
            checkpoint.write_whole(path, lambda file: np.savez(file, **arrays))
    except (OSError, RuntimeError, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise DataError(
            f"CIFAR-100 is not in {path} and torchvision could not get it from {CIFAR100.url} "
            f"({one_line(error)}). Put the official cifar-100-python.tar.gz into {folder}/ by hand and run again, "
            "or try the program without data: python train.py --dataset synthetic --epochs 2"
        ) from error


def one_line(error: Exception) -> str:
    """The error's text without line breaks, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def synthetic(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Generated images, uint8 (100 * per_class, 3, 32, 32), of 10 shapes in 10 textures, and their labels.

    Colour, position, scale, phase and noise are random, so that single pixels say next to nothing of the class.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    axis = torch.linspace(-1, 1, 32)
    x = axis.view(1, 1, -1) - uniform(-0.3, 0.3, 1, 1)
    y = axis.view(1, -1, 1) - uniform(-0.3, 0.3, 1, 1)
    scale = uniform(0.45, 0.65, 1, 1)
    shape = inside_shape(x / scale, y / scale, (labels // 10).view(-1, 1, 1))
    texture = stripes(x + uniform(0, 2, 1, 1), y + uniform(0, 2, 1, 1), (labels % 10).view(-1, 1, 1))
    bright, dark, ground = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    dark = torch.where((bright - dark).abs() < 0.3, (bright + 0.5) % 1, dark)
    figure = torch.where(texture.unsqueeze(1), bright, dark)
    images = torch.where(shape.unsqueeze(1), figure, ground)
    del figure  # as large as the images: in place from here on, for the memory
    images.add_(torch.randn(images.shape, generator=generator).mul_(0.05))
    return images.clamp_(0, 1).mul_(255).to(torch.uint8, memory_format=torch.channels_last), labels


def inside_shape(x: Tensor, y: Tensor, kind: Tensor) -> Tensor:
    """Where a shape of the unit square covers the plane, bool (N, H, W); kind (N, 1, 1) from 0 to 9."""
    radius, diamond, square = (x * x + y * y).sqrt(), x.abs() + y.abs(), torch.maximum(x.abs(), y.abs())
    near = torch.minimum(x.abs(), y.abs())
    shapes = (
        radius < 1,
        (radius < 1) & (radius > 0.55),
        square < 0.85,
        (square < 0.95) & (square > 0.5),
        diamond < 1.1,
        (square < 1) & (near < 0.3),  # upright cross
        (square < 0.9) & ((x - y).abs().minimum((x + y).abs()) < 0.4),  # diagonal cross
        (y > -0.8) & (y < 0.9) & (x.abs() < (y + 0.9) * 0.6),  # triangle
        (x.abs() < 1.1) & (y.abs() < 0.4),  # bar
        (radius < 1) & (y > 0) | (square < 0.35),  # bowl with a dot
    )
    return choose(shapes, kind)


def stripes(x: Tensor, y: Tensor, kind: Tensor) -> Tensor:
    """A two-coloured texture, bool (N, H, W); kind (N, 1, 1) from 0 to 9."""
    fine, coarse = 0.25, 0.5  # period in half image widths: 4 and 8 pixels of 32

    def wave(u: Tensor, period: float) -> Tensor:
        return (u / period) % 1 < 0.5

    textures = (
        torch.ones_like(kind, dtype=torch.bool),
        wave(x, fine),
        wave(y, fine),
        wave(x + y, coarse * 0.7),
        wave(x + y, coarse * 0.7) ^ wave(x - y, coarse * 0.7),  # as all here, no other's mirror image
        wave(x, coarse),
        wave(y, coarse),
        wave(x, coarse) ^ wave(y, coarse),
        wave(x, fine) & wave(y, fine),
        wave(x, fine) ^ wave(y, fine),
    )
    return choose(textures, kind)


def choose(planes: tuple[Tensor, ...], kind: Tensor) -> Tensor:
    """Of several planes (N, H, W) the one at place `kind` (N, 1, 1), image by image."""
    result = planes[0]
    for place, plane in enumerate(planes[1:], start=1):
        result = torch.where(kind == place, plane, result)
    return result
