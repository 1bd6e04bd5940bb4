"""The loader: its batches, order and seeds, small images and mixing."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import augment
import data
from config import Config, preset
from tests.helpers import seeded

PLAIN = Config(**preset("result6"))  # no augmentation


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


def test_epochs_of_another_model_of_gpu_have_other_names(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws other random numbers."""
    loader = augment.Loader(data.Images(images, torch.arange(100)), PLAIN)
    assert loader.cache_key == "0-cpu"
    loader.labels = SimpleNamespace(device=torch.device("cuda:1"))
    for gpu, key in (("NVIDIA H100 80GB/HBM3", "0-NVIDIAH10080GBHBM3"), ("Tesla T4", "0-TeslaT4")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        assert loader.cache_key == key
