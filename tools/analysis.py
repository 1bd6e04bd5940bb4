"""What a checkpoint gets right, gets wrong and costs, in numbers; tools/report.py shows them."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import thop
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import evaluate
from config import Config, describe
from model import MobileNetV3
from tools import calibrate
from tools.costs import latency_section
from tools.labels import class_names, human, superclasses

BINS = 15  # of confidence, as in Guo et al., "On Calibration of Modern Neural Networks", 2017


class Mistake(NamedTuple):
    """A misclassified image, uint8 (3, 32, 32), its class, the predicted class, and that one's probability."""

    image: Tensor
    true: str
    predicted: str
    probability: float


class Stage(NamedTuple):
    """A part of the model: output shape for one 3x32x32 image, parameters, bytes with buffers, thop operations."""

    name: str
    output: str
    parameters: int
    bytes: int
    operations: int


class Calibration(NamedTuple):
    """How far the confidences can be trusted: expected calibration error, what it was summed from, and the loss."""

    error: float
    bins: Tensor  # (3, BINS): images, correct images and summed confidence
    loss: float  # mean cross-entropy


@dataclass(frozen=True)
class Results:
    """What the page shows. All fractions are from 0 to 1."""

    source: str  # which checkpoint, and on which images
    model: str  # its name in the settings
    dataset: str
    images: int
    top1: int  # correct images
    top5: int
    plain: Calibration  # of the logits as they are
    temperature: float | None
    temperature_source: str  # where it is from, or why there is none
    scaled: Calibration | None  # of the logits divided by the temperature
    superclasses: list[tuple[str, float, float]]  # fraction with the right class, and with the right superclass; rising
    classes: list[tuple[str, float]]  # fraction that is correct; rising
    mistakes: list[Mistake]  # most confident first
    operations: int
    size_kb: float
    stages: list[Stage]
    latency: dict[str, list[list[str]]]  # title and cells; empty where not measured on this checkpoint


def wilson(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a fraction, in percent; 95 % at the default z (Wilson, 1927)."""
    centre, spread = correct + z * z / 2, z * (correct * (count - correct) / count + z * z / 4) ** 0.5
    return 100 * (centre - spread) / (count + z * z), 100 * (centre + spread) / (count + z * z)


def calibration(confidence: Tensor, correct: Tensor, bins: int = BINS) -> tuple[float, Tensor]:
    """Expected calibration error (Guo et al., 2017) of predictions (N,).

    Also each bin's images, correct images and summed confidence, (3, bins). Bin m holds confidences above m / bins,
    up to (m + 1) / bins.
    """
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.stack([index.bincount(weight, bins) for weight in (torch.ones_like(correct), correct, confidence)])
    return ((sums[1] - sums[2]).abs().sum() / len(index)).item(), sums


def calibrated(logits: Tensor, labels: Tensor) -> Calibration:
    """The calibration of float64 logits (N, C) for labels (N,)."""
    confidence, predicted = logits.softmax(1).max(1)
    error, bins = calibration(confidence, (predicted == labels).double())
    return Calibration(error, bins, F.cross_entropy(logits, labels).item())


def stages(model: nn.Module) -> list[Stage]:
    """Our network's stages from input to output; another network is one stage."""
    parts = {"network": model}
    if isinstance(model, MobileNetV3):
        parts = {"stem": model.stem} | {f"block {i}": block for i, block in enumerate(model.blocks, start=1)}
        parts |= {"head": model.head, "classifier": nn.Sequential(model.pool, nn.Flatten(), model.classifier)}
    rows, x = [], torch.zeros(1, 3, data.SIDE, data.SIDE)
    for name, part in parts.items():
        operations, parameters = thop.profile(copy.deepcopy(part), (x,), verbose=False)
        x = part(x).detach()
        shape = "x".join(map(str, x.shape[1:]))
        rows.append(Stage(name, shape, int(parameters), evaluate.model_bytes(part), int(operations)))
    return rows


def analyse(path: Path, data_dir: str = Config.data_dir) -> Results:
    """Grade a checkpoint on its data set's test images. Raises UserError."""
    model, content = evaluate.load_model(path)
    config, dataset = Config(**content["config"]), content["config"]["dataset"]
    images, labels = data.load_test(dataset, data_dir)
    logits = evaluate.predict_logits(model, images).double()
    top = logits.softmax(1).topk(5)
    confidence, predicted = top.values[:, 0], top.indices[:, 0]
    correct = predicted == labels
    temperature, temperature_source = calibrate.find(model, content, path, data_dir)

    names, groups = class_names(dataset), superclasses(dataset)
    group_of = torch.tensor([i for name in names for i, members in enumerate(groups.values()) if name in members])
    same_group = group_of[labels] == group_of[predicted]

    def fraction(values: Tensor, where: Tensor) -> float:
        return values[where].double().mean().item()

    members = {human(name): group_of[labels] == i for i, name in enumerate(groups)}
    supers = [(name, fraction(correct, where), fraction(same_group, where)) for name, where in members.items()]
    classes = [(human(name), fraction(correct, labels == i)) for i, name in enumerate(names)]
    wrong = [i for i in confidence.argsort(descending=True).tolist() if not correct[i]]
    operations, size_kb = evaluate.count_cost(model)
    return Results(
        source=f"Checkpoint {path}, trained as {describe(config)}; epoch {content['epoch']}, "
        f"written {content['date']}, graded on {len(labels)} {dataset} test images",
        model=config.model,
        dataset=dataset,
        images=len(labels),
        top1=int(correct.sum()),
        top5=int((top.indices == labels[:, None]).sum()),
        plain=calibrated(logits, labels),
        temperature=temperature,
        temperature_source=temperature_source,
        scaled=None if temperature is None else calibrated(logits / temperature, labels),
        superclasses=sorted(supers, key=lambda row: row[1]),
        classes=sorted(classes, key=lambda row: row[1]),
        mistakes=[
            Mistake(images[i], human(names[labels[i]]), human(names[predicted[i]]), confidence[i].item()) for i in wrong
        ],
        operations=operations,
        size_kb=size_kb,
        stages=stages(model),
        latency=latency_section(path),
    )
