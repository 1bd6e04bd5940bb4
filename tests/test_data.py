"""The data set: digests, conversion of the official files, splits, damage, and the synthetic stand-in."""

import hashlib
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

import data
from data import synthetic
from tests.helpers import Bomb, small_set, taken_for_official
from utils import UserError

Arrays = dict[str, np.ndarray]


@pytest.fixture
def small() -> Iterator[Arrays]:
    """A stand-in for the official arrays, whose digests the program takes for the official ones."""
    arrays = small_set()
    with taken_for_official(arrays):
        yield arrays


def write_official(folder: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The arrays as pickles in the official layout, shuffled, with torchvision's checksums patched to them."""
    folder = folder / CIFAR100.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> list[list[str]]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()]]

    for source in ("train", "test"):
        images = arrays[f"{source}_images"]
        labels = np.arange(100).repeat(len(images) // 100)
        indices = np.argsort(rng.permutation(labels), kind="stable")  # shuffled, but each label's images in order
        rows, names = np.empty((len(labels), 3072), np.uint8), np.empty(len(labels), int)
        rows[indices] = images.transpose(0, 3, 1, 2).reshape(-1, 3072)
        names[indices] = labels
        files = write(source, {"data": rows, "fine_labels": names.tolist()})
        monkeypatch.setattr(CIFAR100, f"{source}_list", files)
    ((_, digest),) = write("meta", {"fine_label_names": [str(label) for label in range(100)]})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": digest})
    return folder


def test_files_in_the_official_format_give_the_arrays(small: Arrays, tmp_path: Path, monkeypatch) -> None:
    write_official(tmp_path, small, monkeypatch)
    data.build(tmp_path / "cifar100.npz")
    for name, images in small.items():
        assert np.array_equal(data.read(tmp_path / "cifar100.npz", name), images)
    loaded = data.load_test("cifar100", str(tmp_path))
    assert np.array_equal(loaded.images.permute(0, 2, 3, 1), small["test_images"])
    assert loaded.labels.tolist() == [label for label in range(100) for _ in range(2)]


def test_mean_and_std_are_the_training_images(cifar100: Arrays) -> None:
    """From exact sums over all pixels."""
    counts = np.stack([np.bincount(cifar100["train_images"][..., c].ravel(), minlength=256) for c in range(3)])
    values = np.arange(256) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    std = np.sqrt((counts * values**2).sum(1) / counts.sum(1) - mean**2)
    assert np.allclose(mean, data.MEAN, atol=1e-9)
    assert np.allclose(std, data.STD, atol=1e-9)


def test_an_archive_put_there_by_hand_needs_no_network(small: Arrays, tmp_path: Path, monkeypatch) -> None:
    folder = write_official(tmp_path / "elsewhere", small, monkeypatch)
    archive = tmp_path / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, CIFAR100.base_folder)
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nothing-listens-here")
    loaded = data.load_training("cifar100", str(tmp_path), validation_per_class=1)[0]
    assert loaded.images.shape == (200, 3, 32, 32)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nothing-listens-here")
    with pytest.raises(data.DataError) as caught:
        data.load_training("cifar100", str(tmp_path), 50)
    message = str(caught.value)
    assert "\n" not in message
    for needed in (str(tmp_path / "cifar100.npz"), "127.0.0.1:9", "cifar-100-python.tar.gz", "--dataset synthetic"):
        assert needed in message


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def damage_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def damage_pickle(path: Path) -> None:
    """An object array whose unpickling would run code."""
    np.savez(path, train_images=np.array([Bomb()], dtype=object))


def damage_shape(path: Path) -> None:
    """A header that promises 10^15 bytes."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("train_images.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)


def damage_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", bytes(300_000_000))


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_text(path: Path) -> None:
    """Another file; numpy's own message advises to unpickle it."""
    path.write_bytes(b"text")


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_swap(path: Path) -> None:
    """Two images exchanged."""
    arrays = dict(np.load(path))
    arrays["train_images"][[0, -1]] = arrays["train_images"][[-1, 0]]
    np.savez(path, **arrays)


# As where memory is short.
MESSAGES = {damage_shape: r"cifar100\.npz cannot be read: Unable to allocate .* TiB.*delete the file"}


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_flip,
        damage_pickle,
        damage_shape,
        damage_bomb,
        damage_empty,
        damage_text,
        damage_folder,
        damage_swap,
    ],
)
def test_a_damaged_file_is_refused(small: Arrays, damage, tmp_path: Path) -> None:
    path = tmp_path / "cifar100.npz"
    np.savez(path, **small)
    data.read(path, "train_images")
    damage(path)
    with pytest.raises(data.DataError, match=MESSAGES.get(damage, r"cifar100\.npz is damaged.*Delete it")) as caught:
        data.read(path, "train_images")
    assert "\n" not in str(caught.value) and "unsafely" not in str(caught.value)
    assert not Bomb.exploded


def test_split_is_balanced_disjoint_and_always_the_same() -> None:
    labels = torch.arange(100).repeat_interleave(500)
    train, validation = data.split(labels, 50)
    assert labels[train].bincount().tolist() == [450] * 100
    assert labels[validation].bincount().tolist() == [50] * 100
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(50_000))
    torch.manual_seed(1)
    for again, first in zip(data.split(labels, 50), (train, validation), strict=True):
        assert torch.equal(again, first)
    fewer, same = data.split(labels, 50, images_per_class=80)
    assert torch.equal(same, validation), "the validation images do not depend on how many are trained on"
    assert len(fewer) == 3000
    assert set(fewer.tolist()) <= set(train.tolist())
    assert len(data.split(labels, 0)[0]) == 50_000


def test_gradients_pass_through_normalise_after_an_evaluation() -> None:
    data.normalisation.cache_clear()
    with torch.inference_mode():
        data.normalise(torch.zeros(1, 3, 32, 32))
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    data.normalise(images).sum().backward()
    assert images.grad[0, :, 0, 0].tolist() == pytest.approx([1 / (255 * std) for std in data.STD])


def test_normalise_follows_its_formula() -> None:
    images = synthetic(1, seed=3)[0]
    expected = (images.numpy() / 255 - np.reshape(data.MEAN, (3, 1, 1))) / np.reshape(data.STD, (3, 1, 1))
    result = data.normalise(images)
    assert np.allclose(result, expected, atol=1e-5)
    assert (result.dtype, result.is_contiguous(memory_format=torch.channels_last)) == (torch.float32, True)


def test_synthetic_is_deterministic_and_its_test_images_are_others() -> None:
    images, labels = synthetic(2, seed=0)
    assert (images.shape, images.dtype, labels.bincount().tolist()) == ((200, 3, 32, 32), torch.uint8, [2] * 100)
    assert torch.equal(synthetic(2, seed=0)[0], images)
    assert not torch.equal(synthetic(2, seed=1)[0], images)
    train, test = data.load_training("synthetic", "", 0, images_per_class=20)[0], data.load_test("synthetic", "")
    assert train.images.shape == test.images.shape
    assert not torch.equal(train.images, test.images)


def test_a_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="validation_per_class 300 leaves no image"):
        data.load_training("synthetic", "", validation_per_class=300)


def test_synthetic_is_not_solved_by_a_linear_classifier() -> None:
    """Ridge regression of the labels on the pixels, best of three strengths on the test part."""
    train, test = data.load_training("synthetic", "", 0)[0], data.load_test("synthetic", "")
    x, unseen = (part.images.flatten(1).float() / 255 - 0.5 for part in (train, test))
    target = torch.nn.functional.one_hot(train.labels, 100).float() - 0.01
    gram, moment = x.T @ x, x.T @ target
    for strength in (1e1, 1e2, 1e3):
        weights = torch.linalg.solve(gram + strength * torch.eye(3072), moment)
        assert ((unseen @ weights).argmax(1) == test.labels).float().mean() < 0.3


def test_a_folder_without_data_is_left_clean(small: Arrays, tmp_path: Path, monkeypatch) -> None:
    """Nothing half-written under the final name when the official files are not the official images."""
    write_official(tmp_path, small, monkeypatch)
    monkeypatch.setitem(data.SHA256, "train_images", "0" * 64)
    with pytest.raises(data.DataError, match="SHA-256"):
        data.build(tmp_path / "cifar100.npz")
    shutil.rmtree(tmp_path / CIFAR100.base_folder)
    assert list(tmp_path.iterdir()) == []
