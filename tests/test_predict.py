"""Predictions: images of every kind are read as they are meant, or refused in one line."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data import normalise
from tools import predict
from tools.labels import NAMES, SUPERCLASSES

WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.fixture
def photo(images: Tensor) -> Image.Image:
    """96x64 RGB with sides, colours and orientation of its own; 64 to 191, as resampling overshoots at edges."""
    pair = 64 + images[[37, 82]].permute(0, 2, 3, 1).numpy() // 2
    return Image.fromarray(np.concatenate(list(pair), 1)).resize((96, 64), Image.Resampling.BICUBIC)


def pixels(path: Path) -> np.ndarray:
    """What the model gets of an image file, (32, 32, 3)."""
    read = predict.read(path)
    assert (read.shape, read.dtype) == ((1, 3, 32, 32), torch.uint8)
    return read[0].permute(1, 2, 0).numpy()


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def difference(one: np.ndarray, other: Any) -> float:
    return float(np.abs(one.astype(float) - np.asarray(other, dtype=float)).max())


def test_labels_are_in_the_official_order() -> None:
    assert zlib.crc32(repr(SUPERCLASSES).encode()) == 1_199_936_594
    some = ["apple", "aquarium_fish", "maple_tree", "pickup_truck", "worm"]
    assert [NAMES[label] for label in (0, 1, 47, 58, 99)] == some


def test_probabilities_are_the_models_own(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """Of a 32x32 image, which is not resampled: with red and blue swapped they would be others."""
    image = images[60:61]
    path = saved(Image.fromarray(image[0].permute(1, 2, 0).numpy()), tmp_path / "small.png")
    assert torch.equal(predict.read(path), image)
    with torch.inference_mode():
        top, swapped = (model(normalise(x)).softmax(1)[0].topk(5) for x in (image, image.flip(1)))
    names = [NAMES[label] for label in top.indices.tolist()]
    assert predict.top5(model, image) == list(zip(names, top.values.tolist(), strict=True))
    assert not torch.allclose(top.values, swapped.values, atol=0.02)


def test_five_classes_per_image_and_a_line_per_error(
    model: nn.Module, photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A bare state dict is a model for CIFAR-100, of which nothing else is known."""
    torch.save(model.state_dict(), source := tmp_path / "bare.pth")
    path = saved(photo, tmp_path / "cat.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    names = [str(tmp_path / "none.png"), str(path), str(tmp_path / "text.jpg"), str(path)]
    assert predict.main([*names, "--checkpoint", str(source)]) == 1
    output = capsys.readouterr()
    first, *rest = output.out.splitlines()
    assert "bare.pth (experiment unknown, date unknown" in first
    assert len(rest) == 12 and rest[:6] == rest[6:] and rest[0] == str(path)
    percents = [float(line.split(" %  ")[0]) for line in rest[1:6]]
    assert percents == sorted(percents, reverse=True) and percents[0] > 0
    assert {line.split(" %  ")[1] for line in rest[1:6]} <= set(NAMES)
    missing, text = output.err.splitlines()
    assert "none.png: No such file" in missing and "text.jpg: cannot identify image file" in text
    assert predict.main([str(path), "--checkpoint", str(source)]) == 0


def test_exif_orientation_is_applied(photo: Image.Image, tmp_path: Path) -> None:
    """Of a camera held upright, which stores its rows as columns: the same pixels, bit for bit."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(photo.transpose(Image.Transpose.ROTATE_90), tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(turned), pixels(saved(photo, tmp_path / "straight.png")))


def test_images_are_cropped_to_the_centre_and_antialiased(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100), RED)
    wide.paste(WHITE, (100, 0, 200, 100))
    for name, image in {"wide": wide, "high": wide.rotate(90, expand=True)}.items():
        assert difference(pixels(saved(image, tmp_path / f"{name}.png")), WHITE) < 20
    checks = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8))
    assert difference(pixels(saved(checks, tmp_path / "checks.png")), 127.5) < 2


def test_transparency_becomes_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (50, 50), (*RED, 128))
    assert difference(pixels(saved(half, tmp_path / "half.png")), (255, 127, 127)) <= 1
    grey = Image.new("LA", (50, 50), (0, 64))
    assert difference(pixels(saved(grey, tmp_path / "grey.png")), 191) <= 1
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(1, (0, 0, 32, 64))
    result = pixels(saved(palette, tmp_path / "palette.png", transparency=0))  # red beside transparent blue
    assert difference(result[:, :12], RED) <= 1 and difference(result[:, 20:], WHITE) <= 1


def test_files_that_cannot_be_read_are_a_line_each(
    source: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A folder, an empty file, 16 bits per channel, half a file, a decompression bomb."""
    paths = [tmp_path / name for name in ("folder", "empty.png", "deep.png", "half.jpg", "whole.jpg")]
    paths[0].mkdir()
    paths[1].touch()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(paths[2])
    content = saved(photo, paths[3]).read_bytes()
    paths[3].write_bytes(content[: len(content) // 2])
    saved(photo.resize((192, 128)), paths[4])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7_000)
    assert predict.main([*map(str, paths), "--checkpoint", str(source)]) == 1
    lines = capsys.readouterr().err.splitlines()
    for path, line in zip(paths, lines, strict=True):
        start = f"tools.predict: error: {path}: "
        assert line.startswith(start) and len(line) > len(start) + 5
    assert "8 bits" in lines[2] and "truncated" in lines[3] and "exceeds limit" in lines[4]
