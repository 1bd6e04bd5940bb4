"""Augmentation of batches against plain per-image references."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Generator, Tensor

import augment
import data
from config import EXPERIMENTS, Config

PLAIN = Config(**EXPERIMENTS["result6"])  # no augmentation


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    return data.synthetic(1, seed=3)[0]


def test_normalise_against_its_formula(images: Tensor) -> None:
    expected = (images.numpy() / 255 - np.reshape(data.MEAN, (3, 1, 1))) / np.reshape(data.STD, (3, 1, 1))
    result = augment.normalise(images)
    assert np.allclose(result, expected, atol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("reflect", "mode"), [(False, "constant"), (True, "reflect")])
def test_crop_and_flip_against_numpy(images: Tensor, reflect: bool, mode: str, flip: bool) -> None:
    index, generator = torch.randperm(100, generator=seeded(1)), seeded()
    result = augment.crop_and_flip(augment.pixel_table(images), index, 4, reflect, flip, seeded())
    rows, columns = (torch.randint(-4, 5, (2, 100, 1), generator=generator) + 4).flatten(1).tolist()
    mirrored = (torch.rand(100, generator=generator) < 0.5).tolist()
    for place, cropped, row, column, mirror in zip(index, result.numpy(), rows, columns, mirrored, strict=True):
        padded = np.pad(images[place].numpy(), ((0, 0), (4, 4), (4, 4)), mode=mode)
        expected = padded[:, row : row + 32, column : column + 32]
        assert np.array_equal(cropped, expected[:, :, ::-1] if flip and mirror else expected)
    assert len(set(rows)) == len(set(columns)) == 9, "all offsets occur"
    assert 35 <= sum(mirrored) <= 65


def test_cutout_blanks_one_square(images: Tensor) -> None:
    inputs = augment.normalise(images) + 100  # nowhere 0
    blank = augment.cutout(inputs, 8, seeded()) == 0
    assert (blank.sum((1, 2, 3)) > 0).all()
    for mask in blank:
        rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
        assert len(rows) <= 8 and len(columns) <= 8
        assert mask.sum() == 3 * len(rows) * len(columns), "a full rectangle, the same in each channel"
    assert blank.sum() > 0.5 * 3 * 64 * len(images), "squares are cut off at the border only"


def reference_sample(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Bilinear, pixel by pixel; the image's sides reach from -1 to 1."""
    height, width = image.shape[1:]
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y = matrix @ ((2 * column + 1) / width - 1, (2 * row + 1) / height - 1, 1)
            left, top = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
            for i in (math.floor(top), math.floor(top) + 1):
                for j in (math.floor(left), math.floor(left) + 1):
                    if 0 <= i < height and 0 <= j < width:
                        result[:, row, column] += image[:, i, j] * (1 - abs(top - i)) * (1 - abs(left - j))
    return result


@pytest.mark.parametrize("place", range(1, 6))
def test_geometric_operations_against_a_loop_over_pixels(images: Tensor, place: int) -> None:
    for image, level in zip(images[::40].float(), (-0.7, 0.2, 1.0), strict=True):
        angle = math.radians(30 * level)
        matrix = {
            1: [[1, 0.3 * level, 0], [0, 1, 0]],
            2: [[1, 0, 0], [0.3 * level, 1, 0]],
            3: [[1, 0, 0.6 * level], [0, 1, 0]],
            4: [[1, 0, 0], [0, 1, 0.6 * level]],
            5: [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]],
        }[place]
        result = augment.OPERATIONS[place](image[None], torch.full((1, 1, 1, 1), level))[0]
        assert np.allclose(result, reference_sample(image.numpy(), np.array(matrix)), atol=0.02)


@pytest.mark.parametrize(
    ("place", "reference", "tolerance"),
    [
        (6, lambda image, level: 255 * TF.adjust_brightness(image / 255, 1 + 0.9 * level), 0.1),
        (7, lambda image, level: 255 * TF.adjust_saturation(image / 255, 1 + 0.9 * level), 0.1),
        (8, lambda image, level: 255 * TF.adjust_contrast(image / 255, 1 + 0.9 * level), 0.1),
        (9, lambda image, level: 255 * TF.adjust_sharpness(image / 255, 1 + 0.9 * level), 0.1),
        (10, lambda image, level: TF.posterize(image, 8 - round(4 * abs(level))), 0.0),
        (11, lambda image, level: TF.solarize(image, 256 * (1 - abs(level))), 0.0),
        (12, lambda image, level: 255 * TF.autocontrast(image / 255), 0.1),
        (13, lambda image, level: TF.equalize(image), 0.0),
    ],
)
def test_colour_operations_against_torchvision(images: Tensor, place: int, reference, tolerance: float) -> None:
    """torchvision's, image by image."""
    for image, level in zip(images[::13], torch.linspace(-0.9, 0.9, 8).tolist(), strict=True):
        result = augment.OPERATIONS[place](image[None].float(), torch.full((1, 1, 1, 1), level))[0].clamp(0, 255)
        assert (result - reference(image, level).float()).abs().max() <= tolerance


def test_trivial_augment_changes_its_share_per_sample(images: Tensor) -> None:
    result = augment.trivial_augment(images, 0.5, seeded())
    assert torch.equal(result[50:], images[50:].float())
    changed = (result[:50] != images[:50]).flatten(1).any(1)
    assert changed.sum() >= 40  # all but the identity's share and images with nothing to stretch
    same = images[:1].expand(100, -1, -1, -1)
    assert len(augment.trivial_augment(same, 1.0, seeded()).flatten(1).unique(dim=0)) > 70  # ten continuous operations
    assert torch.equal(
        augment.trivial_augment(images[:5], 1.0, seeded()), augment.trivial_augment(images[:5], 1.0, seeded())
    )


def test_trivial_augment_stays_in_range_and_goes_both_ways(images: Tensor) -> None:
    """Thirty times each operation: brightness, the seventh, both lower and higher than the image's own."""
    result = augment.trivial_augment(images[:1].expand(30 * len(augment.OPERATIONS), -1, -1, -1), 1.0, seeded())
    assert result.min() == 0 and result.max() == 255
    brightness = result[6 * 30 : 7 * 30].mean((1, 2, 3)) / images[0].float().mean()
    assert brightness.min() < 0.8 and brightness.max() > 1.1


@pytest.mark.parametrize(("flip", "reflect"), [(True, False), (False, True)])
def test_batches_are_cropped_as_the_settings_say(images: Tensor, flip: bool, reflect: bool) -> None:
    index = torch.arange(100)
    config = replace(PLAIN, crop_padding=4, flip=flip, crop_reflect=reflect)
    given, _ = augment.Batches(config, data.Images(images, index))(index, seeded())
    expected = augment.crop_and_flip(augment.pixel_table(images), index, 4, reflect, flip, seeded())
    assert torch.equal(given, augment.normalise(expected))


def test_batches_follow_from_the_generator(images: Tensor) -> None:
    train, index = data.Images(images, torch.arange(100)), torch.arange(99, -1, -1)
    batches = augment.Batches(replace(PLAIN, flip=True, crop_padding=4, trivial_augment=0.5, cutout=8), train)
    first, _ = batches(index, seeded())
    assert torch.equal(batches(index, seeded())[0], first)
    assert not torch.equal(batches(index, seeded(1))[0], first)
    plain, labels = augment.Batches(PLAIN, train)(index, seeded())
    assert torch.equal(plain, augment.normalise(images[index]))
    assert torch.equal(labels, index)


def test_small_images_are_reduced_as_pil_does(images: Tensor) -> None:
    train, index = data.Images(images, torch.arange(100)), torch.arange(100)
    batches = augment.Batches(PLAIN, train)
    small, _ = batches(index, seeded(), small=True)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
    for image, reduced in zip(images, small, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.BILINEAR)
        pixels = (255 * (reduced * deviation + mean)).permute(1, 2, 0)
        assert (pixels - torch.from_numpy(np.array(expected))).abs().max() < 1.01  # PIL rounds after each axis


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_gives_shares_of_two_labels(images: Tensor, kind: str) -> None:
    torch.manual_seed(0)
    train, index = data.Images(images, torch.arange(100)), torch.arange(100)
    inputs, shares = augment.Batches(replace(PLAIN, **{kind: 1.0}), train)(index, seeded())
    assert inputs.shape == images.shape
    assert torch.allclose(shares.sum(1), torch.ones(100))
    assert ((shares > 0).sum(1) == 2).all()
    _, hard = augment.Batches(replace(PLAIN, **{kind: 1.0}, mix_share=0.0), train)(index, seeded())
    assert torch.equal(hard, index)
