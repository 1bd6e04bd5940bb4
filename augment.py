"""Augmentation of whole batches on their device: functions of (images, generator), random per sample."""

import functools

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from config import Config
from data import CLASSES, MEAN, STD


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) to float32 with the training set's mean 0 and standard deviation 1, channels_last."""
    mean, scale = statistics(images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).mul_(scale)


@functools.cache  # making a tensor from numbers on a GPU would wait for it at every step
def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """What to subtract from and what to multiply pixels of 0..255 by, each (1, 3, 1, 1)."""
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    return mean, 1 / deviation


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image of (N, 3, H, W) with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
    return torch.where(flip, images.flip(3), images)


def random_crop(images: Tensor, padding: int, reflect: bool, generator: Generator) -> Tensor:
    """Pad each image of (N, 3, H, W) on every side, cut one H x W window of it at random."""
    count, _, height, width = images.shape
    padded = pad_reflect(images, padding) if reflect else F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # view (N, 3, 2p + 1, 2p + 1, H, W)
    offsets = torch.randint(2 * padding + 1, (2, count), device=images.device, generator=generator)
    return windows[torch.arange(count, device=images.device), :, offsets[0], offsets[1]]


def pad_reflect(images: Tensor, padding: int) -> Tensor:
    """F.pad(mode="reflect") for (N, 3, H, W) of any type: torch has none for uint8."""
    rows, columns = (
        reflect_index(torch.arange(-padding, size + padding, device=images.device), size) for size in images.shape[2:]
    )
    return images[:, :, rows][:, :, :, columns]


def reflect_index(index: Tensor, size: int) -> Tensor:
    """Indices below 0 and from `size` on mirrored at the border pixels."""
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)


def cutout(images: Tensor, side: int, generator: Generator) -> Tensor:
    """Set a side x side square, anywhere around each normalised image, to 0 (DeVries and Taylor, 2017)."""
    count, _, height, width = images.shape

    def span(size: int) -> Tensor:  # bool (N, size): the square's extent on one axis
        centre = torch.randint(size, (count, 1), device=images.device, generator=generator)
        distance = torch.arange(size, device=images.device) - (centre - side // 2)
        return (distance >= 0) & (distance < side)

    return images.masked_fill((span(height)[:, :, None] & span(width)[:, None, :]).unsqueeze(1), 0.0)


class Batches:
    """Turns raw batches into what the network trains on, as a run's settings say."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mixers = []
        if config.mixup or config.cutmix:
            from torchvision.transforms import v2  # only here: its import takes a second

            if config.mixup:
                self.mixers.append(v2.MixUp(alpha=config.mixup, num_classes=CLASSES))
            if config.cutmix:
                self.mixers.append(v2.CutMix(alpha=config.cutmix, num_classes=CLASSES))

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """uint8 (N, 3, 32, 32) and labels (N,) to normalised floats and labels, (N,) or as shares (N, 100).

        Mixing draws from torch's global generator on the CPU, all else from `generator` on the images' device.
        """
        config = self.config
        if config.crop_padding:
            images = random_crop(images, config.crop_padding, config.crop_reflect, generator)
        if config.flip:
            images = random_flip(images, generator)
        inputs = normalise(images)
        if config.cutout:
            inputs = cutout(inputs, config.cutout, generator)
        if self.mixers and torch.rand(()).item() < config.mix_share:
            inputs, labels = self.mixers[torch.randint(len(self.mixers), ()).item()](inputs, labels)
        return inputs, labels
