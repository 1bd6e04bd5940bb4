"""Predictions for pictures of every kind: read as they are meant, or refused in one line."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import checkpoint
import data
from augment import normalise
from tools import predict
from tools.labels import class_names

WHITE, RED = (255, 255, 255), (255, 0, 0)


def write_checkpoint(path: Path, network: nn.Module, dataset: str = "synthetic", **more: Any) -> Path:
    """A checkpoint with random weights, whose classifier is scaled so that its probabilities differ."""
    network.classifier.weight.data.mul_(30)
    config = {"dataset": dataset, "experiment": "default"}
    content = {"config": config, "date": "2026-01-01", "epoch": 1, "weights": network.state_dict()}
    checkpoint.save(path, content | more)
    return path


@pytest.fixture
def picture() -> Image.Image:
    """96x64 RGB: two synthetic images beside each other, enlarged."""
    images = data.synthetic(1, seed=1)[0][[37, 82]].permute(0, 2, 3, 1).numpy()
    return Image.fromarray(np.concatenate(list(images), 1)).resize((96, 64), Image.Resampling.BICUBIC)


def pixels(path: Path) -> np.ndarray:
    """What the network gets of a picture, (32, 32, 3)."""
    images = predict.read(path)
    assert (images.shape, images.dtype) == ((1, 3, 32, 32), torch.uint8)
    return images[0].permute(1, 2, 0).numpy()


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def difference(one: np.ndarray, other: Any) -> float:
    return float(np.abs(one.astype(float) - np.asarray(other, dtype=float)).max())


def test_a_32x32_picture_gets_the_networks_own_probabilities(network: nn.Module, tmp_path: Path, capsys) -> None:
    source = write_checkpoint(tmp_path / "any.pth", network)
    images = data.synthetic(1, seed=3)[0][60:61]
    path = saved(Image.fromarray(images[0].permute(1, 2, 0).numpy()), tmp_path / "small.png")
    assert torch.equal(predict.read(path), images)
    assert predict.main([str(path), "--checkpoint", str(source), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    with torch.inference_mode():
        top = network(normalise(images)).softmax(1)[0].topk(5)
    assert [row["probability"] for row in result["pictures"][0]["top"]] == top.values.tolist()
    names = [class_names("synthetic")[label] for label in top.indices.tolist()]
    assert [row["name"] for row in result["pictures"][0]["top"]] == names
    assert (result["checkpoint"], result["experiment"], result["date"]) == (str(source), "default", "2026-01-01")


def test_what_the_program_prints(network: nn.Module, picture: Image.Image, tmp_path: Path, capsys) -> None:
    source = write_checkpoint(tmp_path / "any.pth", network, "cifar100")
    path = saved(picture, tmp_path / "cat.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    argv = [str(tmp_path / "none.png"), str(path), str(tmp_path / "text.jpg"), str(path), "--checkpoint", str(source)]
    assert predict.main(argv) == 1
    output = capsys.readouterr()
    first, *rest = output.out.splitlines()
    assert str(source) in first and "default" in first and "2026-01-01" in first
    assert len(rest) == 12 and rest[:6] == rest[6:] and rest[0] == str(path)
    shares = [float(line.split(" %  ")[0]) for line in rest[1:6]]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0
    assert {line.split(" %  ")[1] for line in rest[1:6]} <= {name.replace("_", " ") for name in class_names("cifar100")}
    missing, text = output.err.splitlines()
    assert "none.png: No such file" in missing and "text.jpg: not a picture" in text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, network: nn.Module, picture: Image.Image, tmp_path: Path) -> None:
    """Turned by hand as a camera stores it: the same picture as upright, bit for bit, so the same top 5."""
    upright = np.asarray(picture)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "turned.png", exif=exif)
    straight = saved(picture, tmp_path / "straight.png")
    assert np.array_equal(pixels(turned), pixels(straight))
    names = class_names("cifar100")
    assert predict.predict(network, names, turned) == predict.predict(network, names, straight)


def test_centre_crop_and_antialiasing(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100), RED)
    wide.paste(WHITE, (100, 0, 200, 100))
    for name, image in {"wide": wide, "high": wide.rotate(90, expand=True)}.items():
        result = pixels(saved(image, tmp_path / f"{name}.png"))
        assert difference(result[2:-2, 2:-2], WHITE) <= 1
        assert difference(result, WHITE) < 20  # the filter reaches a little over the edge of the square
    checks = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8))
    assert difference(pixels(saved(checks, tmp_path / "checks.png")), 127.5) < 2


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled(suffix: str, picture: Image.Image, tmp_path: Path) -> None:
    grey = np.asarray(picture.convert("L"))
    deep = saved(Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / f"deep.{suffix}")
    with Image.open(deep) as image:
        assert image.mode[0] == "I"
    result = pixels(deep)
    assert result.std() > 20
    assert difference(result, pixels(saved(picture.convert("L"), tmp_path / "grey.png"))) <= 2


@pytest.mark.parametrize("top", [1, 255])
def test_floats_are_scaled(top: int, picture: Image.Image, tmp_path: Path) -> None:
    """Also where shrinking overshoots at bright edges, and with a pixel that is no number."""
    image = Image.fromarray(np.full((40, 40), 0.6 * top, dtype=np.float32))
    assert difference(pixels(saved(image, tmp_path / "float.tif")), 153) == 0
    grey = np.asarray(picture.convert("L")).copy()
    grey[:, 44:] = grey[:, 44:] // 128 * 255
    values = (grey / np.float32(255 / top)).astype(np.float32)
    values[5, 20], values[6, 70], grey[5, 20], grey[6, 70] = np.nan, np.inf, 0, 0
    plain = pixels(saved(Image.fromarray(grey), tmp_path / "plain.png"))
    result = pixels(saved(Image.fromarray(values), tmp_path / "float.tif"))
    assert difference(result, plain) < 25  # of 8 bits PIL clips what overshoots after each axis
    assert result.mean() == pytest.approx(plain.mean(), abs=1)


def test_transparency_is_white(picture: Image.Image, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (50, 50), (*RED, 0))
    assert difference(pixels(saved(clear, tmp_path / "clear.png")), WHITE) == 0
    half = Image.new("RGBA", (50, 50), (*RED, 128))
    assert difference(pixels(saved(half, tmp_path / "half.png")), (255, 127, 127)) <= 1
    grey = Image.new("LA", (50, 50), (0, 64))
    assert difference(pixels(saved(grey, tmp_path / "grey.png")), 191) <= 1
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(1, (0, 0, 32, 64))
    path = saved(palette, tmp_path / "palette.png", transparency=0)
    result = pixels(path)  # red beside transparent blue
    assert difference(result[:, :12], RED) <= 1 and difference(result[:, 20:], WHITE) <= 1
    assert result[..., 2].astype(int).sum() == pytest.approx(result[..., 1].astype(int).sum())  # no blue fringe
    mixed = picture.copy()
    mixed.putalpha(Image.linear_gradient("L").resize(picture.size))
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), mixed).convert("RGB")
    one, other = saved(mixed, tmp_path / "mixed.png"), saved(white, tmp_path / "white.png")
    assert difference(pixels(one), pixels(other)) <= 3


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("CMYK", "tif")])
def test_other_modes_look_the_same(mode: str, suffix: str, picture: Image.Image, tmp_path: Path) -> None:
    path = saved(picture.convert(mode), tmp_path / f"other.{suffix}")
    plain = pixels(saved(picture.convert(mode).convert("RGB"), tmp_path / "plain.png"))
    assert difference(pixels(path), plain) <= (30 if suffix == "jpg" else 1)


def test_lab(tmp_path: Path) -> None:
    """Lightness 53 %, a* 80 and b* 67 (PIL adds 128) are red."""
    image = Image.merge("LAB", [Image.new("L", (40, 40), value) for value in (136, 128 + 80, 128 + 67)])
    assert difference(pixels(saved(image, tmp_path / "lab.tif")), RED) < 16


def test_first_frame_of_an_animation(picture: Image.Image, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, WHITE)]
    path = saved(frames[0], tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert difference(pixels(path), RED) == 0


def test_sizes(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 3000), (3000, 1), (31, 33)):
        assert difference(pixels(saved(Image.new("RGB", size, RED), tmp_path / "any.png")), RED) == 0


def test_very_large_pictures(tmp_path: Path) -> None:
    """A JPEG is decoded at an eighth; what must be decoded whole is refused past PIL's limit."""
    large = Image.new("L", (10_000, 10_000), 200)
    assert difference(pixels(saved(large, tmp_path / "large.jpg")), 200) <= 1
    path = saved(large, tmp_path / "large.png", compress_level=1)
    with pytest.raises(predict.PictureError, match=r"large\.png: too large, more than [\d,]+ pixels"):
        predict.read(path)


def test_a_decompression_bomb_is_refused(monkeypatch, tmp_path: Path) -> None:
    path = saved(Image.new("L", (100, 100)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL itself refuses twice as many
    with pytest.raises(predict.PictureError, match=r"bomb\.png: too large, more than 1,000 pixels"):
        predict.read(path)


def test_what_is_no_whole_picture_is_refused_in_one_line(picture: Image.Image, tmp_path: Path) -> None:
    whole = {}
    for suffix in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
        buffer = io.BytesIO()
        picture.save(buffer, suffix)
        whole[suffix] = buffer.getvalue()
    paths = {tmp_path: "directory", tmp_path / "none.png": "No such file"}
    for suffix, content in whole.items():
        for share in (0.02, 0.5, 0.9):
            path = tmp_path / f"cut{share}.{suffix}"
            path.write_bytes(content[: int(share * len(content))])
            paths[path] = ""
    (tmp_path / "empty.png").write_bytes(b"")
    paths[tmp_path / "empty.png"] = "not a picture"
    for path, text in paths.items():
        with pytest.raises(predict.PictureError) as caught:
            predict.read(path)
        assert str(caught.value).startswith(f"{path}: ") and text in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) > len(f"{path}: ") + 5


def test_no_permission(picture: Image.Image, tmp_path: Path, monkeypatch) -> None:
    path = saved(picture, tmp_path / "closed.png")
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def refuse(*arguments: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(predict.PictureError, match=r"closed\.png: Permission denied"):
        predict.read(path)


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys) -> None:
    assert predict.main(["any.png", "--checkpoint", str(tmp_path / "none.pth")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.pth" in line
