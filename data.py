"""CIFAR-100 (Krizhevsky, 2009): fetching, checking, splitting and normalising its images."""

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import ROOT, UserError, atomic_write, one_line

SIDE = 32  # pixels
CLASSES = 100
SHA256 = {  # of the arrays' bytes, stably sorted by label: the order gives the labels
    "train_images": "a678f5ab6ac125c4dfba98c64d1562b510eff50354e165b75e65d808f7be34c5",
    "test_images": "8532fd42ce092c665328a7201998ab7e8768dad37afff89be94e13106523a495",
}
# Of the 50,000 training images, RGB, on the scale 0..1, whatever the split.
MEAN = (0.5070751592, 0.4865488733, 0.4409178434)
STD = (0.2673342859, 0.2564384629, 0.2761504713)
SPLIT_SEED = 100  # fixed, so that all runs are compared on the same validation images
SYNTHETIC = {"train": (200, 5), "test": (20, 4)}  # images per class, seed


class Images(NamedTuple):
    """Images as uint8 (N, 3, 32, 32), channels_last, and labels as int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


def load_training(
    dataset: str, data_dir: str, validation_per_class: int, images_per_class: int = 0
) -> tuple[Images, Images]:
    """The training and the validation images, together `images_per_class` of each class (0 = all), on the CPU.

    Raises UserError.
    """
    images, labels = load(dataset, data_dir, "train", images_per_class)
    train, validation = split(labels, validation_per_class, images_per_class)
    if not len(train):
        raise UserError("no image is left to train on: lower validation_per_class or raise images_per_class")
    return Images(images[train], labels[train]), Images(images[validation], labels[validation])


def load_test(dataset: str, data_dir: str) -> Images:
    """The test images, which only grading may read. Raises UserError."""
    return load(dataset, data_dir, "test")


def load(dataset: str, data_dir: str, source: str, per_class: int = 0) -> Images:
    """All "train" or "test" images of a data set. Of the synthetic one, `per_class` images per class (0 = all)."""
    if dataset == "synthetic":
        count, seed = SYNTHETIC[source]
        return synthetic(per_class or count, seed)
    name, path = f"{source}_images", ROOT / data_dir / "cifar100.npz"
    array = read(path, name) if path.exists() else build(path)[name]
    images = torch.from_numpy(array).permute(0, 3, 1, 2)
    return Images(images, torch.arange(CLASSES).repeat_interleave(len(images) // CLASSES))


def synthetic(per_class: int, seed: int) -> Images:
    """Generated images that stand in for CIFAR-100, so that the program can be tried without a download.

    There are ten patterns. The label's tens digit chooses that of the upper half, its ones digit that of the lower one.
    Offset, the two colours and noise are random, so that single pixels say next to nothing about the class.
    """
    patterns = torch.rand(10, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5  # the same for every seed
    patterns = patterns.repeat_interleave(4, 1).repeat_interleave(8, 2)  # (10, 16, 32)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    masks = torch.cat([patterns[labels // 10], patterns[labels % 10]], 1)  # (N, 32, 32)
    rows, columns = (torch.arange(SIDE) + torch.randint(6, (2, len(labels), 1), generator=generator)) % SIDE
    masks = masks[torch.arange(len(labels))[:, None, None], rows[:, :, None], columns[:, None, :]]
    colour, contrast = torch.rand(2, len(labels), 1, 1, 3, generator=generator)
    images = torch.where(masks[..., None], colour, (colour + 0.3 + 0.4 * contrast) % 1).mul_(255)  # (N, 32, 32, 3)
    images.add_(torch.randn(images.shape, generator=generator), alpha=12)  # in place, for the memory
    return Images(images.clamp_(0, 255).to(torch.uint8).permute(0, 3, 1, 2), labels)


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


def normalise(images: Tensor) -> Tensor:
    """Pixels of 0..255, (N, 3, 32, 32), to float32 (x / 255 - MEAN) / STD, channels_last."""
    scale, shift = normalisation(images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).mul(scale).add_(shift)


@functools.cache  # making a tensor from numbers would synchronise with a GPU at every step
def normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """The factor and the summand of `normalise`, each as a whole image (1, 3, 32, 32): broadcasting three numbers
    along the fastest dimension takes a CPU five times as long."""
    with torch.inference_mode(False):  # otherwise no gradient passes if the first call is in inference mode
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
        return tuple(
            value.expand(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
            for value in (1 / (255 * std), -mean / std)
        )


def read(path: Path, name: str) -> np.ndarray:
    """An array of the file, checked against its digest. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file[name]
        check(name, images)
    except Exception as error:  # a damaged file raises nearly anything
        reason = one_line(error).partition(". ")[0]  # numpy goes on with advice to open it all the same
        raise UserError(f"{path} cannot be used: {reason}. Delete it and run again to build it anew") from error
    return images


def check(name: str, images: np.ndarray) -> None:
    """Raise ValueError unless these are the official images, sorted by label."""
    if hashlib.sha256(np.ascontiguousarray(images)).hexdigest() != SHA256[name]:
        raise ValueError(f"the SHA-256 of {name} is not that of the official images")


def build(path: Path) -> dict[str, np.ndarray]:
    """Download CIFAR-100, or use what is beside `path`, and write it as one npz file. Returns its arrays.

    A folder that cannot be written but holds torchvision's files is enough. Raises UserError.
    """
    from torchvision.datasets import CIFAR100  # here, as its import takes a second

    folder, arrays = path.parent, {}
    archive = folder / CIFAR100.filename
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in ("train", "test"):
            official = CIFAR100(folder, train=source == "train", download=True)
            name = f"{source}_images"
            arrays[name] = np.ascontiguousarray(official.data[np.argsort(official.targets, kind="stable")])
            check(name, arrays[name])
    except (OSError, RuntimeError, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise UserError(
            f"CIFAR-100 is not in {path} and torchvision could not get it from {CIFAR100.url} ({one_line(error)}). "
            f"Put the official archive at {archive} (replace a damaged one), give another --data_dir, or try generated "
            "images: python train.py --dataset synthetic --epochs 2"
        ) from error
    try:
        atomic_write(path, lambda file: np.savez(file, **arrays))
    except UserError:  # a read-only folder
        print(f"{path} cannot be written: the images are built again in each run")
    return arrays
