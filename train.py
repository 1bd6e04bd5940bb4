"""Train the model on CIFAR-100: `python train.py`. Every setting is a constant in config.py and a flag here."""

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or OpenMP's idle threads take the cores from other processes

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import utils
from augment import Loader, build_loader
from config import Config, changes, parse_command_line, restore_for_resume
from evaluate import Labelled, evaluate
from model import MobileNetV3
from optim import EMA, Criterion, build_criterion, build_optimizer, build_scheduler
from utils import History, UserError, program


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended the epoch under way. Holds the signal's number and the run's folder."""


class TrainState:
    """What a run carries from epoch to epoch: model, averaged weights, optimizer, schedule, scaler and history."""

    def __init__(self, config: Config, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.model = MobileNetV3(config.dropout).to(device, memory_format=torch.channels_last)
        cuda = device.type == "cuda"
        mode = "reduce-overhead" if cuda else "default"  # CUDA graphs on a GPU
        self.forward = torch.compile(self.model, dynamic=False, mode=mode) if config.compile else self.model
        self.ema = EMA(self.model, config.ema) if config.ema else None
        self.optimizer = build_optimizer(config, self.model)
        self.scheduler = build_scheduler(config, self.optimizer)
        dtype = torch.bfloat16 if not cuda or torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=cuda)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cuda and dtype is torch.float16)
        self.history: History = []

    @property
    def eval_model(self) -> torch.nn.Module:
        """The model that is validated and saved, in eval mode: the averaged one where there is one."""
        return (self.model if self.ema is None else self.ema.model).eval()

    def parts(self) -> dict[str, Any]:
        """Everything with a state, by its name in a checkpoint."""
        parts = {"network": self.model, "average": self.ema, "optimizer": self.optimizer}
        parts |= {"scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def load(self, content: dict[str, Any]) -> None:
        """Go on from the content of a last.pth."""
        for name, part in self.parts().items():
            if content["state"][name]:  # a scaler that is off has none
                part.load_state_dict(content["state"][name])
        self.history = content["history"]


class Meter:
    """Mean loss and accuracy of an epoch. The sums stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums, self.count = torch.zeros(2, device=device), 0

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch; of mixed targets (N, 100) the larger part counts as the label."""
        labels = labels if labels.ndim == 1 else labels.argmax(1)
        self.sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        self.count += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent; waits for the device."""
        loss, accuracy = (self.sums / self.count).tolist()
        return loss, 100 * accuracy


def train_one_epoch(state: TrainState, loader: Loader, criterion: Criterion) -> Meter:
    """Train on one epoch of the loader; its loss and accuracy."""
    meter = Meter(state.device)
    state.model.train()
    for images, labels in with_progress_bar(loader, meter):
        state.optimizer.zero_grad()
        with state.autocast:
            logits = state.forward(images)
            loss = criterion(images, logits, labels)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None:
            state.ema.update()
        meter.update(loss, logits, labels)  # stays on the device
    return meter


def with_progress_bar(loader: Loader, meter: Meter) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches, under a bar with loss, accuracy and the time left; on a terminal only."""
    total = len(loader) * loader.batch_size
    with tqdm(total=total, unit=" images", disable=None, leave=False, mininterval=0.5) as bar:
        for images, labels in loader:
            yield images, labels
            if bar.update(len(labels)):  # the bar was drawn: twice a second, as reading waits for the device
                loss, accuracy = meter.read()
                bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}%", refresh=False)


def check_finite(state: TrainState, loss: float, rate: float) -> None:
    """Raise UserError where the epoch's loss or a weight is NaN or infinite."""
    finite = torch.stack([value.isfinite().all() for value in state.eval_model.state_dict().values()]).all()
    if not (math.isfinite(loss) and finite):
        raise UserError(
            f"the loss or a weight is not finite in epoch {len(state.history) + 1} at learning rate {rate:g}: training "
            "stops, and the checkpoints of earlier epochs stay as they are. Try a lower lr"
        )


def fit(state: TrainState, loader: Loader, criterion: Criterion, validation: Labelled, folder: Path) -> None:
    """Train the epochs that are left; after each, print its lines and write the run folder's files."""
    config, drawn = state.config, time.monotonic()
    validated = config.validation_per_class > 0
    for epoch in range(len(state.history) + 1, config.epochs + 1):
        print(f"Epoch {epoch}/{config.epochs}")
        start, rate = time.perf_counter(), state.scheduler.get_last_lr()[0]
        loader.set_epoch(epoch - 1)
        meter = train_one_epoch(state, loader, criterion)
        loss, accuracy = meter.read()
        speed = meter.count / (time.perf_counter() - start)
        check_finite(state, loss, rate)
        print(f"Train Loss: {loss:.4f}, Train Accuracy: {accuracy:.2f}%")
        row = dict.fromkeys(checkpoint.COLUMNS)
        row.update(epoch=epoch, lr=rate, train_loss=loss, train_accuracy=accuracy, images_per_second=speed)
        if validated:
            scores = evaluate(state.eval_model, validation)
            print(f"Validation Loss: {scores.loss:.4f}, Validation Accuracy: {scores.top1:.2f}%")
            row.update(validation_loss=scores.loss, validation_accuracy=scores.top1)
        state.history.append(row | {"seconds": time.perf_counter() - start})
        state.scheduler.step()
        better = utils.best_row(state.history) is state.history[-1] if validated else epoch == config.epochs
        weights = state.eval_model.state_dict() if better else None
        parts = {name: part.state_dict() for name, part in state.parts().items()}
        checkpoint.save_epoch(folder, asdict(config), state.history, parts, weights)
        if better and config.dataset != "synthetic":
            checkpoint.update_best(folder)
        if better and validated:
            print("Saved Best Model")
        print(f"Learning Rate: {state.scheduler.get_last_lr()[0]:.6f}", flush=True)
        if time.monotonic() - drawn > 60:  # drawing takes half a second
            utils.draw_curves({folder.name: state.history}, folder / "curves.png")
            drawn = time.monotonic()


def train(config: Config, folder: Path | None = None) -> Path:
    """Train, or go on with the run in `folder`; the run's folder. Raises UserError, and Stopped on Ctrl-C."""
    device = utils.choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matrix products
        torch.use_deterministic_algorithms(True)
    loader, validation = build_loader(config, device)
    state, criterion = TrainState(config, device), build_criterion(config)
    if folder is None:
        name = config.experiment + "-synthetic" * (config.dataset == "synthetic")
        folder = checkpoint.new_run(config.runs_dir, name, asdict(config))
    with utils.locked(folder):
        utils.remove_partial(folder)
        if (folder / "last.pth").exists():
            state.load(checkpoint.load(folder / "last.pth"))
        announce(state, len(loader.labels), folder)
        try:
            fit(state, loader, criterion, validation, folder)
            checkpoint.write_log(folder / "log.csv", state.history)  # again: a crash may have come before it
            utils.draw_curves({folder.name: state.history}, folder / "curves.png")
            if config.dataset != "synthetic":
                checkpoint.update_best(folder)  # another run may have written its own meanwhile
        except KeyboardInterrupt as interrupt:
            raise Stopped(*(interrupt.args or [signal.SIGINT]), folder) from None
    return folder


def announce(state: TrainState, images: int, folder: Path) -> None:
    """Print what is trained, with which changed settings, and where."""
    config, device = state.config, state.device
    changed = ", ".join(f"{name}={value}" for name, value in changes(config).items())
    print(f"Training {config.experiment} ({changed or 'nothing changed'}) on {images} {config.dataset} images")
    cpu = f"{torch.get_num_threads()} CPU threads (no GPU is used)"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    print(f"{config.epochs - len(state.history)} epochs to go on {where}\nRun folder: {folder}", flush=True)


def summary(folder: Path) -> str:
    """What a finished run gave, where it is, and what to type next."""
    best = checkpoint.load(folder / "best.pth")
    accuracy, data_dir = best["metrics"]["validation_accuracy"], best["config"]["data_dir"]
    elsewhere = f" --data_dir {shlex.quote(data_dir)}" * (data_dir != Config.data_dir)
    validated = "the last, without validation" if accuracy is None else f"validation accuracy {accuracy:.2f} %"
    return (
        f"Best epoch: {best['epoch']} of {best['config']['epochs']} ({validated})\n"
        f"Log, curves and checkpoints: {folder}\n"
        f"Grade it: python evaluate.py --checkpoint {shlex.quote(str(folder / 'best.pth'))}{elsewhere}"
    )


def resumed_config(folder: Path, given: dict[str, Any]) -> Config:
    """The settings of the run in `folder`. Raises UserError where a given one differs from the run's."""
    try:
        return restore_for_resume(checkpoint.read_settings(folder), given)
    except ValueError as error:
        raise UserError(f"{folder} cannot go on: {error}") from error


def interrupt(number: int, frame: object) -> NoReturn:
    """The handler of SIGINT and SIGTERM: an interrupted epoch is repeated, and no file is ever half-written."""
    raise KeyboardInterrupt(number)


@program("train.py")
def main(argv: list[str] | None = None) -> int:
    """Train or resume; the exit code."""
    arguments = parse_command_line(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    utils.keep_freed_memory()
    try:
        config = resumed_config(arguments.resume, arguments.given) if arguments.resume else arguments.config
        print(summary(train(config, arguments.resume)))
    except Stopped as stopped:
        number, folder = stopped.args
        print(f"\nStopped. Go on with: python train.py --resume {shlex.quote(str(folder))}")
        return 128 + number
    except KeyboardInterrupt as stopped:
        print("\nStopped before any step")
        return 128 + stopped.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
