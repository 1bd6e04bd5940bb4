"""Other networks: which files they write, how they are fused, trained and graded, and weights to start from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import checkpoint
import evaluate
import model as models
import train
from config import Config
from tests.helpers import write_checkpoint
from utils import UserError

CPU = torch.device("cpu")
TIMM = "tf_efficientnet_lite0"


def test_only_our_network_on_cifar100_updates_best_pth(tiny: Config) -> None:
    real = replace(tiny, dataset="cifar100", images_per_class=0)
    assert real.updates_best
    for other in ({"dataset": "synthetic"}, {"model": TIMM}, {"image_size": 64}):
        assert not replace(real, **other).updates_best


def test_other_networks_are_fused_only_where_that_is_exact() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    torch.manual_seed(0)
    for layers in ([nn.Conv2d(3, 4, 1), Activated(4)], [nn.ReLU(), nn.BatchNorm2d(3)], [nn.Conv2d(3, 4, 1)]):
        other, images = nn.Sequential(*layers).eval(), torch.randn(2, 3, 5, 5)
        assert torch.equal(evaluate.fuse_batchnorm(other)(images), other(images))


def test_any_timm_network_is_trained_graded_and_teaches(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("timm")
    settings = {"epochs": 1, "images_per_class": 4, "batch_size": 32, "optimizer": "adamw", "lr": 1e-3}
    folder = train.train(replace(tiny, **settings, model=TIMM, image_size=40))
    assert evaluate.main(["--checkpoint", str(folder / "best.pth")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] != "flops = 11776320" and lines[-2] != "Model parameter size = 3814.391 kB"
    train.train(replace(tiny, **settings, teacher=str(folder / "best.pth")))


def test_pretrained_weights_are_fetched_by_a_new_run_alone(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    asked, create = [], timm.create_model

    def watched(name: str, pretrained: bool, **options: object) -> nn.Module:
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", watched)
    for resumed in (False, True):
        train.new_model(replace(tiny, model=TIMM, pretrained=True), resumed)
    assert asked == [True, False]


def test_weights_are_matched_by_name_or_by_order(model: nn.Module, tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["classifier.weight"], weights["classifier.bias"] = torch.zeros(10, 960), torch.zeros(10)
    by_order = {f"other.{i}": value for i, value in enumerate(weights.values())}
    for content in (weights, by_order):
        torch.save(content, tmp_path / "weights.pth")
        other = models.MobileNetV3()
        own = other.classifier.weight.clone()
        taken, count = models.load_weights(other, checkpoint.read_weights(tmp_path / "weights.pth"))
        assert (taken, count) == (len(weights) - 2, len(weights))
        assert torch.equal(other.head[0].weight, model.head[0].weight)
        assert torch.equal(other.blocks[4].project[1].running_var, model.blocks[4].project[1].running_var)
        assert torch.equal(other.classifier.weight, own), "a new classifier"
    ours = checkpoint.read_weights(write_checkpoint(tmp_path / "best.pth", model))
    assert models.load_weights(models.MobileNetV3(), ours) == (len(weights), len(weights)), "a run's best.pth"
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert checkpoint.read_weights(tmp_path / "old.pth").keys() == weights.keys(), "torch's older format"
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(weights, tmp_path / "weights.safetensors")  # sorts its tensors: by name only
    found = checkpoint.read_weights(tmp_path / "weights.safetensors")
    assert models.load_weights(models.MobileNetV3(), found)[0] == len(weights) - 2


def test_weights_of_another_model_are_refused(model: nn.Module) -> None:
    weights = model.state_dict()
    headless = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    assert models.load_weights(models.MobileNetV3(), headless) == (len(headless), len(weights))
    counted = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    assert models.load_weights(models.MobileNetV3(), counted) == (len(counted), len(weights))
    for found, reason in (
        ({"classifier.bias": torch.zeros(100)}, r"stem\.0\.weight is missing"),
        (weights | {"stem.0.weight": torch.zeros(8, 3, 3, 3)}, r"stem\.0\.weight is \(8, 3, 3, 3\)"),
        ({"any": torch.zeros(1)}, "there are 1 tensors"),
    ):
        with pytest.raises(ValueError, match=reason):
            models.load_weights(models.MobileNetV3(), found)


def test_a_run_starts_from_weights_and_resumes_without_them(tiny: Config, model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    config = replace(tiny, epochs=1, weights=str(tmp_path / "weights.pth"))
    state = train.TrainState(config, CPU)
    assert all(torch.equal(value, state.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(state.ema.model.head[0].weight, model.head[0].weight)
    folder = train.train(config)
    (tmp_path / "weights.pth").unlink()
    train.train(config, folder)


def test_a_network_that_cannot_be_made_is_one_line(tiny: Config) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="timm cannot make model nosuch for 24 pixels"):
        train.train(replace(tiny, model="nosuch"))
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 for 24 pixels: .*224"):  # it takes no other size
        train.train(replace(tiny, model="vit_tiny_patch16_224"))
    with pytest.raises(UserError, match=r"test_convnext for 24 pixels: .*--small_fraction 0"):  # nor one so small
        train.train(replace(tiny, model="test_convnext", small_fraction=0.5))
    assert not Path(tiny.runs_dir).exists()
