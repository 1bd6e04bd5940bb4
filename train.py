"""Train the network on CIFAR-100: `python train.py`; every setting is a constant in config.py and a flag here."""

from config import Config, changes, describe_sets, parse_command_line

# Parsed before the imports below, which take seconds: -h and a mistyped flag answer at once.
ARGUMENTS = parse_command_line() if __name__ == "__main__" else None

import argparse
import inspect
import math
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler
from tqdm import tqdm

import checkpoint
import data
from augment import Batches
from evaluate import DeviceError, choose_device, evaluate, keep_freed_memory, publish, report
from model import Average, MobileNetV3


class Stopped(Exception):
    """SIGINT or SIGTERM came; the signal's number, and the run's folder where there is one."""


class Diverged(Exception):
    """Loss or weights are not finite; the message names epoch and learning rate."""


class Training:
    """What a run carries from epoch to epoch: network, averaged network, optimizer, schedule, scaler, history."""

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.network = MobileNetV3(config.dropout).to(device, memory_format=torch.channels_last)
        self.forward = compiled(self.network, device) if config.compile else self.network
        self.average = Average(self.network, config.ema) if config.ema else None
        self.optimizer = make_optimizer(config, self.network)
        self.scheduler = make_scheduler(config, self.optimizer)
        self.autocast = {"device_type": device.type, "enabled": device.type == "cuda", "dtype": torch.bfloat16}
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            self.autocast["dtype"] = torch.float16
        half = self.autocast["enabled"] and self.autocast["dtype"] is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.history: list[dict[str, Any]] = []

    def parts(self) -> dict[str, Any]:
        """The stateful parts by the name that a checkpoint gives them."""
        parts = {"network": self.network, "average": self.average, "optimizer": self.optimizer}
        parts |= {"scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def load(self, content: dict[str, Any]) -> None:
        """Go on from the content of a last.pth."""
        for name, part in self.parts().items():
            if content["state"][name]:  # a scaler that was off has none
                part.load_state_dict(content["state"][name])
        self.history = content["history"]

    def graded(self) -> torch.nn.Module:
        """The network that is validated and saved, in eval mode: the averaged one where there is one."""
        return (self.network if self.average is None else self.average.network).eval()

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, sums: torch.Tensor) -> None:
        """One optimizer step; adds loss and hits of the batch to `sums` (2,) on the device, without reading them."""
        self.optimizer.zero_grad()
        with torch.autocast(**self.autocast):
            logits = self.forward(inputs)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        hard = targets if targets.ndim == 1 else targets.argmax(1)
        sums += torch.stack([loss.detach() * len(hard), (logits.argmax(1) == hard).sum()])


def compiled(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network under torch.compile, on a GPU with CUDA graphs; what cannot be compiled runs as it is."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")


class Lean:
    """Methods of torch's optimizers without the wrappers that import its compiler: 150 MB and 1.5 s of the start."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Lean, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class SGD(Lean, torch.optim.SGD):
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def make_optimizer(config: Config, network: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD; norms' and biases' parameters are a group of their own."""
    norms = {"weight_decay": config.weight_decay * config.decay_norms}
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim < 2], **norms},
    ]
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        optimizer = SGD(groups, momentum=0.9, nesterov=True, **common)
        for p in network.parameters():  # torch leaves them unset where GradScaler skips the first step
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return optimizer
    return AdamW(groups, **common)


def make_scheduler(config: Config, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """StepLR or cosine decay, stepped once an epoch; linear warm-up multiplies it."""
    if config.schedule == "cosine":
        decay = lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    else:
        step = config.lr_step or max(1, round(config.epochs * 38 / 130))
        decay = lr_scheduler.StepLR(optimizer, step, config.lr_gamma)
    epochs = min(config.warmup_epochs, config.epochs // 4)
    if not epochs:
        return decay
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (epochs + 1), total_iters=epochs)
    return lr_scheduler.ChainedScheduler([warmup, decay])


def train_epoch(run: Training, batches: Batches, stop: Callable[[], int]) -> tuple[float, float, int]:
    """Train on each image once, in an order that follows from (seed, epoch); mean loss, accuracy in %, images.

    The last images that do not fill a batch are left out, others in each epoch, so that all steps have one shape.
    """
    epoch, count = len(run.history), len(batches.labels)
    size = min(run.config.batch_size, count)
    seed = run.config.seed * 1_000_003 + epoch
    torch.manual_seed(seed)  # dropout and mixing
    generator = torch.Generator(run.device).manual_seed(seed)
    order = torch.randperm(count, device=run.device, generator=generator)
    order = order[: count // size * size].split(size)
    small = epoch < int(run.config.small_share * run.config.epochs + 1e-9)  # 0.29 * 100 is a little below 29
    sums = torch.zeros(2, device=run.device)
    run.network.train()
    read = time.monotonic()
    with tqdm(total=len(order) * size, unit=" images", disable=None, leave=False, mininterval=0.5) as bar:
        for done, index in enumerate(order, start=1):
            run.step(*batches(index, generator, small), sums)
            if signal_number := stop():
                raise Stopped(signal_number)
            if not bar.disable and time.monotonic() - read > 0.5:  # reading waits for the device
                loss, hits = (sums / (done * size)).tolist()
                check_finite(run, loss)
                bar.set_postfix_str(f"loss {loss:.4f}, accuracy {100 * hits:.2f}%", refresh=False)
                read = time.monotonic()
            bar.update(size)
    finite = torch.stack([p.isfinite().all() for p in run.graded().state_dict().values()]).all()
    loss, hits, finite = torch.cat([sums / (len(order) * size), finite[None]]).tolist()
    check_finite(run, loss if finite else math.nan)
    return loss, 100 * hits, len(order) * size


def check_finite(run: Training, loss: float) -> None:
    """Raise Diverged where the loss, or a weight that it stands for, is NaN or infinite."""
    if not math.isfinite(loss):
        raise Diverged(
            f"the loss or a weight is not finite in epoch {len(run.history) + 1} at learning rate "
            f"{run.optimizer.param_groups[0]['lr']:g}: training stops, and the checkpoints of earlier epochs stay "
            "as they are. Try a lower lr"
        )


def train(config: Config, folder: Path | None = None, stop: Callable[[], int] = lambda: 0) -> Path:
    """Train, or go on with the run in `folder`; the run's folder. `stop` is asked once a step for a signal's number.

    Raises DataError, CheckpointError, DeviceError, Diverged, Stopped.
    """
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic matrix products need
        torch.use_deterministic_algorithms(True)
    images, validation = (part.to(device) for part in data.load_training(config))
    batches = Batches(config, images)
    del images
    run = Training(config, device)
    if number := stop():
        raise Stopped(number, folder)
    folder = checkpoint.new_run(config) if folder is None else folder
    with checkpoint.locked(folder):
        for left in folder.glob(".*.part"):  # of a killed process
            left.unlink()
        if (folder / "last.pth").exists():
            run.load(checkpoint.load(folder / "last.pth"))
        announce(run, len(batches.labels), folder)
        drawn = time.monotonic()
        while len(run.history) < config.epochs:
            try:
                finish_epoch(run, batches, validation, stop, folder)
            except Stopped as stopped:
                raise Stopped(*stopped.args, folder) from None
            if time.monotonic() - drawn > 60:  # a picture costs half a second
                draw_curves(run, folder)
                drawn = time.monotonic()
        checkpoint.write_log(folder, run.history)
        draw_curves(run, folder)
        checkpoint.offer(folder, config)  # another run may have offered its own meanwhile
    return folder


def finish_epoch(
    run: Training, batches: Batches, validation: data.Images, stop: Callable[[], int], folder: Path
) -> None:
    """Train and validate one epoch, print its lines and write its files."""
    config, epoch, start = run.config, len(run.history) + 1, time.perf_counter()
    print(f"Epoch {epoch}/{config.epochs}")
    rate = run.optimizer.param_groups[0]["lr"]
    loss, accuracy, images = train_epoch(run, batches, stop)
    seconds = time.perf_counter() - start
    print(f"Train Loss: {loss:.4f}, Train Accuracy: {accuracy:.2f}%")
    row = dict.fromkeys(checkpoint.COLUMNS)
    row.update(epoch=epoch, lr=rate, train_loss=loss, train_accuracy=accuracy)
    better = epoch == config.epochs
    if config.validation_per_class:
        scores = evaluate(run.graded(), validation)
        print(f"Validation Loss: {scores.loss:.4f}, Validation Accuracy: {scores.top1:.2f}%")
        row.update(validation_loss=scores.loss, validation_accuracy=scores.top1)
        better = scores.top1 > max((old["validation_accuracy"] for old in run.history), default=-1.0)
    row.update(images_per_second=images / seconds, seconds=time.perf_counter() - start)
    run.scheduler.step()
    run.history.append(row)
    state = {name: part.state_dict() for name, part in run.parts().items()}
    best = run.graded().state_dict() if better else None
    checkpoint.save_epoch(folder, config, run.history, state, best)
    if better and config.validation_per_class:
        print("Saved Best Model")
    print(f"Learning Rate: {run.scheduler.get_last_lr()[0]:.6f}", flush=True)


def draw_curves(run: Training, folder: Path) -> None:
    """curves.png; matplotlib is imported here only, its import takes a second."""
    from tools.curves import draw, title

    draw({folder.name: run.history}, title(asdict(run.config), run.history), folder / "curves.png")


def announce(run: Training, images: int, folder: Path) -> None:
    """Say what is trained, with which changed settings, where, and on a CPU how long that takes."""
    config, device, epochs = run.config, run.device, run.config.epochs - len(run.history)
    changed = ", ".join(f"{name}={value}" for name, value in changes(config).items())
    print(f"Training {config.experiment} ({changed or 'nothing changed'}) on {images} {config.dataset} images")
    if device.type == "cpu":
        threads, speed = torch.get_num_threads(), 300  # images/s a thread, on one machine
        small = min(epochs, max(0, config.small_share * config.epochs - len(run.history)))
        hours = images * (epochs - 0.4 * small) / (threads * speed) / 3600
        print(f"No CUDA GPU in use: {epochs} epochs to go, about {hours:.1f} h on {threads} CPU threads")
    else:
        print(f"On {torch.cuda.get_device_name(device)}")
    print(f"Run folder: {folder}", flush=True)


def train_seeds(config: Config, count: int, stop: Callable[[], int]) -> None:
    """Train with `count` seeds, one after another; print the mean and standard deviation of their best epochs."""
    best = []
    for seed in range(config.seed, config.seed + count):
        try:
            folder = train(replace(config, seed=seed), stop=stop)
        except Stopped:
            print(f"\nSeeds {seed} to {config.seed + count - 1} are not finished: no mean, no deviation")
            raise
        print(checkpoint.summary(folder), flush=True)
        best.append(checkpoint.load(folder / "best.pth")["metrics"]["validation_accuracy"])
    mean, deviation = statistics.mean(best), statistics.stdev(best)
    print(f"Best validation accuracy of {count} seeds: {mean:.2f} % ± {deviation:.2f} (standard deviation)")


def main(arguments: argparse.Namespace) -> int:
    """The program: train, resume, publish or list; the exit code."""
    keep_freed_memory()
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends a download, or whatever is no step, at once
        os.write(2, b"\nStopping after this step; once more to stop at once\n")  # print may be what was interrupted

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)

    def stop() -> int:
        return received[0] if received else 0

    try:
        if arguments.list:
            print(describe_sets(checkpoint.load(checkpoint.PUBLISHED)))
        elif arguments.publish:
            grade = report(publish(arguments.publish))
            print("README.md must give this accuracy: the tests compare them", grade, sep="\n")
        elif arguments.resume:
            config = checkpoint.run_config(arguments.resume, arguments.given)
            print(checkpoint.summary(train(config, arguments.resume, stop)))
        elif arguments.seeds > 1:
            train_seeds(arguments.config, arguments.seeds, stop)
        else:
            print(checkpoint.summary(train(arguments.config, stop=stop)))
    except Stopped as stopped:
        number, folder = stopped.args
        if folder:
            print(f"\nStopped. Go on with: python train.py --resume {shlex.quote(str(folder))}")
        else:
            print("\nStopped before any step")
        return 128 + number
    except (checkpoint.CheckpointError, data.DataError, DeviceError, Diverged, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
