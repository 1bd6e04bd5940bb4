"""Count the operations of a training step, and time step, input and grading: python -m tools.benchmark.

Step and input are compared with the loop that CIFAR-100 users copy: PIL transforms (it also rotates) in a DataLoader,
SGD, two .item() per step (its prints and TensorBoard scalars left out). Needs CIFAR-100, and about five minutes on
two CPU cores.
"""

import io
import json
import os
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import augment
import data
import train
import utils
from checkpoint import load_model, read_log
from config import PLAIN, Config, OneLineParser, add_data_dir
from evaluate import default_checkpoint, grade
from model import MobileNetV3, build_model
from tools.export import export, nhwc, read_onnx

Figures = dict[str, float]

CPU = torch.device("cpu")
# Our side of the comparison with the plain loop: its only augmentation is crop and flip. The first epoch warms up.
COMPARED = Config(**PLAIN | {"flip": True, "crop_padding": 4, "ema": 0.999, "label_smoothing": 0.1, "epochs": 2})
ALMOST_ALL = Config(epochs=1, images_per_class=499)  # a run on all images would replace checkpoints/best.pth


class Count(TorchDispatchMode):
    """Counts operations that reach the dispatcher, except views and allocations: on a GPU about one kernel each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        view = func.is_view or torch.Tag.inplace_view in func.tags
        self.count += func.namespace == "aten" and not view and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def count_operations(config: Config) -> Figures:
    """Operations of a training step by part, counted on the CPU, with as many images augmented at once as on CUDA."""
    train_set, _ = data.load_training(config.dataset, config.data_dir, config.validation_per_class)
    loader = augment.Loader(train_set, config)
    chunk = loader.chunk = min(augment.CUDA_CHUNK // loader.batch_size, len(loader))
    batches = iter(loader)
    model = build_model(config.model).to(memory_format=torch.channels_last)
    ema, optimizer = train.EMA(model, config.ema), train.build_optimizer(model, config)
    criterion, sums = train.build_criterion(config, CPU), torch.zeros(3)
    parts = {name: Count() for name in ("input", "forward", "backward", "optimizer", "ema", "sums")}
    with parts["input"]:
        for _ in range(chunk):
            images, labels = next(batches)
    with parts["forward"]:
        logits = model(images)
        loss = criterion(images, logits, labels)
    with parts["backward"]:
        loss.backward()
    optimizer.step()  # makes the optimizer's state
    with parts["optimizer"]:
        optimizer.step()
    with parts["ema"]:
        ema.update()
    with parts["sums"]:
        sums += train.batch_sums(loss, logits, labels)
    return {name: part.count / (chunk if name == "input" else 1) for name, part in parts.items()}


def time_loop(loader: Any, step: Callable[[Tensor, Tensor], Any], device: torch.device, seconds: float = 4) -> float:
    """Images/s of a loader, epoch after epoch, and of `step` on its batches, after ten uncounted ones."""
    batches, count, on_device = chain.from_iterable(repeat(loader)), 0, torch.zeros(1, device=device)
    for batch in islice(batches, 10):
        step(*batch)
    on_device.item()  # waits for the device
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        images, labels = next(batches)
        step(images, labels)
        count += len(labels)
    on_device.item()
    return count / (time.perf_counter() - start)


def time_plain(config: Config, device: torch.device) -> Figures:
    """Images/s of the plain loop, NCHW float32, and of a tuned loader without rotation."""
    from torchvision import transforms as T
    from torchvision.datasets import CIFAR100

    train_set, _ = data.load_training(config.dataset, config.data_dir, config.validation_per_class)
    images = CIFAR100.__new__(CIFAR100)  # its own start would want the archive that the npz file was made from
    images.data, images.targets, images.target_transform = nhwc(train_set.images).numpy(), train_set.labels, None
    transforms = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(data.MEAN, data.STD)]
    images.transform = T.Compose([*transforms[:2], T.RandomRotation(15), *transforms[2:]])
    loader = DataLoader(images, config.batch_size, shuffle=True, num_workers=min(4, os.cpu_count()))
    model = MobileNetV3().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(batch: Tensor, labels: Tensor) -> None:
        batch, labels = batch.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = model(batch)
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        loss.item(), (outputs.argmax(1) == labels).sum().item()

    speed = time_loop(loader, step, device)
    images.transform = T.Compose(transforms)
    tuning = {"num_workers": os.cpu_count(), "persistent_workers": True, "prefetch_factor": 4, "drop_last": True}
    tuned = DataLoader(images, config.batch_size, shuffle=True, **tuning)
    return {"plain": speed, "plain_input": time_loop(tuned, lambda *_: None, device)}


def time_program(config: Config, device: torch.device) -> float:
    """Images/s of the last epoch of a run of the program, from its log."""
    utils.keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run = train.train(replace(config, device=str(device), runs_dir=folder))
        return read_log(run / "log.csv")[-1]["images_per_second"]


def time_ours(config: Config, device: torch.device) -> Figures:
    """Images/s of the program, and of its loader alone."""
    train_set, _ = data.load_training(config.dataset, config.data_dir, config.validation_per_class)
    loader = augment.Loader(train_set.to(device), config)
    return {"ours": time_program(config, device), "our_input": time_loop(loader, lambda *_: None, device)}


def measure_memory_and_grading(config: Config, device: torch.device) -> Figures:
    """Peak memory in MiB of a run, and seconds to grade."""
    import resource  # here, as Windows lacks it

    time_program(config, device)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes or KiB
    figures = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        figures["peak_gpu_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures | {"grade_seconds": grade(default_checkpoint(), str(device), config.data_dir)["seconds"]}


def measure_latency(path: Path, data_dir: str) -> Figures:
    """Milliseconds per image at batch 1 on the CPU: of a checkpoint in torch, and of its two ONNX files if their
    packages are there."""
    model, image = load_model(path)[0], data.synthetic(1, seed=0).images[:1]
    with torch.inference_mode():
        seconds = median_seconds(lambda: model(data.normalise(image)).softmax(1), 100)
    figures = {"latency_ms": 1000 * seconds}
    if all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        batch = nhwc(image)
        for name, int8 in (("onnx", False), ("int8", True)):
            with tempfile.TemporaryDirectory() as folder:
                export(file := Path(folder, "model.onnx"), path, data_dir, int8)
                run = read_onnx(file.read_bytes())
            figures[f"{name}_latency_ms"] = 1000 * median_seconds(partial(run, batch), 100)
    return figures


def median_seconds(call: Callable[[], Any], repeat: int) -> float:
    """Median wall seconds of a call that waits for its result."""
    return statistics.median(timeit.repeat(call, number=1, repeat=repeat))


def in_process(function: Callable[..., Figures], *arguments: Any) -> Figures:
    """What a function returns in a process of its own, which no other contender's settings reach."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(device: torch.device, data_dir: str) -> Iterator[dict[str, Any]]:
    """All figures, group by group. Raises UserError."""
    gpu = device.type == "cuda"
    yield utils.provenance(device)
    yield {f"{part}_operations": count for part, count in count_operations(Config(dataset="synthetic")).items()}
    yield in_process(measure_memory_and_grading, replace(ALMOST_ALL, data_dir=data_dir), device)
    yield in_process(measure_latency, default_checkpoint(), data_dir)
    for batch_size in (512, 128) if gpu else (128,):
        config = replace(COMPARED, batch_size=batch_size, images_per_class=499 if gpu else 100, data_dir=data_dir)
        rounds = []
        for _ in range(1 if gpu else 3):
            rounds.append(in_process(time_plain, config, device) | in_process(time_ours, config, device))
        speeds = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
        if gpu:
            speeds["compiled"] = in_process(time_program, replace(config, compile=True), device)
        yield {f"{name}_images_per_second_{batch_size}": speed for name, speed in speeds.items()}
    yield {f"train_{device.type}_ratio": speeds["ours"] / speeds["plain"]}
    yield {"pipeline_ratio": speeds["our_input"] / speeds["plain_input"]}


@utils.program("tools.benchmark")
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--device", default=Config.device, help="auto, cpu or cuda [%(default)s]")
    add_data_dir(parser)
    arguments = parser.parse_args(argv)
    result = {}
    for figures in measure(utils.choose_device(arguments.device), arguments.data_dir):
        for name, value in figures.items():
            print(f"{name:34} {round(value, 3) if isinstance(value, float) else value}", flush=True)
        result |= figures
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
