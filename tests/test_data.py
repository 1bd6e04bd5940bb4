"""The data set: digests, the official files, the split, damage, and the synthetic stand-in."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.datasets import CIFAR100

import data
from tests.helpers import Bomb, official
from utils import UserError

Arrays = dict[str, np.ndarray]


@pytest.fixture
def arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """A small data set that the program takes for CIFAR-100, in tmp_path."""
    return official(monkeypatch, tmp_path)


@pytest.fixture
def extracted(tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as torchvision's extracted files alone, in a random order."""
    (tmp_path / "cifar100.npz").unlink()
    folder, rng = tmp_path / CIFAR100.base_folder, np.random.default_rng(0)
    folder.mkdir()

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    for source in ("train", "test"):
        images, labels = arrays[f"{source}_images"], rng.permutation(np.arange(100).repeat(3))
        rows = np.empty((len(labels), 3072), np.uint8)
        rows[np.argsort(labels, kind="stable")] = images.transpose(0, 3, 1, 2).reshape(-1, 3072)
        files = [write(source, {"data": rows, "fine_labels": labels.tolist()})]
        monkeypatch.setattr(CIFAR100, f"{source}_list", files)
    _, digest = write("meta", {"fine_label_names": [str(label) for label in range(100)]})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": digest})
    return folder


def test_torchvisions_files_give_the_arrays(extracted: Path, arrays: Arrays, tmp_path: Path, whole_files) -> None:
    images, labels = data.load_test("cifar100", str(tmp_path))
    assert np.array_equal(images.permute(0, 2, 3, 1), arrays["test_images"])
    assert labels.tolist() == [label for label in range(100) for _ in range(3)]
    built = tmp_path / "cifar100.npz"
    assert built.stat().st_ino in whole_files
    assert all(np.array_equal(data.read(built, name), array) for name, array in arrays.items())
    assert [len(part.labels) for part in data.load_training("cifar100", str(tmp_path), 1, 2)] == [100, 100]


def test_a_folder_that_is_read_only_is_enough(extracted: Path, arrays: Arrays, tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path, write: Callable) -> None:
        raise UserError(f"{path} cannot be written: Read-only file system")

    monkeypatch.setattr(data, "atomic_write", refuse)
    images, _ = data.load("cifar100", str(tmp_path), "train")
    assert np.array_equal(images.permute(0, 2, 3, 1), arrays["train_images"])


def test_files_that_are_not_the_official_images_are_refused(extracted: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(data.SHA256, "test_images", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        data.load_test("cifar100", str(tmp_path))
    assert list(tmp_path.iterdir()) == [extracted], "nothing is built from them"


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nothing-listens-here")
    archive = tmp_path / CIFAR100.filename
    archive.write_bytes(b"truncated")
    with pytest.raises(UserError) as caught:
        data.load_training("cifar100", str(tmp_path), 50)
    for text in (str(tmp_path / "cifar100.npz"), "127.0.0.1:9", f"archive at {archive}", "--dataset synthetic"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def pickled_code(path: Path) -> None:
    np.savez(path, train_images=np.array([Bomb()], dtype=object))


def exchange_two_images(path: Path) -> None:
    arrays = dict(np.load(path))
    arrays["train_images"][[0, -1]] = arrays["train_images"][[-1, 0]]
    np.savez(path, **arrays)


@pytest.mark.parametrize("damage", [flip_a_bit, pickled_code, exchange_two_images])
def test_a_damaged_file_is_refused_in_one_line(damage: Callable[[Path], None], arrays: Arrays, tmp_path: Path) -> None:
    damage(tmp_path / "cifar100.npz")
    with pytest.raises(UserError, match=r"cifar100\.npz cannot be used: .+\. Delete it") as caught:
        data.load_training("cifar100", str(tmp_path), 1)
    assert "\n" not in str(caught.value) and "allow_pickle=True" not in str(caught.value)
    assert not Bomb.exploded


def test_mean_and_std_are_those_of_the_training_images(cifar100: str) -> None:
    """From exact sums over all pixels."""
    pixels = data.load("cifar100", cifar100, "train").images.permute(0, 2, 3, 1).numpy()
    counts = np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])
    values = np.arange(256) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    std = np.sqrt((counts * values**2).sum(1) / counts.sum(1) - mean**2)
    assert np.abs(mean - data.MEAN).max() < 1e-9 and np.abs(std - data.STD).max() < 1e-9


def test_normalise_follows_its_formula(images: Tensor) -> None:
    expected = (images.numpy() / 255 - np.reshape(data.MEAN, (3, 1, 1))) / np.reshape(data.STD, (3, 1, 1))
    result = data.normalise(images)
    assert np.allclose(result, expected, atol=1e-5)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
    data.normalisation.cache_clear()
    with torch.inference_mode():
        data.normalise(images)
    assert data.normalise(images.float().requires_grad_()).requires_grad, "a gradient passes, also after grading"


def test_split_is_balanced_disjoint_and_always_the_same() -> None:
    labels = torch.arange(100).repeat_interleave(500)
    train, validation = data.split(labels, 50)
    assert labels[train].bincount().tolist() == [450] * 100
    assert labels[validation].bincount().tolist() == [50] * 100
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(50_000))
    digest = hashlib.sha256(validation.numpy().tobytes()).hexdigest()
    assert digest[:16] == "22ef9ccdd0ace878", "the split of all recorded runs"
    fewer, same = data.split(labels, 50, images_per_class=80)
    assert torch.equal(same, validation), "the validation images do not depend on how many are trained on"
    assert len(fewer) == 3000 and set(fewer.tolist()) <= set(train.tolist())
