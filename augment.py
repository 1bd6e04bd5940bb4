"""Augmentation of whole batches on their device by pure functions of (images, generator), and the loader."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from config import Config
from data import CLASSES, SIDE, Images, normalise
from utils import UserError

# A CPU generator uses only the low 32 bits of its seed. With this stride they differ for any two epochs of any two
# runs, if the runs have at most 1,264 epochs.
SEED_STRIDE = 1_000_003
TEACHER_SEED_OFFSET = 1_000_001  # above any seed: a student's views are not those of a teacher that learned labels
CUDA_CHUNK = 8_192  # images augmented at once: the launches of TrivialAugment's kernels then cost next to nothing


def crop_and_flip(table: Tensor, index: Tensor, padding: int, flip: bool, generator: Generator) -> Tensor:
    """The images of a table of pixels (images * 32 * 32, 3) at `index` (N,), each padded by reflection, cropped to
    32x32 at random and mirrored or not.

    Returns uint8 (N, 3, 32, 32), channels_last. Padding, crop and flip only decide which pixels are read: one pass
    over the batch instead of four.
    """
    index = index.int()  # 32 bits suffice for two million images and are half as much to move
    shifts = torch.randint(-padding, padding + 1, (2, len(index), 1), device=index.device, generator=generator).int()
    positions = shifts + torch.arange(SIDE, dtype=torch.int32, device=index.device)  # (2, N, 32)
    rows, columns = SIDE - 1 - (SIDE - 1 - positions.abs()).abs()  # reflected at the border pixels
    if flip:
        mirrored = torch.rand(len(index), 1, device=index.device, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    pixels = (index[:, None] * SIDE**2 + rows * SIDE)[:, :, None] + columns[:, None, :]
    return table.index_select(0, pixels.flatten()).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2)


def trivial_augment(images: Tensor, fraction: float, generator: Generator) -> Tensor:
    """Give a fraction of the images one operation each, with a random strength (TrivialAugment: Müller, Hutter, 2021).

    Takes (N, 3, H, W) of any type, returns float32. Each operation has a slice of the batch, so that a large batch
    never waits for a GPU. The images must therefore be in a random order. The strengths are those of RandAugment
    (Cubuk et al., 2020), milder than the paper's.
    """
    images = images.to(torch.float32, memory_format=torch.channels_last)
    count = round(fraction * len(images))
    level = 2 * torch.rand(count, 1, 1, 1, device=images.device, generator=generator) - 1
    parts, levels = images[:count].tensor_split(len(OPERATIONS)), level.tensor_split(len(OPERATIONS))
    operations = list(OPERATIONS.values())
    if count < len(operations):  # some slices are empty: different ones in each batch. tolist() waits for a GPU
        order = torch.randperm(len(operations), generator=generator, device=images.device)
        operations = [operations[i] for i in order.tolist()]
    triples = zip(operations, parts, levels, strict=True)
    changed = [operation(part, strength).clamp(0, 255) for operation, part, strength in triples if len(part)]
    return torch.cat([*changed, images[count:]])


def warp(images: Tensor, values: dict[tuple[int, int], Tensor]) -> Tensor:
    """Sample bilinearly at positions moved by an affine matrix per image, black outside. Each matrix is the 2 x 3
    identity with the entries in `values`, (N, 1, 1, 1) each, replaced. The unit is half an image's side."""
    matrices = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    for (row, column), value in values.items():
        matrices[:, row, column] = value.flatten()
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def rotate(images: Tensor, level: Tensor) -> Tensor:
    """Turn by up to 30 degrees."""
    cosine, sine = (math.radians(30) * level).cos(), (math.radians(30) * level).sin()
    return warp(images, {(0, 0): cosine, (0, 1): -sine, (1, 0): sine, (1, 1): cosine})


def grey(images: Tensor) -> Tensor:
    """Luma (ITU-R 601), (N, 1, H, W)."""
    return 0.299 * images[:, 0:1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:3]


def blend(degenerate: Tensor, images: Tensor, level: Tensor) -> Tensor:
    """From nearly the degenerate image (level -1) via the image itself (0) to its exaggeration (1)."""
    return degenerate + (images - degenerate) * (1 + 0.9 * level)


def sharpness(images: Tensor, level: Tensor) -> Tensor:
    """Blend with the image smoothed inside its border, as PIL does: weights 1 of 13, and 5 of 13 at the centre."""
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1].lerp_(F.avg_pool2d(images, 3, 1), 9 / 13)
    return blend(smooth, images, level)


def posterize(images: Tensor, level: Tensor) -> Tensor:
    """Keep 8 to 4 bits of each value."""
    step = 1 << (4 * level.abs()).round().int()
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
    table = ((below + step / 2) / step.clamp(min=1)).floor().clamp(max=255)
    return torch.where(step > 0, table.gather(2, values), values).view(images.shape)


# By name. Each takes float images (N, 3, H, W) of 0..255 and its strength, level (N, 1, 1, 1) from -1 to 1.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda images, level: images,
    "shear_x": lambda images, level: warp(images, {(0, 1): 0.3 * level}),
    "shear_y": lambda images, level: warp(images, {(1, 0): 0.3 * level}),
    "translate_x": lambda images, level: warp(images, {(0, 2): 0.6 * level}),  # up to 9.6 pixels of 32
    "translate_y": lambda images, level: warp(images, {(1, 2): 0.6 * level}),
    "rotate": rotate,
    "brightness": lambda images, level: images * (1 + 0.9 * level),
    "saturation": lambda images, level: blend(grey(images), images, level),
    "contrast": lambda images, level: blend(grey(images).mean((1, 2, 3), keepdim=True), images, level),
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": lambda images, level: torch.where(images < 256 * (1 - level.abs()), images, 255 - images),
    "autocontrast": autocontrast,
    "equalize": equalize,
}


class Loader:
    """Augmented batches of the training images, made on their device: iterating over it is one epoch.

    Order and augmentation follow from (seed, epoch). All batches have one size: the images that do not fill the last
    one are left out, different ones in each epoch. Several processes make the same batches, and each takes the images
    rank, rank + world_size, ... of them. Raises UserError if they cannot share a batch evenly.
    """

    def __init__(self, train_set: Images, config: Config, rank: int = 0, world_size: int = 1) -> None:
        self.config = config
        self.pixels = train_set.images.permute(0, 2, 3, 1).reshape(-1, 3)
        self.labels = train_set.labels
        self.epoch = 0  # the number of the next iteration's epoch
        self.batch_size = min(config.batch_size, len(self.labels))
        self.chunk = max(1, CUDA_CHUNK // self.batch_size) if self.labels.is_cuda else 1  # batches augmented at once
        self.shard = slice(rank, None, world_size)
        self.mixers = []
        if self.batch_size % world_size:
            raise UserError(f"{world_size} processes cannot share batches of {self.batch_size} images. Change one")
        if config.mixup or config.cutmix:
            from torchvision.transforms import v2  # here, as its import takes a second and loads torch._dynamo

            self.mixers += [v2.MixUp(alpha=config.mixup, num_classes=CLASSES)] if config.mixup else []
            self.mixers += [v2.CutMix(alpha=config.cutmix, num_classes=CLASSES)] if config.cutmix else []

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised floats (N, 3, 32, 32), channels_last, and labels (N,) or, mixed, targets (N, 100).

        Dropout and mixing draw from torch's global generator, which is seeded here.
        """
        run_seed = self.config.seed + (TEACHER_SEED_OFFSET if self.config.teacher != "none" else 0)
        seed = run_seed * SEED_STRIDE + self.epoch
        torch.manual_seed(seed)
        generator = Generator(self.labels.device).manual_seed(seed)
        order = torch.randperm(len(self.labels), device=self.labels.device, generator=generator)
        for index in order[: len(self) * self.batch_size].split(self.chunk * self.batch_size):
            images, labels = self.augment(index, generator), self.labels[index]
            batches = len(index) // self.batch_size
            for i in range(batches):  # so that each batch has all of TrivialAugment's operations
                yield self.mix(images[i::batches], labels[i::batches], generator)

    def augment(self, index: Tensor, generator: Generator) -> Tensor:
        """The images at `index` (N,), augmented and normalised."""
        config = self.config
        images = crop_and_flip(self.pixels, index, config.crop_padding, config.flip, generator)
        if config.trivial_augment:
            images = trivial_augment(images, config.trivial_augment, generator)
        return normalise(images)

    def mix(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """This process's part of a batch, mixed by mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) if either is
        on, by one of them at random if both are."""
        if self.mixers:
            # A mixer mixes neighbours, which trivial_augment mostly gave the same operation.
            order = torch.randperm(len(labels), device=labels.device, generator=generator)
            images, labels = self.mixers[torch.randint(len(self.mixers), ()).item()](images[order], labels[order])
        return images[self.shard].contiguous(memory_format=torch.channels_last), labels[self.shard]
