"""Grade a checkpoint: operations, size, and accuracy on the official test set."""

import copy
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or OpenMP's idle threads take the cores from other processes

import thop
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import checkpoint
from config import Config, OneLineParser, describe, restore
from data import SIDE, load_test, normalise
from model import build_model
from utils import choose_device, keep_freed_memory, program, world_size

BATCH_SIZE = 100  # images a forward pass; the figures do not depend on it


class Scores(NamedTuple):
    """Mean cross-entropy, and top-1 and top-5 accuracy in percent."""

    loss: float
    top1: float
    top5: float


class Meter:
    """Mean loss and accuracy of an epoch. The sums stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums, self.count = torch.zeros(2, device=device), 0

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch; of mixed targets (N, 100) the larger part counts as the label."""
        labels = labels if labels.ndim == 1 else labels.argmax(1)
        self.sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        self.count += len(labels)

    def all_reduce(self) -> None:
        """Add the sums of all processes."""
        if world_size() > 1:
            torch.distributed.all_reduce(self.sums)
            self.count *= world_size()

    def compute(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent; waits for the device."""
        loss, accuracy = (self.sums / self.count).tolist()
        return loss, 100 * accuracy


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Score a model on uint8 images (N, 3, 32, 32) and labels (N,) on its device, as `predict_logits` runs it."""
    logits = predict_logits(model, images)
    loss = F.cross_entropy(logits, labels)
    correct = logits.topk(5).indices == labels[:, None]
    accuracies = 100 * torch.stack([correct[:, 0], correct.any(1)]).double().mean(1)
    return Scores(loss.item(), *accuracies.tolist())


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 100) for uint8 (N, 3, 32, 32) on the model's device: in eval mode, in float32 without TF32."""
    model = fuse_batchnorm(model)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([model(normalise(batch)) for batch in images.split(BATCH_SIZE)])


def fuse_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode, each batch normalisation fused into the convolution before it."""
    model = copy.deepcopy(model).eval()
    for layers in model.modules():
        types = [type(layer) for layer in layers][:2] if isinstance(layers, nn.Sequential) else []
        if types == [nn.Conv2d, nn.BatchNorm2d]:  # no subclass: timm's hold an activation
            layers[0], layers[1] = fuse_conv_bn_eval(layers[0], layers[1]), nn.Identity()
    return model


def count_cost(model: nn.Module) -> tuple[int, float]:
    """thop's operations for one 3x32x32 image, and kB (1024 bytes) of parameters and buffers after thop has run.

    thop adds two float64 counters to each module that it has no rule for (33 here, 0.516 kB), and the claimed size
    counts them. It works on a copy, so that they stay off the caller's model.
    """
    probe = copy.deepcopy(model).eval()
    image = torch.zeros(1, 3, SIDE, SIDE, device=next(probe.parameters()).device)
    operations, _ = thop.profile(probe, (image,), verbose=False)
    return int(operations), model_bytes(probe) / 1024


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint in eval mode, and the file's content with all settings. Raises CheckpointError."""
    content = checkpoint.load(path)
    try:
        config = restore(content["config"])
        model = build_model(config.model, image_size=config.image_size)
        model.load_state_dict(content["weights"])
    except ValueError as error:  # it says what is wrong
        raise checkpoint.CheckpointError(f"{path} cannot be used: {error}") from error
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise checkpoint.CheckpointError(
            f"{path} holds no weights of its model, or model.py was changed since. Give another checkpoint; of a run, "
            "its best.pth"
        ) from error
    return model.eval(), content | {"config": asdict(config)}


def default_checkpoint() -> Path:
    """The best of the latest training on this machine where there is one, else the published one."""
    return checkpoint.BEST if checkpoint.BEST.exists() else checkpoint.PUBLISHED


def grade(path: Path, device: str = Config.device, data_dir: str = Config.data_dir) -> dict[str, Any]:
    """Operations, size and test scores of a checkpoint, with what it is. Raises UserError."""
    where = choose_device(device)
    model, content = load_model(path)
    model.to(where, memory_format=torch.channels_last)
    config = Config(**content["config"])
    operations, size_kb = count_cost(model)
    test = load_test(config.dataset, data_dir).to(where)
    start = time.perf_counter()
    scores = evaluate(model, *test)
    return {
        "checkpoint": str(path),
        "settings": describe(config),
        "date": content["date"],
        "epoch": content["epoch"],
        "dataset": config.dataset,
        "images": len(test.labels),
        "flops": operations,
        "size_kb": size_kb,
        "accuracy": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "seconds": time.perf_counter() - start,
    }


def format_grade(result: dict[str, Any]) -> str:
    """What was graded, and its scores. The last three lines are the figures that the report claims too."""
    return (
        "Graded {checkpoint} on {images} {dataset} test images\n"
        "Trained as {settings}; epoch {epoch}, {date}\n"
        "Top-5 accuracy = {top5:.2f} %, loss = {loss:.4f}, {seconds:.1f} s\n"
        "flops = {flops}\n"
        "Model parameter size = {size_kb:.3f} kB\n"
        "Accuracy = {accuracy:.2f} %"
    ).format(**result)


@program("evaluate.py")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="evaluate.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/best.pth if there, else published.pth")
    parser.add_argument("--device", default=Config.device, help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument("--data_dir", default=Config.data_dir, help="folder of the data set [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args(argv)
    try:
        restore({"device": arguments.device, "data_dir": arguments.data_dir})
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    path = arguments.checkpoint or default_checkpoint()
    result = grade(path, arguments.device, arguments.data_dir)
    print(json.dumps(result) if arguments.json else format_grade(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
