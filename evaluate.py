"""Grade a checkpoint: multiply-adds, size, and accuracy on the official test set."""

import argparse
import copy
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from config import Config, OneLineParser, add_data_dir
from data import SIDE, load_test, normalise
from utils import choose_device, program, shown


class Scores(NamedTuple):
    """Mean cross-entropy, and top-1 and top-5 accuracy in percent."""

    loss: float
    top1: float
    top5: float


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> Scores:
    """Score a model on uint8 images (N, 3, 32, 32) and labels (N,) on its device, as `predict_logits` runs it."""
    logits = predict_logits(model, images)
    loss = F.cross_entropy(logits, labels)
    correct = logits.topk(5).indices == labels[:, None]
    accuracies = 100 * torch.stack([correct[:, 0], correct.any(1)]).float().mean(1)
    return Scores(loss.item(), *accuracies.tolist())


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 100) for uint8 (N, 3, 32, 32) on the model's device: in eval mode, in float32 without TF32."""
    batch_size = 100 if images.device.type == "cpu" else 500  # more would not fit on a GPU if a model enlarges images
    with ExitStack() as undo:
        undo.callback(model.train, model.training)
        model.eval()
        for part in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):  # TF32 on a GPU would round to 10 bits
            undo.callback(setattr, part, "fp32_precision", part.fp32_precision)
            part.fp32_precision = "ieee"
        return torch.cat([model(normalise(batch)) for batch in images.split(batch_size)])


def count_cost(model: nn.Module) -> tuple[int, float]:
    """Multiply-adds as thop counts them for one 3x32x32 image, and kB (1024 bytes) of parameters and buffers.

    thop adds two float64 counters to each module that it has no rule for (33 here, 0.516 kB), and the claimed size
    counts them. It works on a copy, so that they stay off the caller's model.
    """
    import thop  # here, as only grading needs it

    probe = copy.deepcopy(model).cpu().eval()
    operations, _ = thop.profile(probe, (torch.zeros(1, 3, SIDE, SIDE),), verbose=False)
    return int(operations), model_bytes(probe) / 1024


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def default_checkpoint() -> Path:
    """checkpoints/best.pth, which a run leaves, if it is there, otherwise the published one."""
    return checkpoint.BEST if checkpoint.BEST.exists() else checkpoint.PUBLISHED


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flag --checkpoint of a program that opens one."""
    text = "default: best.pth if there, else published.pth [%(default)s]"
    parser.add_argument("--checkpoint", type=Path, default=shown(default_checkpoint()), help=text)


def grade(path: Path, device: str = Config.device, data_dir: str = Config.data_dir) -> dict[str, Any]:
    """Multiply-adds, size and test scores of a checkpoint, with what it is (None if unknown). Raises UserError."""
    where = choose_device(device)
    model, content = checkpoint.load_model(path)
    model.to(where, memory_format=torch.channels_last)
    operations, size_kb = count_cost(model)
    test = load_test(content["config"]["dataset"], data_dir).to(where)
    start = time.perf_counter()
    scores = evaluate(model, *test)
    return {
        "checkpoint": str(shown(path)),
        "experiment": content["config"].get("experiment"),
        "epoch": content.get("epoch"),
        "date": content.get("date"),
        "dataset": content["config"]["dataset"],
        "images": len(test.labels),
        "flops": operations,
        "size_kb": size_kb,
        "accuracy": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "seconds": time.perf_counter() - start,
    }


def format_grade(result: dict[str, Any]) -> str:
    """What was graded, and its scores. The last three lines are the figures that the student's report claims too."""
    known = {name: "unknown" if value is None else value for name, value in result.items()}
    return (
        "Graded {checkpoint} on {images} {dataset} test images\n"
        "Experiment {experiment}, epoch {epoch}, date {date}\n"
        "Top-5 accuracy = {top5:.2f} %, loss = {loss:.4f}, {seconds:.1f} s\n"
        "flops = {flops}\n"
        "Model parameter size = {size_kb:.3f} kB\n"
        "Accuracy = {accuracy:.2f} %"
    ).format(**known)


@program("evaluate.py")
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="evaluate.py", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("--device", default=Config.device, help="auto, cpu, cuda, cuda:N or mps [%(default)s]")
    add_data_dir(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args(argv)
    result = grade(arguments.checkpoint, arguments.device, arguments.data_dir)
    print(json.dumps(result) if arguments.json else format_grade(result))


if __name__ == "__main__":
    sys.exit(main())
