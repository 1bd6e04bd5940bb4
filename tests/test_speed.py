"""Guards against becoming slow: ratios to what a user would otherwise run, never seconds."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

import augment
import data
import evaluate
from config import Config, preset
from data import synthetic


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains little here, and waits where another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fastest(action: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of some runs: the one that other processes disturbed least."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_a_batch_is_made_much_faster_than_from_pil_images() -> None:
    """Against one process of the usual loader; docs/results/benchmark.json has it on all cores."""
    images = synthetic(2, seed=0)
    pil_images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.images[:128]]
    steps = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(data.MEAN, data.STD)]
    crop_and_flip = replace(Config(**preset("result6")), flip=True, crop_padding=4)
    transform, loader = T.Compose(steps), augment.Loader(images, crop_and_flip)
    index, generator = torch.arange(128), torch.Generator().manual_seed(0)
    loader.augment(index, generator)
    plain = fastest(lambda: torch.stack([transform(image) for image in pil_images]))
    assert plain > 5 * fastest(lambda: loader.augment(index, generator), times=20)


def test_grading_in_batches_is_much_faster_than_one_at_a_time(model: nn.Module) -> None:
    images = synthetic(2, seed=0)
    fast = model.to(memory_format=torch.channels_last)
    evaluate.evaluate(fast, *images)

    def one_at_a_time() -> None:
        with torch.no_grad():
            for i in range(40):
                model(data.normalise(images.images[i : i + 1])).argmax().item()

    assert fastest(one_at_a_time) * len(images.labels) / 40 > 3 * fastest(lambda: evaluate.evaluate(fast, *images))
