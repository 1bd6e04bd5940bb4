"""Time training, input, grading and start against what a user would otherwise run: python -m tools.benchmark.

Takes some minutes, and needs CIFAR-100.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch

import data
import train
from augment import build_loader
from config import Config, OneLineParser
from evaluate import evaluate
from model import MobileNetV3
from optim import build_criterion
from utils import UserError, keep_freed_memory, process_group, program, provenance, rank, world_size

ROUNDS = 3  # of each contender, in turn
CPU = torch.device("cpu")
# The defaults, but augmented by crop and flip alone and never on small images, as what ours is compared with.
LIKE = Config(trivial_augment=0.0, small_fraction=0.0)
START = """
import sys, augment, train

iterate = augment.Loader.__iter__

def first_batch(loader):
    yield next(iterate(loader))
    raise KeyboardInterrupt(2)  # as Ctrl-C after the first step

augment.Loader.__iter__ = first_batch
sys.exit(train.main(sys.argv[1:]) != 130)
"""


class Timed:
    """A loader's batches, epoch after epoch: some uncounted ones, then as many as fit into so many seconds.

    `speed` is then in images a second, what is done with a batch included.
    """

    def __init__(self, loader: Any, warmup: int = 4, seconds: float = 12) -> None:
        self.loader, self.batch_size = loader, getattr(loader, "batch_size", 1)
        self.resize = getattr(loader, "resize", None)  # of our own
        self.warmup, self.seconds, self.speed = warmup, seconds, 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches, count = chain.from_iterable(repeat(self.loader)), 0
        for _ in range(self.warmup):
            yield next(batches)
        start = time.perf_counter()
        while time.perf_counter() - start < self.seconds:
            images, labels = next(batches)
            yield images, labels
            count += len(labels)
        self.speed = count / (time.perf_counter() - start)


def usual_loader(tuned: bool) -> torch.utils.data.DataLoader:
    """torchvision's data set in the usual DataLoader, or in one without rotation and with every setting tuned."""
    from torchvision import transforms as T
    from torchvision.datasets import CIFAR100

    pixels, labels = data.load(LIKE.dataset, LIKE.data_dir, "train")
    images = CIFAR100.__new__(CIFAR100)  # its own start would want the archive that the npz file was made from
    images.data, images.targets = pixels.permute(0, 2, 3, 1).numpy(), labels.tolist()
    transforms = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.RandomRotation(15)]
    settings: dict[str, Any] = {"num_workers": 4}
    if tuned:
        del transforms[-1]
        settings = {"num_workers": os.cpu_count(), "persistent_workers": True, "prefetch_factor": 4, "drop_last": True}
    transforms += [T.ToTensor(), T.Normalize(data.MEAN, data.STD)]
    images.transform, images.target_transform = T.Compose(transforms), None
    return torch.utils.data.DataLoader(images, LIKE.batch_size, shuffle=True, **settings)


def plain_loop(tuned: bool) -> float:
    """Training images/s of the loop that CIFAR-100 users copy: NCHW float32, SGD, two .item() a step."""
    model, loader = MobileNetV3().train(), Timed(usual_loader(tuned))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for images, labels in loader:
        optimizer.zero_grad()
        outputs = model(images)
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        loss.item(), (outputs.argmax(1) == labels).sum().item()
    return loader.speed


def our_loop() -> float:
    """Training images/s of the program's own loop."""
    loader = Timed(build_loader(LIKE, CPU)[0])
    train.train_one_epoch(train.TrainState(LIKE, CPU), loader, build_criterion(LIKE))
    return loader.speed


def input_speed(batches: Iterable) -> float:
    """Images/s of a loader alone."""
    loader = Timed(batches, warmup=20, seconds=6)
    for _ in loader:
        pass
    return loader.speed


def memory() -> float:
    """Peak memory in MiB of the defaults' training: all images, 100 steps on each size of them, a validation."""
    config = Config()
    loader, validation = build_loader(config, CPU)
    state = train.TrainState(config, CPU)
    for epoch in (0, config.epochs - 1):
        loader.set_epoch(epoch)
        train.train_one_epoch(state, Timed(loader, warmup=100, seconds=0), build_criterion(config))
    evaluate(state.eval_model, *validation)
    return peak()


def median_seconds(function: Callable[[], Any]) -> float:
    """Median wall seconds of a call."""
    return statistics.median(timeit.repeat(function, number=1, repeat=ROUNDS))


def peak() -> float:
    """Most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def grading() -> dict[str, float]:
    """Seconds to grade the 10,000 test images, and how many times faster that is than one image at a time."""
    model = MobileNetV3().eval().to(memory_format=torch.channels_last)
    test = data.load_test("cifar100", LIKE.data_dir)
    evaluate(model, test.images[:1000], test.labels[:1000])
    seconds = median_seconds(lambda: evaluate(model, *test))
    plain = MobileNetV3().eval()
    loader = Timed(list(zip(test.images.split(1), test.labels.split(1), strict=True)), warmup=20, seconds=6)
    with torch.no_grad():
        for image, _ in loader:
            plain(data.normalise(image).contiguous()).argmax().item()
    return {"seconds": seconds, "ratio": len(test.labels) / loader.speed / seconds}


def growth(images_per_class: int, epochs: int) -> dict[str, float]:
    """One short training of the program's own loop, also by several processes: images, seconds and peak memory."""
    config = replace(LIKE, images_per_class=images_per_class + LIKE.validation_per_class, epochs=epochs)
    loader, state = build_loader(config, CPU, rank(), world_size())[0], train.TrainState(config, CPU)
    start = time.perf_counter()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        train.train_one_epoch(state, loader, build_criterion(config))
    seconds = time.perf_counter() - start
    return {"images": len(loader) * loader.batch_size * epochs, "epochs": epochs, "seconds": seconds, "rss_mb": peak()}


USUAL = ("plain", "tuned", "loader")  # what ours is compared with
PARTS: dict[str, Callable[[], Any]] = {
    "plain": lambda: plain_loop(tuned=False),
    "tuned": lambda: plain_loop(tuned=True),
    "ours": our_loop,
    "loader": lambda: input_speed(usual_loader(tuned=True)),
    "batches": lambda: input_speed(build_loader(LIKE, CPU)[0]),
    "memory": memory,
    "grading": grading,
    **{f"growth {a} x {b}": partial(growth, a, b) for a, b in ((20, 1), (40, 1), (80, 1), (20, 2), (20, 4))},
}


def succeed(*arguments: str, **environment: str) -> str:
    """What a Python command prints. Raises UserError with the last line of its errors where it fails."""
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        command, reasons = " ".join(" ".join(arguments).split()), re.findall(".*[a-z].*", done.stderr)
        raise UserError(f"{command} failed. {['', *reasons][-1]}")
    return done.stdout


def measure(part: str) -> Any:
    """A part in a process of its own; it has the GOMP_SPINCOUNT that importing train has set here."""
    output = succeed("-m", "tools.benchmark", "--part", part)
    print(f"  {part}: {output.strip()}", flush=True)
    return json.loads(output)


def run() -> dict[str, Any]:
    """All measurements, as docs/results/benchmark.json holds them."""
    rounds = [[measure(name) for name in ("plain", "tuned", "ours", "loader", "batches")] for _ in range(ROUNDS)]
    plain, tuned, ours, loader, batches = map(statistics.median, zip(*rounds, strict=True))
    graded = measure("grading")
    with tempfile.TemporaryDirectory() as folder:
        start = median_seconds(lambda: succeed("-c", START, "--device", "cpu", "--runs_dir", folder))
    return {
        **provenance("cpu"),
        "cores": os.cpu_count(),
        "train_images_per_second": ours,
        "train_cpu_ratio": ours / plain,
        "train_cpu_tuned_ratio": ours / tuned,
        "pipeline_images_per_second": batches,
        "pipeline_ratio": batches / loader,
        "grade_seconds": graded["seconds"],
        "grade_ratio": graded["ratio"],
        "start_seconds": start,
        "help_seconds": median_seconds(lambda: succeed("train.py", "-h")),
        "peak_rss_mb": max(measure("memory") for _ in range(ROUNDS)),
        "growth": [measure(name) for name in PARTS if name.startswith("growth")],
    }


@program("tools.benchmark")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part:
        if arguments.part not in USUAL:
            keep_freed_memory()  # as train.py and evaluate.py do
        with process_group("cpu"):
            print(json.dumps(PARTS[arguments.part]()))
        return 0
    result = run()
    for name, value in result.items():
        if not isinstance(value, dict | list):  # which have been printed
            print(f"{name:28} {round(value, 2) if isinstance(value, float) else value}")
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
