"""Grade a checkpoint: operations, size, and accuracy on the official test set."""

import copy
import csv
import ctypes
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, OneLineParser  # before torch, see there

import thop
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import checkpoint
import data
from augment import normalise
from model import MobileNetV3

BATCH = 100  # images a forward pass; the figures do not depend on it


class DeviceError(Exception):
    """The device asked for is not there."""


class Scores(NamedTuple):
    """Mean cross-entropy, and the shares in percent whose label is the first, is among the first five, guesses."""

    loss: float
    top1: float
    top5: float


def evaluate(network: nn.Module, images: data.Images, batch: int = BATCH) -> Scores:
    """Score a network in eval mode on uint8 images that lie on its device, in float32 without TF32."""
    outputs = logits(network, images.images, batch)
    loss = F.cross_entropy(outputs, images.labels)
    hits = outputs.topk(5).indices == images.labels[:, None]
    shares = 100 * torch.stack([hits[:, 0], hits.any(1)]).double().mean(1)
    return Scores(loss.item(), *shares.tolist())


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor, batch: int = BATCH) -> Tensor:
    """What a network in eval mode says of uint8 (N, 3, 32, 32) on its device, (N, 100), in float32 without TF32."""
    network = folded(network)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([network(normalise(part)) for part in images.split(batch)])


def folded(network: nn.Module) -> nn.Module:
    """A copy of a network in eval mode whose batch normalisations are folded into the convolutions before them."""
    network = copy.deepcopy(network)
    for layers in network.modules():
        if isinstance(layers, nn.Sequential) and len(layers) > 1 and isinstance(layers[1], nn.BatchNorm2d):
            layers[0], layers[1] = fuse_conv_bn_eval(layers[0], layers[1]), nn.Identity()
    return network


def measure(network: nn.Module) -> tuple[int, float]:
    """thop's operations for one 3x32x32 image, and kB (1024 bytes) of parameters and buffers after it has run.

    thop adds two float64 counters to each module it has no rule for (33 here, 0.516 kB), and the claimed size
    counts them; it works on a copy, so that they stay off the caller's network.
    """
    probe = copy.deepcopy(network).eval()
    image = torch.zeros(1, 3, 32, 32, device=next(probe.parameters()).device)
    operations, _ = thop.profile(probe, (image,), verbose=False)
    return int(operations), size(probe) / 1024


def size(network: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])


def load_network(content: dict[str, Any], path: Path) -> nn.Module:
    """The graded network with a checkpoint's weights, in eval mode; raises CheckpointError."""
    network = MobileNetV3()
    try:
        network.load_state_dict(content["weights"])
    except (KeyError, RuntimeError) as error:
        raise checkpoint.CheckpointError(f"{path} holds no weights of this network. Give another checkpoint") from error
    return network.eval()


def default_checkpoint() -> Path:
    """The best of the latest training on this machine where there is one, else the published one."""
    return checkpoint.BEST if checkpoint.BEST.exists() else checkpoint.PUBLISHED


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is any, else the CPU. Raises DeviceError."""
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{name} is not there: torch sees {torch.cuda.device_count()} CUDA devices. Try --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def grade(
    path: Path, device: str = Config.device, data_dir: str = Config.data_dir, batch: int = BATCH
) -> dict[str, Any]:
    """Operations, size and test scores of a checkpoint, with what it is.

    Raises CheckpointError, DataError, DeviceError.
    """
    config = Config(device=device, data_dir=data_dir)
    where = choose_device(config.device)
    content = checkpoint.load(path)
    network = load_network(content, path).to(where, memory_format=torch.channels_last)
    operations, size = measure(network)
    dataset = content["config"]["dataset"]
    test = data.load_test(replace(config, dataset=dataset)).to(where)
    start = time.perf_counter()
    scores = evaluate(network, test, batch)
    return {
        "checkpoint": str(path),
        "experiment": content["config"]["experiment"],
        "date": content["date"],
        "epoch": content["epoch"],
        "dataset": dataset,
        "images": len(test.labels),
        "flops": operations,
        "size_kb": size,
        "accuracy": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "seconds": time.perf_counter() - start,
    }


def report(result: dict[str, Any]) -> str:
    """What was graded, and the grade: its last three lines are those of the claim."""
    return (
        "Graded {checkpoint} (experiment {experiment}, epoch {epoch}, {date}) on {images} {dataset} test images\n"
        "Top-5 accuracy = {top5:.2f} %, loss = {loss:.4f}, {seconds:.1f} s\n"
        "flops = {flops}\n"
        "Model parameter size = {size_kb:.3f} kB\n"
        "Accuracy = {accuracy:.2f} %"
    ).format(**result)


def publish(run: Path) -> dict[str, Any]:
    """Grade a finished run's best weights once on the test set and write them as the published checkpoint."""
    last, best = checkpoint.load(run / "last.pth"), checkpoint.load(run / "best.pth")
    if best["config"]["dataset"] != "cifar100":
        raise checkpoint.CheckpointError(f"{run} was trained on {best['config']['dataset']} data: not published")
    if last["epoch"] < last["config"]["epochs"]:
        raise checkpoint.CheckpointError(
            f"{run} has finished {last['epoch']} of {last['config']['epochs']} epochs. "
            f"First finish it: python train.py --resume {shlex.quote(str(run))}"
        )
    chosen_by = choice() if best["config"]["experiment"] == "scratch" else {}
    result = grade(run / "best.pth", data_dir=best["config"]["data_dir"])
    provenance = {
        "run": run.name,
        "test": {name: result[name] for name in ("accuracy", "top5", "loss", "images")},
        "history": last["history"],
        "choice": chosen_by,
        "digests": data.SHA256,
    }
    checkpoint.save(checkpoint.PUBLISHED, best | provenance)
    return result | {"checkpoint": str(checkpoint.PUBLISHED)}


def choice() -> dict[str, float]:
    """The validation accuracy in % that each comparison of the README's table ended with, of those logged by now."""
    figures = {}
    for path in sorted(Path("docs/logs").glob("ablation-*.csv")):
        with path.open() as file:
            figures[path.stem] = float(list(csv.DictReader(file))[-1]["validation_accuracy"])
    return figures


def keep_freed_memory() -> None:
    """Stop glibc from giving freed memory back after each operation: the page faults cost a CPU a quarter of a
    training step and most of the time of grading."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 16 * 2**20), (-8, 1)):
            mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="evaluate.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/best.pth if there, else published.pth")
    parser.add_argument("--device", default=Config.device, help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument("--data_dir", default=Config.data_dir, help="folder of the data set [%(default)s]")
    parser.add_argument("--batch_size", type=int, default=BATCH, help="images a forward pass [%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, not {arguments.batch_size}")
    try:
        Config(device=arguments.device, data_dir=arguments.data_dir)
    except ValueError as error:
        parser.error(str(error))
    keep_freed_memory()
    try:
        path = arguments.checkpoint or default_checkpoint()
        result = grade(path, arguments.device, arguments.data_dir, arguments.batch_size)
    except (checkpoint.CheckpointError, data.DataError, DeviceError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result) if arguments.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
