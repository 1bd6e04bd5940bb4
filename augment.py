"""Augmentation of whole batches on their device: functions of (images, generator), random per sample."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from config import Config
from data import CLASSES, MEAN, STD


def normalise(images: Tensor) -> Tensor:
    """Pixels of 0..255, (N, 3, H, W), to float32 with the training set's mean 0 and deviation 1, channels_last."""
    scale, shift = statistics(images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).mul(scale).add_(shift)


@functools.cache  # making a tensor from numbers on a GPU would wait for it at every step
def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """What to multiply pixels of 0..255 by, and what to add then, each (1, 3, 1, 1)."""
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return 1 / (255 * deviation), -mean / deviation


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


def trivial_augment(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Give a share of the images one operation each, with a random strength (Müller and Hutter, 2021).

    Takes (N, 3, H, W) of any type in a random order, returns float32. The batch is cut into one slice for each
    operation, so that nothing depends on values that a GPU would have to be waited for; the strengths are those of
    RandAugment (Cubuk et al., 2020), milder than the paper's.
    """
    images = images.to(torch.float32, memory_format=torch.channels_last)
    count = round(share * len(images))
    level = 2 * torch.rand(count, 1, 1, 1, device=images.device, generator=generator) - 1
    parts, levels = (whole.tensor_split(len(OPERATIONS)) for whole in (images[:count], level))
    slices = zip(OPERATIONS, parts, levels, strict=True)
    changed = [operation(part, strength).clamp(0, 255) for operation, part, strength in slices if len(part)]
    return torch.cat([*changed, images[count:]])


def affine(images: Tensor, level: Tensor, matrix: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Move pixels by the identity plus level (N, 1, 1, 1) times a 2 x 3 matrix, half the image's side as unit."""
    identity = torch.eye(2, 3, device=images.device)
    move = torch.stack([torch.stack([value * level.flatten() for value in row], 1) for row in matrix], 1)
    return sample(images, identity + move)


def sample(images: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear samples at affinely moved places, matrices (N, 2, 3); black outside."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def rotate(images: Tensor, level: Tensor) -> Tensor:
    """Turn by up to 30 degrees."""
    angle = math.radians(30) * level.flatten()
    cosine, sine, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return sample(images, torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3))


def grey(images: Tensor) -> Tensor:
    """Luma (ITU-R 601), (N, 1, H, W)."""
    return 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def blend(degenerate: Tensor, images: Tensor, level: Tensor) -> Tensor:
    """From nearly the degenerate image (level -1) over the image itself (0) to its exaggeration (1)."""
    return degenerate + (images - degenerate) * (1 + 0.9 * level)


def sharpness(images: Tensor, level: Tensor) -> Tensor:
    """Blend with the image smoothed inside its border, as PIL does."""
    kernel = torch.ones(3, 1, 3, 3, device=images.device)
    kernel[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel / 13, groups=3)
    return blend(smooth, images, level)


def posterize(images: Tensor, level: Tensor) -> Tensor:
    """Keep 8 to 4 bits of each value."""
    step = 2 ** (4 * level.abs()).round()
    return (images / step).floor() * step


def autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Stretch each channel to 0..255."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) * (255 / (high - low).clamp(min=1)), images)


def equalize(images: Tensor, level: Tensor) -> Tensor:
    """Spread each channel's values evenly over 0..255, with PIL's whole steps."""
    values = images.flatten(2).round().long()
    counts = torch.zeros(*values.shape[:2], 256, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(images).flatten(2))
    step = ((values.shape[2] - counts.gather(2, values.amax(2, keepdim=True))) / 255).floor()
    below = counts.cumsum(2) - counts
    table = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(max=255)
    return torch.where(step > 0, table.gather(2, values), values).view(images.shape)


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda images, level: images,
    lambda images, level: affine(images, level, ((0, 0.3, 0), (0, 0, 0))),  # shear
    lambda images, level: affine(images, level, ((0, 0, 0), (0.3, 0, 0))),
    lambda images, level: affine(images, level, ((0, 0, 0.6), (0, 0, 0))),  # shift by up to 10 pixels of 32
    lambda images, level: affine(images, level, ((0, 0, 0), (0, 0, 0.6))),
    rotate,
    lambda images, level: images * (1 + 0.9 * level),  # brightness
    lambda images, level: blend(grey(images), images, level),  # saturation
    lambda images, level: blend(grey(images).mean((1, 2, 3), keepdim=True), images, level),  # contrast
    sharpness,
    posterize,
    lambda images, level: torch.where(images < 256 * (1 - level.abs()), images, 255 - images),  # solarize
    autocontrast,
    equalize,
)


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
        if config.trivial_augment:
            images = trivial_augment(images, config.trivial_augment, generator)
        inputs = normalise(images)
        if config.cutout:
            inputs = cutout(inputs, config.cutout, generator)
        if self.mixers and torch.rand(()).item() < config.mix_share:
            inputs, labels = self.mixers[torch.randint(len(self.mixers), ()).item()](inputs, labels)
        return inputs, labels
