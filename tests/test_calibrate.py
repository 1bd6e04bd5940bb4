"""Temperature scaling: what the fit finds and on which images, and that the class never changes by it."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import evaluate
from config import Config
from data import synthetic
from tools import calibrate
from tools.analysis import calibration
from tools.predict import open_checkpoint, probabilities
from utils import UserError


def sample(factor: float = 1.0, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Logits (count, 100), float64, and labels that are drawn from their softmax; then the logits times `factor`."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, 100, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return factor * logits, labels


def nll(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    return F.cross_entropy(logits / temperature, labels).item()


@pytest.mark.parametrize("factor", [0.1, 0.6, 1.0, 2.5, 20.0])
def test_fit_recovers_a_known_temperature(factor: float) -> None:
    """Labels from the softmax itself need a temperature of 1; logits times a factor need that factor."""
    logits, labels = sample(factor)
    temperature = calibrate.fit(logits.float(), labels)
    assert temperature == pytest.approx(factor, rel=0.02)  # as exact as 4,000 labels can say
    assert temperature == pytest.approx(factor * calibrate.fit(*sample()), rel=1e-5)


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_fit_lowers_nll_and_calibration_error(factor: float) -> None:
    logits, labels = sample(factor)
    temperature = calibrate.fit(logits, labels)
    assert nll(logits, labels, temperature) < nll(logits, labels) - 0.1

    def error(values: Tensor) -> float:
        confidence, predicted = values.softmax(1).max(1)
        return calibration(confidence, (predicted == labels).double())[0]

    assert error(logits / temperature) < 0.03 < 0.1 < error(logits)


def test_fit_finds_the_minimum_of_a_grid() -> None:
    """Independent of the optimizer; with labels that no temperature explains."""
    logits, labels = sample(5.0, count=500)
    labels[::5] = torch.arange(100)
    grid = torch.linspace(math.log(0.1), math.log(50), 2001).exp().tolist()
    best = min(grid, key=lambda temperature: nll(logits, labels, temperature))
    temperature = calibrate.fit(logits, labels)
    assert temperature == pytest.approx(best, rel=4e-3)
    assert nll(logits, labels, temperature) <= nll(logits, labels, best)


def test_fit_without_a_minimum_ends_in_its_range() -> None:
    """Every prediction right, every one wrong, equal logits: a number of the range that does not raise the NLL."""
    labels = torch.arange(100)
    right = F.one_hot(labels, 100)
    for logits in (right, 30 * right, -right, -1e4 * right, 0 * right, 1e4 * right):
        temperature = calibrate.fit(logits.float(), labels)
        assert calibrate.LOWEST <= temperature <= calibrate.HIGHEST
        assert nll(logits.double(), labels, temperature) <= nll(logits.double(), labels)
    with pytest.raises(UserError, match="not finite"):
        calibrate.fit(right * math.nan, labels)


@pytest.mark.parametrize("temperature", [calibrate.LOWEST, 0.37, 0.9, 1.7, calibrate.HIGHEST])
def test_top1_does_not_change(temperature: float, model: nn.Module) -> None:
    """Nor the order of all classes, of the logits."""
    images = synthetic(1, seed=7)[0]
    networks = model, calibrate.Scaled(model, temperature)
    plain, scaled = (evaluate.predict_logits(network, images) for network in networks)
    assert torch.equal(scaled.argmax(1), plain.argmax(1))
    assert torch.equal(scaled.gather(1, plain.argsort(1)).sort(1).values, scaled.gather(1, plain.argsort(1)))
    assert not torch.equal(scaled, plain)


def test_fit_reads_the_runs_validation_images_alone(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("test images were read")

    seen, reads, load, logits = [], [], data.load, evaluate.predict_logits

    def watched(dataset: str, data_dir: str, source: str, per_class: int = 0) -> data.Images:
        reads.append(source)
        return load(dataset, data_dir, source, per_class)

    monkeypatch.setattr(data, "load", watched)
    monkeypatch.setattr(data, "load_test", refuse)
    monkeypatch.setattr(evaluate, "load_test", refuse)
    monkeypatch.setattr(evaluate, "predict_logits", lambda model, images: seen.append(images) or logits(model, images))
    config = Config(dataset="synthetic", validation_per_class=2, images_per_class=5)
    temperature = calibrate.fit_on_validation(model, config, "nowhere")
    validation = data.load_training("synthetic", "nowhere", 2, 5)[1]
    assert len(seen) == 1 and torch.equal(seen[0], validation.images) and reads == ["train", "train"]
    outputs = logits(model, validation.images)
    assert temperature == pytest.approx(calibrate.fit(outputs, validation.labels))
    assert nll(outputs.double(), validation.labels, temperature) < nll(outputs.double(), validation.labels)


def test_without_validation_images_nothing_is_fitted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda *arguments: pytest.fail("images were read"))
    config = Config(dataset="synthetic", validation_per_class=0)
    assert calibrate.fit_on_validation(model, config, "nowhere") is None
    content, path = {"config": {"dataset": "synthetic", "validation_per_class": 0}}, Path("any.pth")
    temperature, why = calibrate.find(model, content, path, "nowhere")
    assert temperature is None and "kept no validation images" in why
    found = calibrate.find(model, content | {"temperature": 0.8}, path, "nowhere")
    assert found == (0.8, "stored in the checkpoint")


WRONG = [0.0, -1.0, 0, math.nan, math.inf, -math.inf, 1e-45, 1e300, 10**400, True, "1.0", [1.0], torch.ones(2, 2)]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_a_wrong_stored_temperature_is_refused(value: object) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"any\.pth holds a temperature that is no number") as caught:
        calibrate.stored({"temperature": value}, Path("any.pth"))
    assert "\n" not in str(caught.value)


def test_a_stored_temperature_is_read() -> None:
    assert calibrate.stored({}, Path("any.pth")) is None
    assert calibrate.stored({"temperature": None}, Path("any.pth")) is None
    assert calibrate.stored({"temperature": 2}, Path("any.pth")) == 2.0


def test_the_published_checkpoint_can_be_used() -> None:
    """It stores no temperature, or one in the range; its classes are those of the undivided logits."""
    plain, content = evaluate.load_model(checkpoint.PUBLISHED)
    model, about, _ = open_checkpoint(checkpoint.PUBLISHED)
    assert about.get("temperature") == content.get("temperature")
    images = synthetic(1, seed=7)[0]
    assert torch.equal(probabilities(model, images).argmax(1), probabilities(plain, images).argmax(1))
