"""The operations of augmentation against plain per-image references."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

import augment
import data
from config import Config, preset
from tests.helpers import seeded

PLAIN = Config(**preset("result6"))  # no augmentation


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("reflect", "mode"), [(False, "constant"), (True, "reflect")])
def test_crop_and_flip_against_numpy(images: Tensor, reflect: bool, mode: str, flip: bool) -> None:
    index, generator = torch.randperm(100, generator=seeded(1)), seeded()
    result = augment.crop_and_flip(augment.pixel_table(images), index, 4, reflect, flip, seeded())
    rows, columns = (torch.randint(-4, 5, (2, 100, 1), generator=generator) + 4).flatten(1).tolist()
    mirrored = (torch.rand(100, generator=generator) < 0.5).tolist()
    for i, cropped, row, column, mirror in zip(index, result.numpy(), rows, columns, mirrored, strict=True):
        padded = np.pad(images[i].numpy(), ((0, 0), (4, 4), (4, 4)), mode=mode)
        expected = padded[:, row : row + 32, column : column + 32]
        assert np.array_equal(cropped, expected[:, :, ::-1] if flip and mirror else expected)
    assert len(set(rows)) == len(set(columns)) == 9, "all offsets occur"
    assert 35 <= sum(mirrored) <= 65


def test_cutout_blanks_one_square(images: Tensor) -> None:
    inputs = data.normalise(images) + 100  # nowhere 0
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


GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_against_a_loop_over_pixels(images: Tensor, name: str) -> None:
    for image, level in zip(images[::40].float(), (-0.7, 0.2, 1.0), strict=True):
        angle = math.radians(30 * level)
        matrix = {
            "shear_x": [[1, 0.3 * level, 0], [0, 1, 0]],
            "shear_y": [[1, 0, 0], [0.3 * level, 1, 0]],
            "translate_x": [[1, 0, 0.6 * level], [0, 1, 0]],
            "translate_y": [[1, 0, 0], [0, 1, 0.6 * level]],
            "rotate": [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]],
        }[name]
        result = augment.OPERATIONS[name](image[None], torch.full((1, 1, 1, 1), level))[0]
        assert np.allclose(result, reference_sample(image.numpy(), np.array(matrix)), atol=0.02)


COLOUR = [  # name, torchvision's of one image, tolerance
    ("identity", lambda image, level: image, 0.0),
    ("brightness", lambda image, level: 255 * TF.adjust_brightness(image / 255, 1 + 0.9 * level), 0.1),
    ("saturation", lambda image, level: 255 * TF.adjust_saturation(image / 255, 1 + 0.9 * level), 0.1),
    ("contrast", lambda image, level: 255 * TF.adjust_contrast(image / 255, 1 + 0.9 * level), 0.1),
    ("sharpness", lambda image, level: 255 * TF.adjust_sharpness(image / 255, 1 + 0.9 * level), 0.1),
    ("posterize", lambda image, level: TF.posterize(image, 8 - round(4 * abs(level))), 0.0),
    ("solarize", lambda image, level: TF.solarize(image, 256 * (1 - abs(level))), 0.0),
    ("autocontrast", lambda image, level: 255 * TF.autocontrast(image / 255), 0.1),
    ("equalize", lambda image, level: TF.equalize(image), 0.0),
]


@pytest.mark.parametrize(("name", "reference", "tolerance"), COLOUR)
def test_colour_operations_against_torchvision(images: Tensor, name: str, reference, tolerance: float) -> None:
    """torchvision's, image by image."""
    for image, level in zip(images[::13], torch.linspace(-0.9, 0.9, 8).tolist(), strict=True):
        result = augment.OPERATIONS[name](image[None].float(), torch.full((1, 1, 1, 1), level))[0].clamp(0, 255)
        assert (result - reference(image, level).float()).abs().max() <= tolerance


def test_each_of_our_operations_has_its_reference() -> None:
    """In one of the two lists above; the identity is in the second. A user may have added others."""
    names = [*GEOMETRIC, *(name for name, *_ in COLOUR)]
    assert len(names) == 14 and set(names) <= augment.OPERATIONS.keys()


def test_trivial_augment_changes_its_fraction_of_the_images(images: Tensor) -> None:
    result = augment.trivial_augment(images, 0.5, seeded())
    assert torch.equal(result[50:], images[50:].float())
    changed = (result[:50] != images[:50]).flatten(1).any(1)
    assert changed.sum() >= 40  # all but the identity's part and images with nothing to stretch
    same = images[:1].expand(100, -1, -1, -1)
    assert len(augment.trivial_augment(same, 1.0, seeded()).flatten(1).unique(dim=0)) > 70  # ten continuous operations
    assert torch.equal(
        augment.trivial_augment(images[:5], 1.0, seeded()), augment.trivial_augment(images[:5], 1.0, seeded())
    )


def test_few_images_are_not_always_given_the_same_operations(images: Tensor, monkeypatch) -> None:
    """A batch of fewer images than operations leaves some out; over many batches none is always left out."""
    used = set()

    def note(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda images, level: (used.add(name), images)[1]

    monkeypatch.setattr(augment, "OPERATIONS", {name: note(name) for name in augment.OPERATIONS})
    for seed in range(40):
        augment.trivial_augment(images[:4], 1.0, seeded(seed))
    assert used == augment.OPERATIONS.keys()


def test_trivial_augment_stays_in_range_and_goes_both_ways(images: Tensor) -> None:
    """Thirty times each operation, in their order: brightness both lower and higher than the image's own."""
    result = augment.trivial_augment(images[:1].expand(30 * len(augment.OPERATIONS), -1, -1, -1), 1.0, seeded())
    assert result.min() == 0 and result.max() == 255
    start = 30 * list(augment.OPERATIONS).index("brightness")
    brightness = result[start : start + 30].mean((1, 2, 3)) / images[0].float().mean()
    assert brightness.min() < 0.8 and brightness.max() > 1.1
