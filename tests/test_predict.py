"""Predictions for images of every kind: read as they are meant, or refused in one line."""

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

from data import normalise, synthetic
from tests.helpers import write_checkpoint
from tools import predict
from tools.labels import class_names

WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.fixture
def sample() -> Image.Image:
    """96x64 RGB: two synthetic images side by side, enlarged; of 64 to 191, as resampling overshoots at edges."""
    images = 64 + synthetic(1, seed=1)[0][[37, 82]].permute(0, 2, 3, 1).numpy() // 2
    return Image.fromarray(np.concatenate(list(images), 1)).resize((96, 64), Image.Resampling.BICUBIC)


def pixels(path: Path) -> np.ndarray:
    """What the model gets of an image file, (32, 32, 3)."""
    images = predict.read(path)
    assert (images.shape, images.dtype) == ((1, 3, 32, 32), torch.uint8)
    return images[0].permute(1, 2, 0).numpy()


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def difference(one: np.ndarray, other: Any) -> float:
    return float(np.abs(one.astype(float) - np.asarray(other, dtype=float)).max())


def test_a_32x32_image_gets_the_models_own_probabilities(model: nn.Module, tmp_path: Path, capsys) -> None:
    source = write_checkpoint(tmp_path / "any.pth", model)
    images = synthetic(1, seed=3)[0][60:61]
    path = saved(Image.fromarray(images[0].permute(1, 2, 0).numpy()), tmp_path / "small.png")
    assert torch.equal(predict.read(path), images)
    assert predict.main([str(path), "--checkpoint", str(source), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    with torch.inference_mode():
        top = model(normalise(images)).softmax(1)[0].topk(5)
    assert [row["probability"] for row in result["images"][0]["top"]] == top.values.tolist()
    names = [class_names("synthetic")[label] for label in top.indices.tolist()]
    assert [row["name"] for row in result["images"][0]["top"]] == names
    assert (result["checkpoint"], result["experiment"], result["date"]) == (str(source), "default", "2026-01-01")


def test_program_prints_five_classes_an_image_and_errors_on_stderr(
    model: nn.Module, sample: Image.Image, tmp_path: Path, capsys
) -> None:
    source = write_checkpoint(tmp_path / "any.pth", model, "cifar100")
    path = saved(sample, tmp_path / "cat.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    argv = [str(tmp_path / "none.png"), str(path), str(tmp_path / "text.jpg"), str(path), "--checkpoint", str(source)]
    assert predict.main(argv) == 1
    output = capsys.readouterr()
    first, *rest = output.out.splitlines()
    assert str(source) in first and "default" in first and "2026-01-01" in first
    assert len(rest) == 12 and rest[:6] == rest[6:] and rest[0] == str(path)
    percents = [float(line.split(" %  ")[0]) for line in rest[1:6]]
    assert percents == sorted(percents, reverse=True) and percents[0] > 0
    assert {line.split(" %  ")[1] for line in rest[1:6]} <= {name.replace("_", " ") for name in class_names("cifar100")}
    missing, text = output.err.splitlines()
    assert "none.png: No such file" in missing and "text.jpg: not an image" in text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, model: nn.Module, sample: Image.Image, tmp_path: Path) -> None:
    """Turned by hand as a camera stores it: the same pixels as upright, bit for bit, so the same top 5."""
    upright = np.asarray(sample)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = saved(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "turned.png", exif=exif)
    straight = saved(sample, tmp_path / "straight.png")
    assert np.array_equal(pixels(turned), pixels(straight))
    names = class_names("cifar100")
    assert predict.predict(model, names, turned) == predict.predict(model, names, straight)


def test_images_are_cropped_to_the_centre_and_antialiased(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100), RED)
    wide.paste(WHITE, (100, 0, 200, 100))
    for name, image in {"wide": wide, "high": wide.rotate(90, expand=True)}.items():
        result = pixels(saved(image, tmp_path / f"{name}.png"))
        assert difference(result[2:-2, 2:-2], WHITE) <= 1
        assert difference(result, WHITE) < 20  # the filter reaches a little over the edge of the square
    checks = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8))
    assert difference(pixels(saved(checks, tmp_path / "checks.png")), 127.5) < 2


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled(suffix: str, sample: Image.Image, tmp_path: Path) -> None:
    grey = np.asarray(sample.convert("L"))
    deep = saved(Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / f"deep.{suffix}")
    with Image.open(deep) as image:
        assert image.mode[0] == "I"
    result = pixels(deep)
    assert result.std() > 20
    assert difference(result, pixels(saved(sample.convert("L"), tmp_path / "grey.png"))) <= 2


@pytest.mark.parametrize("top", [1, 255])
def test_floats_are_scaled(top: int, sample: Image.Image, tmp_path: Path) -> None:
    """Also where shrinking overshoots at bright edges, and with a pixel that is no number."""
    image = Image.fromarray(np.full((40, 40), 0.6 * top, dtype=np.float32))
    assert difference(pixels(saved(image, tmp_path / "float.tif")), 153) == 0
    grey = np.asarray(sample.convert("L")).copy()
    grey[:, 44:] = grey[:, 44:] // 128 * 255
    values = (grey / np.float32(255 / top)).astype(np.float32)
    values[5, 20], values[6, 70], grey[5, 20], grey[6, 70] = np.nan, np.inf, 0, 0
    plain = pixels(saved(Image.fromarray(grey), tmp_path / "plain.png"))
    result = pixels(saved(Image.fromarray(values), tmp_path / "float.tif"))
    assert difference(result, plain) < 25  # of 8 bits PIL clips what overshoots after each axis
    assert result.mean() == pytest.approx(plain.mean(), abs=1)


def test_transparency_becomes_white(sample: Image.Image, tmp_path: Path) -> None:
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
    mixed = sample.copy()
    mixed.putalpha(Image.linear_gradient("L").resize(sample.size))
    white = Image.alpha_composite(Image.new("RGBA", sample.size, "white"), mixed).convert("RGB")
    one, other = saved(mixed, tmp_path / "mixed.png"), saved(white, tmp_path / "white.png")
    assert difference(pixels(one), pixels(other)) <= 3


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("CMYK", "tif")])
def test_other_modes_look_the_same(mode: str, suffix: str, sample: Image.Image, tmp_path: Path) -> None:
    path = saved(sample.convert(mode), tmp_path / f"other.{suffix}")
    plain = pixels(saved(sample.convert(mode).convert("RGB"), tmp_path / "plain.png"))
    assert difference(pixels(path), plain) <= (30 if suffix == "jpg" else 1)


def test_lab_is_converted(tmp_path: Path) -> None:
    """Lightness 53 %, a* 80 and b* 67 (PIL adds 128) are red."""
    image = Image.merge("LAB", [Image.new("L", (40, 40), value) for value in (136, 128 + 80, 128 + 67)])
    assert difference(pixels(saved(image, tmp_path / "lab.tif")), RED) < 16


def test_the_first_frame_of_an_animation_is_used(sample: Image.Image, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, WHITE)]
    path = saved(frames[0], tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert difference(pixels(path), RED) == 0


def test_any_size_is_read(tmp_path: Path) -> None:
    for size in ((1, 1), (1, 3000), (3000, 1), (31, 33)):
        assert difference(pixels(saved(Image.new("RGB", size, RED), tmp_path / "any.png")), RED) == 0


def test_very_large_jpegs_are_read_and_other_files_refused(tmp_path: Path) -> None:
    """A JPEG is decoded at an eighth; what must be decoded whole is refused past PIL's limit."""
    large = Image.new("L", (10_000, 10_000), 200)
    assert difference(pixels(saved(large, tmp_path / "large.jpg")), 200) <= 1
    path = saved(large, tmp_path / "large.png", compress_level=1)
    with pytest.raises(predict.ImageError, match=r"large\.png: too large, more than [\d,]+ pixels"):
        predict.read(path)


def test_a_decompression_bomb_is_refused(monkeypatch, tmp_path: Path) -> None:
    path = saved(Image.new("L", (100, 100)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL itself refuses twice as many
    with pytest.raises(predict.ImageError, match=r"bomb\.png: too large, more than 1,000 pixels"):
        predict.read(path)


def test_damaged_files_are_refused_in_one_line(sample: Image.Image, tmp_path: Path) -> None:
    whole = {}
    for suffix in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
        buffer = io.BytesIO()
        sample.save(buffer, suffix)
        whole[suffix] = buffer.getvalue()
    paths = {tmp_path: "directory", tmp_path / "none.png": "No such file"}
    for suffix, content in whole.items():
        for part in (0.02, 0.5, 0.9):
            path = tmp_path / f"cut{part}.{suffix}"
            path.write_bytes(content[: int(part * len(content))])
            paths[path] = ""
    (tmp_path / "empty.png").write_bytes(b"")
    paths[tmp_path / "empty.png"] = "not an image"
    for path, text in paths.items():
        with pytest.raises(predict.ImageError) as caught:
            predict.read(path)
        assert str(caught.value).startswith(f"{path}: ") and text in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) > len(f"{path}: ") + 5


def test_a_file_without_permission_is_refused(sample: Image.Image, tmp_path: Path, monkeypatch) -> None:
    path = saved(sample, tmp_path / "closed.png")
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def refuse(*arguments: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(predict.ImageError, match=r"closed\.png: Permission denied"):
        predict.read(path)


def test_a_stored_temperature_divides_the_logits(model: nn.Module, tmp_path: Path, capsys) -> None:
    """The classes and their order stay; without one, or with 1, everything else stays too."""
    images = synthetic(1, seed=3)[0][60:61]
    path = saved(Image.fromarray(images[0].permute(1, 2, 0).numpy()), tmp_path / "small.png")

    def result(**more: float | None) -> dict[str, Any]:
        source = write_checkpoint(tmp_path / "any.pth", model, **more)
        assert predict.main([str(path), "--checkpoint", str(source), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    plain, scaled, one = result(), result(temperature=2.5), result(temperature=1.0)
    with torch.inference_mode():
        logits = model(normalise(images))[0]
    ((before,), (after,)) = ([image["top"] for image in found["images"]] for found in (plain, scaled))
    assert [row["name"] for row in after] == [row["name"] for row in before]
    assert [row["probability"] for row in before] == logits.softmax(0).topk(5).values.tolist()
    assert [row["probability"] for row in after] == (logits / 2.5).softmax(0).topk(5).values.tolist()
    assert scaled["temperature"] == 2.5 and "temperature" not in plain
    assert one == plain | {"temperature": 1.0} and result(temperature=None) == plain


def test_a_wrong_stored_temperature_is_one_line(model: nn.Module, tmp_path: Path, capsys) -> None:
    for value in (0.0, -2.0, float("nan"), float("inf")):
        source = write_checkpoint(tmp_path / "any.pth", model, temperature=value)
        assert predict.main(["any.png", "--checkpoint", str(source)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tools.predict: error: {source} holds a temperature that is no number")


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys) -> None:
    assert predict.main(["any.png", "--checkpoint", str(tmp_path / "none.pth")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.pth" in line
