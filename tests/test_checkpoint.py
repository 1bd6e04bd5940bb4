"""Checkpoints: what is written comes back, what is damaged or hostile does not, and weights from elsewhere load."""

import random
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import checkpoint
import model as models
from config import Config
from tests.helpers import TINY, Bomb, same, write_checkpoint
from utils import UserError

Weights = dict[str, Any]
CONTENT = {"weights": {"a": torch.arange(3.0), "b": torch.tensor(3)}, "history": [{"loss": 0.5}, {"loss": None}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "some.pth", CONTENT)
    return tmp_path / "some.pth"


def refused(path: Path, reason: str) -> None:
    """Loading the file fails in one line that gives the reason."""
    with pytest.raises(UserError, match=reason) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_bit_is_refused_or_harmless(path: Path) -> None:
    """Each bit of a tensor's entry in the archive's directory, and some of all; those of dates do no harm."""
    good, rng, count = path.read_bytes(), random.Random(0), 0
    entry = good.rindex(b"PK\1\2", 0, good.rindex(b"/data/0"))
    bits = [*range(8 * entry, 8 * entry + 8 * 46), *rng.sample(range(8 * len(good)), 300)]
    for bit in bits:
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            opened = checkpoint.load(path)
        except UserError as error:
            count += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert same(opened, CONTENT), bit
    assert count > len(bits) / 2


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", [Bomb(), {"weights": Bomb()}], ids=["bare", "nested"])
def test_code_in_a_checkpoint_does_not_run(path: Path, content: Any, zipped: bool) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, "more than plain data")
    assert not Bomb.exploded


def write_compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))


def mark_as_folder(path: Path) -> None:
    """A tensor's entry, for whose content torch would read random memory."""
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0")) + 38] |= 0x10
    path.write_bytes(content)


WRONG_FILES = {
    "html": (lambda path: path.write_text("<!DOCTYPE html><html></html>"), "damaged"),
    "list": (lambda path: torch.save([torch.zeros(1)], path), "holds a list"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    "compressed": (write_compressed, r"archive/data\.pkl in it is compressed"),
    "folder bit": (mark_as_folder, r"data/0 in it is marked as a folder"),
    "missing": (lambda path: path.unlink(), "does not exist"),
}


@pytest.mark.parametrize(("write", "reason"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_file_that_cannot_be_used_is_called_what_it_is(path: Path, write: Callable[[Path], Any], reason: str) -> None:
    write(path)
    refused(path, reason)


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    """The system refuses the file's 100th byte."""
    resource = pytest.importorskip("resource")
    good, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (99, limits[1]))
        with pytest.raises(UserError, match=r"some.pth cannot be written: File too large. Make room"):
            checkpoint.save(path, {"weights": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == good and list(path.parent.iterdir()) == [path]


def zeros(weights: Weights) -> Weights:
    return {name: value * 0 for name, value in weights.items()}


WRAPPINGS = {
    "bare": lambda weights: weights,
    "nested": lambda weights: {"epoch": 3, "state_dict": weights, "optimizer": {"state": {0: {"m": torch.zeros(9)}}}},
    "prefixed": lambda weights: {"net": {f"module._orig_mod.{k}": v for k, v in weights.items()}, "best_acc": 70.1},
    "timm": lambda weights: {"arch": "any", "state_dict": zeros(weights), "state_dict_ema": weights, "version": 2},
    "swa": lambda weights: {"model": zeros(weights), "swa_model": {f"module.{k}": v for k, v in weights.items()}},
    "last.pth": lambda weights: {"model": zeros(weights), "ema": {"model": weights, "updates": 3}},
    "thop": lambda weights: weights | {"total_ops": torch.zeros(1), "stem.0.total_params": torch.zeros(1)},
    "weights": lambda weights: {"model": zeros(weights), "weights": weights},
    "config": lambda weights: {"config": {"model": "MobileNetV3", "dataset": "CIFAR100"}, "model": weights},
    "format 1": lambda weights: {"state": {"network": zeros(weights), "average": weights}},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_weights_load_however_they_are_wrapped(wrap: Callable, model: nn.Module, tmp_path: Path) -> None:
    torch.save(wrap(model.state_dict()), tmp_path / "foreign.pth")
    loaded, content = checkpoint.load_model(tmp_path / "foreign.pth")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    assert torch.equal(loaded.stem[1].running_var, model.stem[1].running_var)
    assert not loaded.training and content["config"]["dataset"] == "cifar100"


def test_weights_that_do_not_fit_name_the_first_tensors_that_differ(model: nn.Module) -> None:
    weights = model.state_dict()
    fewer = {name: value for name, value in weights.items() if not name.startswith("head")}
    for wrong, reason in (
        (weights | {"stem.0.weight": torch.zeros(7, 3, 3, 3)}, r"stem\.0\.weight.+\[7, 3, 3, 3\]"),
        (weights | {"other.weight": torch.zeros(1)}, r"Unexpected.+other\.weight"),
        (fewer, r"Missing.+head\.0\.weight"),
        ({"conv1.weight": torch.zeros(1)}, r"there is no stem\.0\.weight in it, but conv1\.weight"),
    ):
        with pytest.raises(UserError, match=rf"^any\.pth .*{reason}") as caught:
            checkpoint.load_weights(models.MobileNetV3(), wrong, Path("any.pth"))
        assert "\n" not in str(caught.value)


def test_the_settings_of_a_checkpoint_choose_its_model(model: nn.Module, tmp_path: Path, monkeypatch: Any) -> None:
    """An edit of the defaults, here one that makes them invalid, changes nothing."""
    edited = asdict(TINY) | {"model": "mobilenetv3", "pretrained": True}
    monkeypatch.setattr(Config.__init__, "__defaults__", tuple(edited.values()))
    for wrong in ({"model": 3}, {"image_size": 10**9}, {"dataset": "imagenet"}):
        path = write_checkpoint(tmp_path / "any.pth", model, config=asdict(TINY) | wrong)
        with pytest.raises(UserError, match=f"any.pth cannot be used: {next(iter(wrong))}"):
            checkpoint.load_model(path)
    model.stem[1].running_var.fill_(-1)
    with pytest.raises(UserError, match=r"any.pth cannot be used: its logits are not finite"):
        checkpoint.load_model(write_checkpoint(tmp_path / "any.pth", model))
    pytest.importorskip("timm")
    other, config = models.build_model("test_vit", image_size=160), {"model": "test_vit", "image_size": 160}
    config |= {"experiment": "default"}
    loaded, _ = checkpoint.load_model(write_checkpoint(tmp_path / "timm.pth", other[1], config=config))
    assert same(loaded.state_dict(), other.state_dict()) and loaded[0](torch.zeros(1, 3, 32, 32)).shape[-1] == 160


def test_a_run_that_cannot_be_resumed_is_one_line(tmp_path: Path) -> None:
    for content, reason in (
        ({"config": asdict(TINY) | {"cutout": 8}}, "cutout"),
        ({}, "config"),
    ):
        checkpoint.save(tmp_path / "last.pth", content)
        with pytest.raises(UserError, match=rf"cannot resume .*{reason}") as caught:
            checkpoint.resumed_config(tmp_path, {})
        assert "\n" not in str(caught.value)
    checkpoint.save(tmp_path / "last.pth", {"config": asdict(TINY)})
    assert checkpoint.resumed_config(tmp_path, {"threads": 2}) == Config(**asdict(TINY) | {"threads": 2})
    with pytest.raises(UserError, match="does not fit the code"):
        checkpoint.restore(tmp_path, {"model": nn.Linear(1, 1)})
