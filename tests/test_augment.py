"""Augmentation against plain references per image, and the loader: order, labels, seeds, chunks, mixing."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

import augment
import data
from augment import Loader
from data import Images
from tests.helpers import TINY, seeded
from utils import UserError

AUGMENTED = replace(TINY, batch_size=32, flip=True, crop_padding=4, trivial_augment=1.0)
BY_NUMBER = torch.arange(100)  # labels that tell the images apart


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_against_numpy(images: Tensor, flip: bool) -> None:
    index, generator = torch.randperm(100, generator=seeded(1)), seeded()
    result = augment.crop_and_flip(images.permute(0, 2, 3, 1).reshape(-1, 3), index, 4, flip, seeded())
    rows, columns = (torch.randint(-4, 5, (2, 100, 1), generator=generator) + 4).flatten(1).tolist()
    mirrored = (torch.rand(100, generator=generator) < 0.5).tolist()
    for i, cropped, row, column, mirror in zip(index, result.numpy(), rows, columns, mirrored, strict=True):
        padded = np.pad(images[i].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
        expected = padded[:, row : row + 32, column : column + 32]
        assert np.array_equal(cropped, expected[:, :, ::-1] if flip and mirror else expected)
    assert len(set(rows)) == len(set(columns)) == 9, "all offsets occur"
    assert 35 <= sum(mirrored) <= 65


GEOMETRIC = {  # torchvision's angle and shears in degrees, translation in pixels
    "shear_x": lambda level: (0, (0, 0), (math.degrees(math.atan(0.3 * level)), 0)),
    "shear_y": lambda level: (0, (0, 0), (0, math.degrees(math.atan(0.3 * level)))),
    "translate_x": lambda level: (0, (-9.6 * level, 0), (0, 0)),
    "translate_y": lambda level: (0, (0, -9.6 * level), (0, 0)),
    "rotate": lambda level: (-30 * level, (0, 0), (0, 0)),
}


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_against_torchvision(images: Tensor, name: str) -> None:
    for image, level in zip(images[::50].float(), (-0.7, 1.0), strict=True):
        angle, translation, shears = GEOMETRIC[name](level)
        expected = TF.affine(image, angle, translation, 1.0, shears, TF.InterpolationMode.BILINEAR)
        result = augment.OPERATIONS[name](image[None], torch.full((1, 1, 1, 1), level))[0]
        assert torch.allclose(result, expected, atol=0.02)


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


@pytest.mark.parametrize(("name", "reference", "tolerance"), COLOUR, ids=[name for name, *_ in COLOUR])
def test_colour_operations_against_torchvision(images: Tensor, name: str, reference: Any, tolerance: float) -> None:
    few = images[:10] // 100 * 100  # few values, and at last a single one
    few[-1] = 90
    for image, level in zip(torch.cat([images[::13], few]), torch.linspace(-0.9, 0.9, 18).tolist(), strict=True):
        result = augment.OPERATIONS[name](image[None].float(), torch.full((1, 1, 1, 1), level))[0].clamp(0, 255)
        assert (result - reference(image, level).float()).abs().max() <= tolerance


def marking(number: int) -> Callable[[Tensor, Tensor], Tensor]:
    """An operation that writes its number into an image's first row."""
    return lambda images, level: torch.cat([torch.full_like(images[:, :, :1], number), images[:, :, 1:]], 2)


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that leave their numbers, 0 to 13, and images that are not normalised."""
    monkeypatch.setattr(augment, "OPERATIONS", {str(number): marking(number) for number in range(14)})
    monkeypatch.setattr(augment, "normalise", torch.Tensor.float)


def test_fewer_images_than_operations_get_any_of_them(images: Tensor, marks: None) -> None:
    found = {augment.trivial_augment(images[:1], 1.0, seeded(seed))[0, 0, 0, 0].item() for seed in range(50)}
    assert len(found) > 8


def epoch_of(loader: Loader, epoch: int) -> tuple[Tensor, Tensor]:
    """An epoch's images and labels."""
    loader.epoch = epoch
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_an_epoch_has_each_image_at_most_once_with_its_label(images: Tensor) -> None:
    """Three batches of 32 of 100 images: four are left out, others in each epoch."""
    loader, left_out = Loader(Images(images, BY_NUMBER), replace(TINY, batch_size=32)), set()
    for epoch in range(3):
        batches, labels = epoch_of(loader, epoch)
        assert torch.equal(batches, data.normalise(images[labels])), "each image keeps its label"
        assert len(labels) == len(labels.unique()) == 96
        left_out.add(frozenset(range(100)) - set(labels.tolist()))
    assert len(loader) == len(left_out) == 3
    few = Loader(Images(images[:20], BY_NUMBER[:20]), replace(TINY, batch_size=32))
    assert (len(few), len(epoch_of(few, 0)[1])) == (1, 20), "fewer images than a batch"


def test_an_epoch_follows_from_seed_and_number(images: Tensor) -> None:
    """Whatever was drawn before, and whichever epochs were seen; a student has other views than its teacher had."""
    train, config = Images(images, BY_NUMBER), replace(AUGMENTED, mixup=0.2, cutmix=1.0)
    first = Loader(train, config)
    epochs = [epoch_of(first, epoch) for epoch in (0, 1)]
    torch.rand(5)
    again = epoch_of(Loader(train, config), 1)
    assert all(torch.equal(a, b) for a, b in zip(again, epochs[1], strict=True))
    others = [Loader(train, replace(config, **change)) for change in ({"seed": 1}, {"teacher": "any.pth"})]
    views = [epochs[0][0], epochs[1][0], *(epoch_of(loader, epoch)[0] for loader in others for epoch in (0, 1))]
    assert len({view.sum().item() for view in views}) == 6


def test_batches_on_a_cpu_are_those_of_the_recorded_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of seed 0: order, crop and flip bit for bit; TrivialAugment as far as CPUs round alike."""
    monkeypatch.setattr(augment, "OPERATIONS", dict(list(augment.OPERATIONS.items())[:14]))  # without a user's own
    images = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    for fraction in (0.0, 1.0):
        loader = Loader(Images(images, BY_NUMBER), replace(AUGMENTED, trivial_augment=fraction))
        loader.epoch = 1
        views, labels = (torch.cat(part) for part in zip(*list(loader)[:2], strict=True))
        if fraction:
            assert (views.flatten() @ torch.linspace(-1, 1, views.numel())).item() == pytest.approx(-2624.20, rel=1e-4)
        else:
            content = views.contiguous().numpy().tobytes() + labels.numpy().tobytes()
            assert hashlib.sha256(content).hexdigest()[:16] == "4bcb95575b4e0ac8"


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_many_batches_augmented_at_once_are_like_those_of_one(fraction: float, marks: None) -> None:
    """The path of a GPU: 64 batches and then 11."""
    images = data.synthetic(12, seed=3).images
    images[:, :, 0] = 99
    loader = Loader(Images(images, torch.arange(1200)), replace(TINY, batch_size=16, trivial_augment=fraction))
    loader.chunk = 64
    batches, total = list(loader), Counter()
    assert len(batches) == len(loader) == 75
    assert len(torch.cat([labels for _, labels in batches]).unique()) == 1200
    for batch, labels in batches:
        assert batch.shape == (16, 3, 32, 32) and batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch[:, :, 1:], images[labels][:, :, 1:].float()), "each image keeps its label"
        found = Counter(batch[:, 0, 0, 0].tolist())
        assert found[99] == pytest.approx(16 * (1 - fraction), abs=1), "the fraction that is not changed"
        assert len(found) >= (14 if fraction == 1 else 8), "each batch has many operations"
        total += found
    assert all(total[number] == pytest.approx(1200 * fraction / 14, abs=2) for number in range(14))


def test_images_are_mixed_with_those_of_any_operation(images: Tensor, marks: None) -> None:
    """A mixer mixes each image with its neighbour. Of random neighbours, 7 of 100 share an operation."""
    loader = Loader(Images(images, BY_NUMBER), replace(TINY, batch_size=50, trivial_augment=1.0))
    loader.mixers = [lambda images, labels: (images, labels)]
    for (batch, labels), (_, again) in zip(list(loader), loader, strict=True):
        assert torch.equal(batch[:, :, 1:], images[labels][:, :, 1:].float()), "each image keeps its label"
        assert (batch[:, 0, 0, 0] == batch.roll(1, 0)[:, 0, 0, 0]).sum() < 15
        assert torch.equal(labels, again)
        torch.rand(5)  # as dropout does


def test_mixup_gives_parts_of_two_images_and_their_labels(images: Tensor) -> None:
    ((mixed, targets),) = Loader(Images(images, BY_NUMBER), replace(TINY, batch_size=100, mixup=1.0))
    assert torch.allclose(targets.sum(1), torch.ones(100)) and ((targets > 0).sum(1) == 2).all()
    plain = data.normalise(images).flatten(1)
    assert torch.allclose(mixed.flatten(1), targets @ plain, atol=1e-4)


def test_cutmix_takes_each_pixel_from_one_of_two_images(images: Tensor) -> None:
    ((mixed, targets),) = Loader(Images(images, BY_NUMBER), replace(TINY, batch_size=100, cutmix=1.0))
    first, second = (data.normalise(images[index]) for index in targets.topk(2).indices.T)
    assert ((mixed == first) | (mixed == second)).all()


def test_each_process_has_its_part_of_the_same_batches(images: Tensor) -> None:
    train, config = Images(images, BY_NUMBER), replace(AUGMENTED, mixup=0.2, cutmix=1.0)
    whole, parts = Loader(train, config), [Loader(train, config, rank, 4) for rank in range(4)]
    for batch, *pieces in zip(*map(list, (whole, *parts)), strict=True):  # one epoch after the other
        for i in range(2):
            assert torch.equal(torch.stack([piece[i] for piece in pieces], 1).flatten(0, 1), batch[i])
    with pytest.raises(UserError, match="3 processes cannot share batches of 32"):
        Loader(train, config, 0, 3)
