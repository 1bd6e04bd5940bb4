"""Augmentation of batches against plain per-image references."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Generator, Tensor

import augment
import data
from config import Config, preset
from data import synthetic

PLAIN = Config(**preset("result6"))  # no augmentation


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    return synthetic(1, seed=3)[0]


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


def test_trivial_augment_stays_in_range_and_goes_both_ways(images: Tensor) -> None:
    """Thirty times each operation, in their order: brightness both lower and higher than the image's own."""
    result = augment.trivial_augment(images[:1].expand(30 * len(augment.OPERATIONS), -1, -1, -1), 1.0, seeded())
    assert result.min() == 0 and result.max() == 255
    start = 30 * list(augment.OPERATIONS).index("brightness")
    brightness = result[start : start + 30].mean((1, 2, 3)) / images[0].float().mean()
    assert brightness.min() < 0.8 and brightness.max() > 1.1


@pytest.mark.parametrize(("flip", "reflect"), [(True, False), (False, True)])
def test_batches_are_cropped_as_the_settings_say(images: Tensor, flip: bool, reflect: bool) -> None:
    index = torch.arange(100)
    config = replace(PLAIN, crop_padding=4, flip=flip, crop_reflect=reflect)
    given, _ = augment.Loader(data.Images(images, index), config).augment(index, seeded())
    expected = augment.crop_and_flip(augment.pixel_table(images), index, 4, reflect, flip, seeded())
    assert torch.equal(given, data.normalise(expected))


def test_batches_follow_from_the_generator(images: Tensor) -> None:
    train, index = data.Images(images, torch.arange(100)), torch.arange(99, -1, -1)
    loader = augment.Loader(train, replace(PLAIN, flip=True, crop_padding=4, trivial_augment=0.5, cutout=8))
    first, _ = loader.augment(index, seeded())
    assert torch.equal(loader.augment(index, seeded())[0], first)
    assert not torch.equal(loader.augment(index, seeded(1))[0], first)
    plain, labels = augment.Loader(train, PLAIN).augment(index, seeded())
    assert torch.equal(plain, data.normalise(images[index]))
    assert torch.equal(labels, index)


def epoch_of(loader: augment.Loader, epoch: int) -> tuple[Tensor, Tensor]:
    """An epoch's images and labels."""
    loader.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_has_each_image_at_most_once(images: Tensor) -> None:
    """Three batches of 32 of 100 images: four are left out, others in each epoch."""
    loader = augment.Loader(data.Images(images, torch.arange(100)), replace(PLAIN, batch_size=32))
    assert (len(loader), loader.batch_size) == (3, 32)
    left_out = set()
    for epoch in range(3):
        batches, labels = epoch_of(loader, epoch)
        assert torch.equal(batches, data.normalise(images[labels])), "each image keeps its label"
        assert len(labels) == len(labels.unique()) == 96
        assert labels.tolist() != sorted(labels.tolist())
        left_out.add(frozenset(range(100)) - set(labels.tolist()))
    assert len(left_out) == 3


def test_a_data_set_smaller_than_a_batch_is_one_batch(images: Tensor) -> None:
    loader = augment.Loader(data.Images(images[:20], torch.arange(20)), PLAIN)
    assert (len(loader), loader.batch_size, len(epoch_of(loader, 0)[1])) == (1, 20, 20)


def test_an_epoch_follows_from_seed_and_number(images: Tensor) -> None:
    """Whatever was drawn before, and whichever epochs were seen."""
    train = data.Images(images, torch.arange(100))
    config = replace(PLAIN, flip=True, crop_padding=4, trivial_augment=0.5, mixup=0.2, cutmix=1.0, batch_size=50)
    first, epochs = augment.Loader(train, config), {}
    for epoch in (0, 1):
        epochs[epoch] = epoch_of(first, epoch)
    torch.rand(5)
    again = epoch_of(augment.Loader(train, config), 1)
    assert all(torch.equal(a, b) for a, b in zip(again, epochs[1], strict=True))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    for epoch in (0, 1):
        other = epoch_of(augment.Loader(train, replace(config, seed=1)), epoch)
        assert not torch.equal(other[0], epochs[1][0]), "seeds share no epoch, whatever its number"


def test_no_two_seeds_and_epochs_share_random_numbers() -> None:
    """Not even in the 32 bits that torch uses of a CPU generator's seed, up to 1,264 epochs."""
    largest = {f.name: f.metadata["max"] for f in fields(Config)}
    assert largest["seed"] < augment.TEACHER_SEED_OFFSET
    apart = np.arange(1, augment.TEACHER_SEED_OFFSET + largest["seed"] + 1) * augment.SEED_STRIDE % 2**32
    assert min(apart.min(), (2**32 - apart).min()) == 1264
    assert augment.SEED_STRIDE * (augment.TEACHER_SEED_OFFSET + largest["seed"]) + largest["epochs"] < 2**63


def test_a_student_sees_other_views_than_a_teacher_of_its_seed(images: Tensor) -> None:
    train = data.Images(images, torch.arange(100))
    config = replace(PLAIN, flip=True, crop_padding=4, batch_size=50)
    views = [epoch_of(augment.Loader(train, replace(config, teacher=t)), 0)[0] for t in ("none", "teacher.pth")]
    assert not torch.equal(*views)


@pytest.mark.parametrize(("fraction", "epochs", "small"), [(0.0, 4, 0), (0.29, 100, 29), (0.5, 5, 2), (1.0, 3, 3)])
def test_the_first_epochs_have_small_images(images: Tensor, fraction: float, epochs: int, small: int) -> None:
    train = data.Images(images[:2], torch.arange(2))
    loader = augment.Loader(train, replace(PLAIN, small_fraction=fraction, epochs=epochs))
    sides = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        sides += [loader.resize(images).shape[-1] for images, _ in loader]
    assert sides == [24] * small + [32] * (epochs - small)


def test_small_images_are_reduced_as_pil_does(images: Tensor) -> None:
    train = data.Images(images, torch.arange(100))
    small = augment.Loader(train, replace(PLAIN, small_fraction=1.0)).resize(data.normalise(images))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
    for image, reduced in zip(images, small, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.BILINEAR)
        pixels = (255 * (reduced * std + mean)).permute(1, 2, 0)
        assert (pixels - torch.from_numpy(np.array(expected))).abs().max() < 1.01  # PIL rounds after each axis


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_gives_parts_of_two_labels(images: Tensor, kind: str) -> None:
    torch.manual_seed(0)
    train, index = data.Images(images, torch.arange(100)), torch.arange(100)
    inputs, targets = augment.Loader(train, replace(PLAIN, **{kind: 1.0})).augment(index, seeded())
    assert inputs.shape == images.shape
    assert torch.allclose(targets.sum(1), torch.ones(100))
    assert ((targets > 0).sum(1) == 2).all()
    _, labels = augment.Loader(train, replace(PLAIN, **{kind: 1.0}, mix_prob=0.0)).augment(index, seeded())
    assert torch.equal(labels, index)


def test_mix_prob_is_the_fraction_of_mixed_batches(images: Tensor) -> None:
    torch.manual_seed(0)
    train, index = data.Images(images[:4], torch.arange(4)), torch.arange(4)
    loader = augment.Loader(train, replace(PLAIN, mixup=1.0, mix_prob=0.3))
    mixed = sum(loader.augment(index, seeded())[1].ndim == 2 for _ in range(300))
    assert 65 <= mixed <= 115
