"""Generated images that stand in for CIFAR-100, so that the whole pipeline can be tried without a download."""

import numpy as np
import torch
from torch import Tensor


def synthetic(per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """Generated images, uint8 (100 * per_class, 3, 32, 32), and their labels: 10 * shape + texture.

    There are 10 shapes and 10 textures. Colour, position, scale, phase and noise are random, so that
    single pixels say next to nothing about the class.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(100).repeat_interleave(per_class)
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
    """The mask of a shape in the unit square, bool (N, H, W); kind (N, 1, 1) from 0 to 9."""
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
    return choose(kind, shapes)


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
    return choose(kind, textures)


def choose(kind: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """Of several bool (N, H, W) the one of index `kind` (N, 1, 1), image by image."""
    return torch.from_numpy(np.choose(kind.numpy(), [mask.numpy() for mask in masks]))
