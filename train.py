"""Train the model on CIFAR-100: `python train.py`. Every setting is a constant in config.py and a flag here."""

import json
import math
import os
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or OpenMP's idle threads take the cores from other processes

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import utils
from augment import SIDE, SMALL_SIDE, Loader, build_loader
from checkpoint import History
from config import Config, describe, parse_command_line, resume
from evaluate import Meter, evaluate, load_model
from model import build_model, load_weights
from optim import EMA, Criterion, Teacher, build_criterion, build_optimizer, build_scheduler
from utils import UserError, program, progress_bar


class TrainState:
    """What a run carries from epoch to epoch: model, EMA weights, optimizer, schedule, scaler and history."""

    def __init__(self, config: Config, device: torch.device, folder: Path | None = None) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        resumed = folder is not None and (folder / "last.pth").exists()
        self.model = new_model(config, resumed).to(device, memory_format=torch.channels_last)
        # What the loop calls; the names in the state_dict are those of the model itself.
        self.wrapped_model = DistributedDataParallel(self.model) if utils.world_size() > 1 else self.model
        cuda = device.type == "cuda"
        if config.compile:  # with CUDA graphs on a GPU
            mode = "reduce-overhead" if cuda else "default"
            self.wrapped_model = torch.compile(self.wrapped_model, dynamic=False, mode=mode)
        self.ema = EMA(self.model, config.ema) if config.ema else None
        self.optimizer = build_optimizer(config, self.model)
        self.scheduler = build_scheduler(config, self.optimizer)
        dtype = torch.bfloat16 if not cuda or torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        self.autocast = torch.autocast(device.type, dtype=dtype, enabled=cuda)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cuda and dtype is torch.float16)
        self.teacher: Teacher | None = None
        if config.teacher != "none":
            kept = folder / "teacher.pth" if folder else None
            path = kept if kept and kept.exists() else Path(config.teacher)
            self.teacher = Teacher(load_model(path)[0], device, dtype, config.compile)
        self.history: History = []

    @property
    def eval_model(self) -> torch.nn.Module:
        """The model that is validated and saved: the EMA's where there is one."""
        return self.model if self.ema is None else self.ema.model

    def parts(self) -> dict[str, Any]:
        """Everything with a state, by its name in a checkpoint."""
        parts = {"network": self.model, "average": self.ema, "optimizer": self.optimizer}
        parts |= {"scheduler": self.scheduler, "scaler": self.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def load(self, content: dict[str, Any], folder: Path) -> None:
        """Go on from the content of a folder's last.pth. Raises UserError."""
        try:
            resume(content["config"], asdict(self.config))  # raises where the run's config.json was edited since
            for name, part in self.parts().items():
                if content["state"][name]:  # a scaler that is off has none
                    part.load_state_dict(content["state"][name])
            self.history = content["history"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{folder} cannot go on, its last.pth does not fit: {utils.one_line(error)}") from error


def new_model(config: Config, resumed: bool) -> torch.nn.Module:
    """The model that a run starts from; a resumed one takes its weights from last.pth. Raises UserError."""
    try:
        side = SMALL_SIDE if config.small_fraction else SIDE
        model = build_model(config.model, config.dropout, config.image_size, config.pretrained and not resumed, side)
        if config.weights != "none" and not resumed:
            taken, count = load_weights(model, checkpoint.read_weights(Path(config.weights)))
            print(f"Starting from {config.weights}: {taken} of the model's {count} tensors")
    except ValueError as error:
        raise UserError(f"the model cannot be made: {error}") from error
    return model


def train_one_epoch(state: TrainState, loader: Loader, criterion: Criterion) -> Meter:
    """Train on one epoch of the loader. Returns its loss and accuracy."""
    meter = Meter(state.device)
    state.model.train()
    for images, labels in progress_bar(loader, meter):
        state.optimizer.zero_grad()
        with state.autocast:
            logits = state.wrapped_model(loader.resize(images))
            loss = criterion(images, logits, labels)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None:
            state.ema.update()
        meter.update(loss, logits, labels)  # stays on the device
    meter.all_reduce()
    return meter


def check_finite(state: TrainState, loss: float, epoch: int) -> None:
    """Raise UserError where the epoch's loss or a weight is NaN or infinite."""
    finite = torch.stack([value.isfinite().all() for value in state.eval_model.state_dict().values()]).all()
    if not (math.isfinite(loss) and finite):
        raise UserError(
            f"the loss or a weight is not finite in epoch {epoch} at learning rate "
            f"{state.scheduler.get_last_lr()[0]:g}. Earlier checkpoints stay as they are. Try a lower lr"
        )


def fit(
    state: TrainState, loader: Loader, criterion: Criterion, validation: tuple[Tensor, Tensor], folder: Path
) -> None:
    """Train the epochs that are left; after each, the first process prints its lines and writes the run's files."""
    config, first, last_drawn = state.config, utils.rank() == 0, time.monotonic()
    writer = utils.open_tensorboard(folder, len(state.history) + 1) if config.tensorboard and first else None
    for epoch in range(len(state.history) + 1, config.epochs + 1):
        print(f"Epoch {epoch}/{config.epochs}")
        start = time.perf_counter()
        loader.set_epoch(epoch - 1)
        if state.teacher is not None:
            path = folder / f"logits-{loader.cache_key}.pth"
            cached_logits = checkpoint.load_logits(path) if config.teacher_views else None
            state.teacher.start_epoch(cached_logits)
        meter = train_one_epoch(state, loader, criterion)
        if state.teacher is not None and config.teacher_views and cached_logits is None:
            checkpoint.save(path, {"logits": torch.stack(state.teacher.new_logits)})
        loss, accuracy = meter.compute()
        speed = meter.count / (time.perf_counter() - start)
        check_finite(state, loss, epoch)
        row = dict.fromkeys(checkpoint.COLUMNS)
        row |= {"epoch": epoch, "lr": state.scheduler.get_last_lr()[0], "train_loss": loss, "train_accuracy": accuracy}
        state.scheduler.step()
        if not first:
            continue  # what follows must not wait for the other processes
        print(f"Train Loss: {loss:.4f}, Train Accuracy: {accuracy:.2f}%")
        if config.validation_per_class:
            scores = evaluate(state.eval_model, *validation)
            print(f"Validation Loss: {scores.loss:.4f}, Validation Accuracy: {scores.top1:.2f}%")
            row |= {"validation_loss": scores.loss, "validation_accuracy": scores.top1}
        state.history.append(row | {"images_per_second": speed, "seconds": time.perf_counter() - start})
        if writer:
            for name, value in state.history[-1].items():
                if value is not None:
                    writer.add_scalar(name, value, epoch)
        parts = {name: part.state_dict() for name, part in state.parts().items()}
        best = checkpoint.save_epoch(folder, asdict(config), state.history, parts, state.eval_model.state_dict())
        if best and config.updates_best:
            checkpoint.copy(folder / "best.pth", checkpoint.BEST)
        if best and config.validation_per_class:
            print("Saved Best Model")
        print(f"Learning Rate: {row['lr']:.6f}", flush=True)
        if time.monotonic() - last_drawn > 60:  # drawing takes half a second
            checkpoint.draw_curves({folder.name: state.history}, folder / "curves.png")
            last_drawn = time.monotonic()


def train(config: Config, folder: Path | None = None) -> Path:
    """Train a new run, or go on with the one in `folder`. Returns the run's folder. Raises UserError.

    On Ctrl-C and SIGTERM it prints how to go on and raises KeyboardInterrupt: the epoch under way is repeated then.
    Each of several processes calls this; the first one writes the files.
    """
    try:
        device = utils.setup_torch(config.device, config.threads, config.deterministic)
        loader, validation = build_loader(config, device, utils.rank(), utils.world_size())
        state = TrainState(config, device, folder)
        if folder is None:
            name = config.experiment if config.dataset == "cifar100" else f"{config.experiment}-{config.dataset}"
            folder = utils.broadcast(checkpoint.new_run(config.runs_dir, name) if utils.rank() == 0 else None)
        with utils.locked(folder) if utils.rank() == 0 else nullcontext():
            if (folder / "last.pth").exists():
                state.load(checkpoint.load(folder / "last.pth"), folder)
            if utils.rank() == 0:
                utils.remove_partial(folder)
                settings = json.dumps(asdict(config), indent=1).encode()
                utils.atomic_write(folder / "config.json", lambda file: file.write(settings))
                if state.teacher is not None and not (folder / "teacher.pth").exists():
                    checkpoint.copy(Path(config.teacher), folder / "teacher.pth")
            print(f"Training {describe(config)} on {len(loader.labels)} {config.dataset} images")
            machine = utils.provenance(config.device)["machine"]  # read now, and with it the commit that trains
            print(f"{config.epochs - len(state.history)} epochs to go on {machine}\nRun folder: {folder}", flush=True)
            fit(state, loader, build_criterion(config, state.teacher), validation, folder)
            if utils.rank() == 0:  # again, as a crash may have come before it, or another run after it
                checkpoint.write_log(folder / "log.csv", state.history)
                checkpoint.draw_curves({folder.name: state.history}, folder / "curves.png")
                if config.updates_best:
                    checkpoint.copy(folder / "best.pth", checkpoint.BEST)
    except KeyboardInterrupt:
        go_on = f"Go on with: python train.py --resume {shlex.quote(str(folder))}"
        print(f"\nStopped. {go_on}" if folder else "\nStopped before any step", flush=True)
        raise
    except RuntimeError as error:
        if any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory")):
            raise UserError("too little memory for this run. Free some, or start with a lower --batch_size") from error
        if config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise UserError(f"torch.compile failed: {utils.one_line(error)}. Train without --compile") from error
        raise
    return folder


def summary(folder: Path, config: Config) -> str:
    """What a finished run gave, where it is, and what to type next."""
    best = checkpoint.load(folder / "best.pth")
    accuracy = best["metrics"]["validation_accuracy"]
    elsewhere = "" if config.data_dir == Config.data_dir else f" --data_dir {shlex.quote(config.data_dir)}"
    validated = "the last, without validation" if accuracy is None else f"validation accuracy {accuracy:.2f} %"
    return (
        f"Best epoch: {best['epoch']} of {config.epochs} ({validated})\n"
        f"Log, curves and checkpoints: {folder}\n"
        f"Grade it: python evaluate.py --checkpoint {shlex.quote(str(folder / 'best.pth'))}{elsewhere}"
    )


def resumed_config(folder: Path, given: dict[str, Any]) -> Config:
    """The settings of the run in `folder`, with the given ones of config.MACHINE. Raises UserError."""
    try:
        return resume(json.loads((folder / "config.json").read_text()), given)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot go on: {error}") from error


@program("train.py")
def main(argv: list[str] | None = None) -> int:
    """Train or resume. Returns the exit code."""
    arguments = parse_command_line(argv)
    utils.stop_on_signals()
    utils.keep_freed_memory()
    config = resumed_config(arguments.resume, arguments.given) if arguments.resume else arguments.config
    with utils.process_group(config.device):
        folder = train(config, arguments.resume)
        if utils.rank() == 0:
            print(summary(folder, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
