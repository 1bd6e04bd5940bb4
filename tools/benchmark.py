"""Time training, input, grading and start against what a user would otherwise run: python -m tools.benchmark."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import data
import evaluate
import train
from augment import Batches, normalise
from config import Config, OneLineParser
from model import MobileNetV3

ROUNDS = 3  # of each contender, in turn
# The defaults, but augmented by crop and flip alone and never on small images, as what ours is compared with.
LIKE = Config(trivial_augment=0.0, small_share=0.0)
START = """
import config, train
asked = iter((0, 1))  # before the run, and after the first step
try:
    train.train(config.Config(runs_dir={folder!r}), stop=lambda: next(asked))
except train.Stopped as stopped:
    number, run = stopped.args
    raise SystemExit(0 if run else 1)
raise SystemExit(1)
"""


def per_second(step: Callable[[], int], warmup: int, seconds: float) -> float:
    """Images a second of `step`, which returns how many it took, after some uncounted calls."""
    for _ in range(warmup):
        step()
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += step()
    return images / (time.perf_counter() - start)


class Pictures(torch.utils.data.Dataset):
    """The training images as torchvision.datasets.CIFAR100 gives them: one PIL image at a time, transformed."""

    def __init__(self, rotation: bool) -> None:
        from torchvision import transforms as T

        arrays = data.read(Path(LIKE.data_dir) / "cifar100.npz", "train")
        self.images, self.labels = arrays["train_images"], arrays["train_labels"].tolist()
        self.transform = T.Compose(
            [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()]
            + [T.RandomRotation(15)] * rotation
            + [T.ToTensor(), T.Normalize(data.MEAN, data.STD)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader(tuned: bool) -> Callable[[], Any]:
    """Endless batches of the usual DataLoader, or of one with the rotation left out and every setting tuned."""
    settings: dict[str, Any] = {"num_workers": 4}
    if tuned:
        settings = {"num_workers": os.cpu_count(), "persistent_workers": True, "prefetch_factor": 4, "drop_last": True}
    batches = torch.utils.data.DataLoader(Pictures(not tuned), LIKE.batch_size, shuffle=True, **settings)

    def endless() -> Any:
        while True:
            yield from batches

    return endless().__next__


def plain_loop(tuned: bool) -> float:
    """Training images/s of the loop that CIFAR-100 users copy: NCHW float32, SGD, two .item() a step."""
    network = MobileNetV3().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    batch = loader(tuned)

    def step() -> int:
        images, labels = batch()
        optimizer.zero_grad()
        outputs = network(images)
        loss = F.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        loss.item(), (outputs.argmax(1) == labels).sum().item()
        return len(labels)

    return per_second(step, warmup=4, seconds=12)


def our_batches() -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of the training program."""
    batches, generator = Batches(LIKE, data.load_training(LIKE)[0]), torch.Generator().manual_seed(0)
    order = torch.randperm(len(batches.labels)).split(LIKE.batch_size)[:-1]

    def endless() -> Any:
        while True:
            for index in order:
                yield batches(index, generator)

    return endless().__next__


def input_speed(batch: Callable[[], Any]) -> float:
    """Images/s of a source of batches alone."""
    return per_second(lambda: len(batch()[1]), warmup=20, seconds=6)


def our_loop() -> float:
    """Training images/s of the program's own step."""
    evaluate.keep_freed_memory()
    run, batch, sums = train.Training(LIKE, torch.device("cpu")), our_batches(), torch.zeros(2)
    run.network.train()

    def step() -> int:
        inputs, targets = batch()
        run.step(inputs, targets, sums)
        return len(inputs)

    return per_second(step, warmup=4, seconds=12)


def memory() -> float:
    """Peak memory in MB of the defaults' training: all images, steps on both sizes of them, a validation."""
    evaluate.keep_freed_memory()
    config, generator, sums = Config(), torch.Generator().manual_seed(0), torch.zeros(2)
    images, validation = data.load_training(config)
    run, batches = train.Training(config, torch.device("cpu")), Batches(config, images)
    del images
    run.network.train()
    for small in (True, False):
        for index in torch.randperm(len(batches.labels), generator=generator).split(config.batch_size)[:100]:
            run.step(*batches(index, generator, small), sums)
    evaluate.evaluate(run.graded(), validation)
    return peak()


def peak() -> float:
    """Most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def grading() -> dict[str, float]:
    """Seconds to grade the 10,000 test images, and how many times faster that is than one image at a time."""
    evaluate.keep_freed_memory()
    network = MobileNetV3().eval().to(memory_format=torch.channels_last)
    test = data.load_test(LIKE)
    evaluate.evaluate(network, data.Images(test.images[:1000], test.labels[:1000]))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        evaluate.evaluate(network, test)
        times.append(time.perf_counter() - start)
    plain = MobileNetV3().eval()
    places = iter(range(10_000))

    def one() -> int:
        with torch.no_grad():
            plain(normalise(test.images[(i := next(places)) : i + 1]).contiguous()).argmax().item()
        return 1

    alone = per_second(one, warmup=20, seconds=6)
    return {"seconds": statistics.median(times), "ratio": 10_000 / alone / statistics.median(times)}


def growth(images_per_class: int, epochs: int) -> dict[str, float]:
    """One short training of the program's own loop: images trained on, seconds and peak memory."""
    evaluate.keep_freed_memory()
    kept = images_per_class + LIKE.validation_per_class
    config = replace(LIKE, images_per_class=kept, epochs=epochs, device="cpu")
    run, batches = train.Training(config, torch.device("cpu")), Batches(config, data.load_training(config)[0])
    start = time.perf_counter()
    for _ in range(epochs):
        train.train_epoch(run, batches, lambda: 0)
        run.history.append({})
    seconds = time.perf_counter() - start
    return {"images": 100 * images_per_class * epochs, "epochs": epochs, "seconds": seconds, "rss_mb": peak()}


PARTS: dict[str, Callable[[], Any]] = {
    "plain": lambda: plain_loop(tuned=False),
    "tuned": lambda: plain_loop(tuned=True),
    "ours": our_loop,
    "loader": lambda: input_speed(loader(tuned=True)),
    "batches": lambda: input_speed(our_batches()),
    "memory": memory,
    "grading": grading,
    "growth 1x": lambda: growth(20, 1),
    "growth 2x images": lambda: growth(40, 1),
    "growth 4x images": lambda: growth(80, 1),
    "growth 2x epochs": lambda: growth(20, 2),
    "growth 4x epochs": lambda: growth(20, 4),
}


def measure(part: str) -> Any:
    """A part in a process of its own, so that neither memory settings nor caches carry over."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.benchmark", "--part", part]
    output = succeed(command)
    print(f"  {part}: {output.strip()}", flush=True)
    return json.loads(output)


def succeed(command: list[str]) -> str:
    """What a command prints; the program ends with the last line of its errors where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise SystemExit(f"tools.benchmark: error: {' '.join(command[1:])} failed. {reason}")
    return done.stdout


def seconds(command: list[str]) -> float:
    """Median wall seconds of a whole command, which must succeed."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        succeed([sys.executable, *command])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    parser = OneLineParser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part]()))
        return 0
    loops: dict[str, list[float]] = {name: [] for name in ("plain", "tuned", "ours", "loader", "batches")}
    for _ in range(ROUNDS):
        for name, results in loops.items():
            results.append(measure(name))
    plain, tuned, ours, input_loader, batches = map(statistics.median, loops.values())
    graded = measure("grading")
    rows = [measure(name) for name in PARTS if name.startswith("growth")]
    with tempfile.TemporaryDirectory() as folder:
        start = seconds(["-c", START.format(folder=folder)])
    result = {
        "cores": os.cpu_count(),
        "torch": str(torch.__version__),
        "train_images_per_second": ours,
        "train_cpu_ratio": ours / plain,
        "train_cpu_tuned_ratio": ours / tuned,
        "pipeline_images_per_second": batches,
        "pipeline_ratio": batches / input_loader,
        "grade_seconds": graded["seconds"],
        "grade_ratio": graded["ratio"],
        "start_seconds": start,
        "help_seconds": seconds(["train.py", "-h"]),
        "peak_rss_mb": max(measure("memory") for _ in range(ROUNDS)),
        "growth": rows,
    }
    for name, value in result.items():
        if name != "growth":
            print(f"{name:28} {value if isinstance(value, int | str) else round(value, 2)}")
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
