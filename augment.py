"""Augmentation of whole batches on their device: functions of (images, generator), random per sample."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from config import Config
from data import MEAN, STD, Images
from model import CLASSES

SIDE = 32  # pixels
SMALL_SIDE = 24  # an epoch of such images takes 0.6 of the time


def normalise(images: Tensor) -> Tensor:
    """Pixels of 0..255, (N, 3, 32, 32), to float32 with the training set's mean 0 and deviation 1, channels_last."""
    scale, shift = statistics(images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).mul(scale).add_(shift)


@functools.cache  # making a tensor from numbers on a GPU would wait for it at every step
def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """What to multiply pixels of 0..255 by and what to add then, as whole images (1, 3, 32, 32): broadcasting three
    numbers along the fastest dimension takes a CPU five times as long."""
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return tuple(
        value.expand(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        for value in (1 / (255 * deviation), -mean / deviation)
    )


def pixel_table(images: Tensor) -> Tensor:
    """uint8 (N, 3, 32, 32) as a table of pixels (N * 32 * 32 + 1, 3), the last one black."""
    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3)
    return torch.cat([pixels, pixels.new_zeros(1, 3)])


def crop_and_flip(
    table: Tensor, index: Tensor, padding: int, reflect: bool, flip: bool, generator: Generator
) -> Tensor:
    """The images of a pixel table at `index` (N,), each padded, cropped to 32x32 at random and mirrored or not.

    Returns uint8 (N, 3, 32, 32), channels_last. Padding, crop and flip only decide which pixels are read: one pass
    over the batch instead of four.
    """
    index = index.int()  # places fit into 32 bits up to two million images, and are half as much to move
    shifts = torch.randint(-padding, padding + 1, (2, len(index), 1), device=index.device, generator=generator).int()
    side = torch.arange(SIDE, dtype=torch.int32, device=index.device)
    rows, columns = side + shifts[0], side + shifts[1]  # (N, 32), counted in the image's own pixels
    if flip:
        mirrored = torch.rand(len(index), 1, device=index.device, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if reflect:
        rows, columns = mirror(rows), mirror(columns)
    places = (index[:, None] * SIDE**2 + rows * SIDE)[:, :, None] + columns[:, None, :]
    if padding and not reflect:
        inside = [(axis >= 0) & (axis < SIDE) for axis in (rows, columns)]
        places = torch.where(inside[0][:, :, None] & inside[1][:, None, :], places, len(table) - 1)
    return table.index_select(0, places.flatten()).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2)


def mirror(index: Tensor) -> Tensor:
    """Indices outside of 0..31 reflected at the border pixels."""
    index = index.abs()
    return torch.where(index < SIDE, index, 2 * (SIDE - 1) - index)


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
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
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
    """Makes what the network trains on from the training images, as a run's settings say."""

    def __init__(self, config: Config, train: Images) -> None:
        self.config, self.table, self.labels = config, pixel_table(train.images), train.labels
        self.mixers = []
        if config.mixup or config.cutmix:
            from torchvision.transforms import v2  # only here: its import takes a second

            if config.mixup:
                self.mixers.append(v2.MixUp(alpha=config.mixup, num_classes=CLASSES))
            if config.cutmix:
                self.mixers.append(v2.CutMix(alpha=config.cutmix, num_classes=CLASSES))

    def __call__(self, index: Tensor, generator: Generator, small: bool = False) -> tuple[Tensor, Tensor]:
        """The training images at `index` (N,): normalised floats (N, 3, 32, 32) and labels, (N,) or shares (N, 100).

        `small` images are reduced to 24x24 (progressive learning: Tan and Le, EfficientNetV2, 2021).

        Mixing draws from torch's global generator on the CPU, all else from `generator` on the images' device.
        """
        config = self.config
        inputs = crop_and_flip(self.table, index, config.crop_padding, config.crop_reflect, config.flip, generator)
        if config.trivial_augment:
            inputs = trivial_augment(inputs, config.trivial_augment, generator)
        inputs, labels = normalise(inputs), self.labels[index]
        if config.cutout:
            inputs = cutout(inputs, config.cutout, generator)
        if self.mixers and torch.rand(()).item() < config.mix_share:
            inputs, labels = self.mixers[torch.randint(len(self.mixers), ()).item()](inputs, labels)
        if small:
            inputs = F.interpolate(inputs, SMALL_SIDE, mode="bilinear", antialias=True)
        return inputs, labels
