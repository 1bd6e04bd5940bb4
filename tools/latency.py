"""Time a checkpoint in torch and as ONNX files, and a training step against its floor: python -m tools.latency."""

import hashlib
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import evaluate
import train
from augment import build_loader
from config import Config, OneLineParser, preset
from data import SIDE
from model import MobileNetV3
from optim import build_criterion
from tools import costs, quantize
from tools.benchmark import LIKE, succeed
from tools.export import Deployed, check_images, export
from utils import UserError, keep_freed_memory, program, provenance

ROUNDS, SECONDS = 3, 1.5  # of each contender, in turn; of each figure in a round
BATCH = 64  # images, where the figure is images/s
CPU = torch.device("cpu")
MATRIX = 2048  # rows and columns of the matrix product: 17 G operations
PART = "growth 40 x 1"  # of tools/benchmark.py: 4,000 images
COPY = 2**28  # bytes of the copied tensor: more than most caches hold
# The step that is timed: crop and flip alone, so that the input costs little. Its epoch is one batch of 128 images.
STEP = Config(
    **preset("scratch") | {"trivial_augment": 0.0, "small_fraction": 0.0}, dataset="synthetic", images_per_class=2
)
# How often an unfused layer reads or writes a tensor of its output's size in training, forward + backward.
# Batch norm forward: reads its input for the statistics, reads it again, writes; backward: reads input and gradient
# for two sums, reads both again, writes. Activation forward, in place: reads, writes; backward: reads its tensor and
# the gradient, writes.
PASSES = {nn.BatchNorm2d: 3 + 5, nn.ReLU: 2 + 3, nn.Hardswish: 2 + 3}

Figures = dict[str, float]


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own. Raises what it raises, or UserError where it dies.

    The process has the GOMP_SPINCOUNT that importing train has set here.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(f"the process of {function.__name__} was killed. Free some memory and run again") from error


def call_seconds(call: Callable[[], Any], seconds: float) -> float:
    """Median wall seconds of a call: as many as fit into so many seconds, after a quarter of that uncounted."""

    def durations(limit: float) -> Iterator[float]:
        start = now = time.perf_counter()
        while now - start < limit:
            before = now
            call()
            now = time.perf_counter()
            yield now - before

    list(durations(seconds / 4))
    return statistics.median(durations(seconds))


def write_files(source: Path, folder: Path, data_dir: str) -> None:
    """Export a checkpoint as float32.onnx and int8.onnx; each is checked. Raises UserError."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # torch.export's chatter
    for name in ("float32", "int8"):
        print(export(folder / f"{name}.onnx", source, data_dir, int8=name == "int8"), flush=True)


def read_torch(path: Path) -> quantize.Run:
    """The checkpoint's model as evaluate.py runs it, with the preprocessing and the softmax of the exported files."""
    keep_freed_memory()
    model = evaluate.load_model(path)[0]
    deployed = Deployed(model).eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        return deployed(images)

    return run


def time_file(name: str, path: Path, images: np.ndarray, classes: np.ndarray, threads: int, seconds: float) -> Figures:
    """ms an image at batch 1, images/s for all images, and on what % of them the class is the given one.

    Images are uint8 (N, 32, 32, 3), classes (N,); `name` is torch, float32 or int8. Raises UserError where the file
    gives too many other classes.
    """
    torch.set_num_threads(threads)
    run, batch = (read_torch if name == "torch" else quantize.read_onnx)(path), torch.from_numpy(images)
    same = 100 * (run(batch).argmax(1).numpy() == classes).mean()
    if same < (quantize.SAME if name == "int8" else 100):
        raise UserError(f"{path} gives the model's class on only {same:.1f} % of {len(images)} images: not timed")
    single = call_seconds(lambda: run(batch[:1]), seconds)
    return {
        "ms": 1000 * single,
        "images_per_second": len(batch) / call_seconds(lambda: run(batch), seconds),
        "same_top1": float(same),
    }


def training_step() -> Callable[[], Any]:
    """A function that does one step of the program's own loop, input included."""
    loader, state, criterion = build_loader(STEP, CPU)[0], train.TrainState(STEP, CPU), build_criterion(STEP)
    return lambda: train.train_one_epoch(state, loader, criterion)


def machine_rates(threads: int, seconds: float) -> Figures:
    """Operations/s of a float32 matrix product, bytes/s of a copy (read and written), seconds of a training step."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    left, right, product = torch.rand(3, MATRIX, MATRIX)
    source, target = torch.ones(2, COPY // 4)
    return {
        "operations_per_second": 2 * MATRIX**3 / call_seconds(lambda: torch.mm(left, right, out=product), seconds),
        "bytes_per_second": 2 * COPY / call_seconds(lambda: target.copy_(source), seconds),
        "step_seconds": call_seconds(training_step(), seconds),
    }


@torch.no_grad()
def image_cost(model: nn.Module) -> tuple[int, int]:
    """What a training step costs for one 3x32x32 image: operations, and bytes that unfused layers move by PASSES.

    A multiply-add of a convolution or linear layer is two operations, forward and for each of its two gradients.
    """
    costs = {"operations": 0, "bytes": 0}

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            costs["operations"] += 3 * 2 * output.numel() * layer.weight[0].numel()
        costs["bytes"] += PASSES.get(type(layer), 0) * output.numel() * output.element_size()

    for layer in model.modules():
        layer.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, SIDE, SIDE))
    return costs["operations"], costs["bytes"]


def floor(rates: Figures) -> Figures:
    """The time that a training step cannot go below at these rates, and how many times that it takes."""
    operations, moved = (STEP.batch_size * cost for cost in image_cost(MobileNetV3()))
    seconds = operations / rates["operations_per_second"] + moved / rates["bytes_per_second"]
    counts = {"batch_size": STEP.batch_size, "operations": operations, "bytes": moved}
    return counts | rates | {"floor_seconds": seconds, "times_floor": rates["step_seconds"] / seconds}


def time_processes(threads: int) -> Figures:
    """Training images/s of one process of so many threads, and of several of one thread each: `count` processes, the
    most that share a batch evenly."""
    count = max(n for n in range(1, threads + 1) if LIKE.batch_size % n == 0)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count))
    part = ("-m", "tools.benchmark", "--part", PART)
    rows = {"one": json.loads(succeed(*part)), "several": json.loads(succeed(*torchrun, *part, OMP_NUM_THREADS="1"))}
    return {name: row["images"] / row["seconds"] for name, row in rows.items()} | {"count": count}


def medians(rounds: list[Figures]) -> Figures:
    """Each figure's median over the rounds."""
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def run(
    source: Path = checkpoint.PUBLISHED, rounds: int = ROUNDS, seconds: float = SECONDS, data_dir: str = Config.data_dir
) -> dict[str, Any]:
    """All measurements of a checkpoint, as docs/results/latency.json holds them; what is found is printed.

    `seconds` is the time for each figure in a round. Raises UserError.
    """
    quantize.need_onnx()
    import onnxruntime  # optional

    model, content = evaluate.load_model(source)
    images = quantize.spread_out(check_images(content["config"]["dataset"], data_dir)[0], BATCH)
    classes = evaluate.predict_logits(model, images.permute(0, 3, 1, 2)).argmax(1)
    threads, rates, shared = sorted({1, torch.get_num_threads()}), [], []
    with tempfile.TemporaryDirectory() as folder:
        in_process(write_files, source, Path(folder), data_dir)
        paths = {"torch": source, **{name: Path(folder) / f"{name}.onnx" for name in ("float32", "int8")}}
        timed = {(name, count): [] for count in threads for name in paths}
        for _ in range(rounds):
            for (name, count), figures in timed.items():
                row = in_process(time_file, name, paths[name], images.numpy(), classes.numpy(), count, seconds)
                print(f"  {name}, threads {count}: {row}", flush=True)
                figures.append(row)
            rates.append(in_process(machine_rates, threads[-1], seconds))
            print(f"  training step, threads {threads[-1]}: {rates[-1]}", flush=True)
            shared.append(time_processes(threads[-1]))
            print(f"  one process of {threads[-1]} threads, and several of one: {shared[-1]}", flush=True)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    result = {
        **provenance("cpu"),
        "onnxruntime": onnxruntime.__version__,
        "date": date.today().isoformat(),
        "checkpoint": str(source),
        "run": content.get("run"),
        "checkpoint_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "threads": threads[-1],
        "batch_size": BATCH,
        "files": {
            name: {"bytes": size, "threads": {str(count): medians(timed[name, count]) for count in threads}}
            for name, size in sizes.items()
        },
        "floor": floor(medians(rates)),
        "processes": medians(shared),
    }
    print(costs.latency_table(result), costs.floor_table(result), sep="\n\n")
    return result


@program("tools.latency")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.latency", description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=checkpoint.PUBLISHED, help="[%(default)s]")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args(argv)
    result = run(arguments.checkpoint)
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
