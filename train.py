"""Train the model on CIFAR-100: `python train.py`. Every setting is a constant in config.py and a flag here."""

import copy
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from tqdm import tqdm

import checkpoint
import utils
from augment import Loader
from config import Config, describe, parse_command_line
from curves import draw_curves
from data import load_training
from distill import DistillationLoss
from evaluate import evaluate
from model import build_model
from utils import UserError

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # (images, logits, labels) to the batch's mean loss


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), or SGD with Nesterov momentum. Norms and biases have weight decay only if
    `decay_norms` is on."""
    decay = config.weight_decay
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": decay if config.decay_norms else 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, config.lr, fused=True)


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config) -> lr_scheduler.LRScheduler:
    """StepLR, or cosine to 0, stepped once per epoch, times a linear warm-up of at most a quarter of the run."""
    if config.schedule == "cosine":
        decay = lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    else:
        step = config.lr_step or math.ceil(config.epochs / 3)
        decay = lr_scheduler.StepLR(optimizer, step_size=step, gamma=config.lr_gamma)
    warmup_epochs = min(config.warmup_epochs, config.epochs // 4)
    if not warmup_epochs:
        return decay
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup_epochs + 1), total_iters=warmup_epochs)
    return lr_scheduler.ChainedScheduler([warmup, decay])


def build_criterion(config: Config, device: torch.device) -> Criterion:
    """Cross-entropy with label smoothing (Szegedy et al., 2016), or with a teacher the distance to its logits."""
    if config.teacher != "none":
        return DistillationLoss(utils.ROOT / config.teacher, device, config.compile)
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    return lambda images, logits, labels: cross_entropy(logits, labels)


class EMA:
    """Exponential moving average of a model's weights and batch-norm statistics (Tarvainen and Valpola, 2017).

    `model` is the averaged model; with decay 0 it is the model itself. The decay rises as (1 + t) / (10 + t) to its
    setting, so that the first random weights do not linger. torch's AveragedModel synchronises at each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model) if decay else model
        self.decay, self.updates = decay, 0
        self.averaged = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        self.current = [value for value in model.state_dict().values() if value.is_floating_point()]

    def update(self) -> None:
        """Take in the model's present weights."""
        if self.decay:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.averaged, self.current, 1 - decay)
            self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def batch_sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss, correct predictions and images of a batch, (3,), on its device; nothing waits for a GPU.

    Of mixed targets (N, 100) the larger part counts as the label.
    """
    labels = labels if labels.ndim == 1 else labels.argmax(1)
    count = torch.full_like(loss, len(labels))
    return torch.stack([loss.detach() * count, (logits.argmax(1) == labels).sum(), count])


def means(sums: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy in percent of summed `batch_sums`; waits for the device."""
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return loss, 100 * accuracy


def train_one_epoch(
    model: nn.Module, loader: Loader, criterion: Criterion, optimizer: torch.optim.Optimizer, ema: EMA, amp: bool
) -> tuple[float, float]:
    """Train on one epoch of the loader. Returns the mean loss and the accuracy in percent."""
    device = next(model.parameters()).device
    sums = torch.zeros(3, device=device)
    model.train()
    hidden = utils.rank() > 0 or None  # None: unless on a terminal
    total = len(loader) * loader.batch_size
    with tqdm(total=total, unit=" images", disable=hidden, leave=False, mininterval=0.5) as bar:
        for images, labels in loader:
            optimizer.zero_grad()  # before the forward pass: so a run takes 70 MiB less on a CPU
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(images)
                loss = criterion(images, logits, labels)
            loss.backward()
            optimizer.step()
            ema.update()
            sums += batch_sums(loss, logits, labels)
            if bar.update(loader.batch_size):  # the bar was drawn: twice a second, as reading waits for the device
                bar.set_postfix_str("loss {:.4f}, accuracy {:.2f}%".format(*means(sums)), refresh=False)
    if utils.world_size() > 1:
        torch.distributed.all_reduce(sums)
    return means(sums)


def finish(folder: Path, config: Config, history: checkpoint.History) -> None:
    """Say which epoch was the best, copy its weights to checkpoints/best.pth if they are those of our network on all of
    CIFAR-100, and draw the curves."""
    best = checkpoint.load(folder / "best.pth")["metrics"]
    accuracy = best["validation_accuracy"]
    validated = "without validation" if accuracy is None else f"validation accuracy {accuracy:.2f} %"
    print(f"Best epoch: {best['epoch']} of {config.epochs} ({validated})\nLog, curves, checkpoints: {folder}")
    run = (config.model, config.image_size, config.dataset, config.images_per_class)
    if run == ("mobilenetv3", 32, "cifar100", 0):
        weights = (folder / "best.pth").read_bytes()
        try:
            utils.atomic_write(checkpoint.BEST, lambda file: file.write(weights))
            print(f"{utils.shown(checkpoint.BEST)}, which pytest grades, is now the best of this run")
        except UserError:  # as in a checkout that is read-only
            print(f"{utils.shown(checkpoint.BEST)} cannot be written. The best of this run is in {folder}")
    draw_curves({folder.name: history}, folder / "curves.png")
    print(f"Grade it: python evaluate.py --checkpoint {shlex.quote(str(folder / 'best.pth'))}")


def train(config: Config, folder: Path | None = None) -> Path | None:
    """Train a new run, or resume the one in `folder`. Returns the run's folder. Raises UserError and OSError.

    A KeyboardInterrupt passes on after a line on how to resume: the epoch under way is repeated then.
    torchrun's processes all call this; the first one validates, prints, writes the files and knows the folder.
    """
    device = utils.choose_device(config.device)
    main_process = utils.rank() == 0
    resumed = folder is not None
    utils.set_up(config.threads, config.deterministic)
    with utils.first_process_first():
        train_set, validation = load_training(
            config.dataset, config.data_dir, config.validation_per_class, config.images_per_class
        )
    validation = validation.to(device)
    loader = Loader(train_set.to(device), config, utils.rank(), utils.world_size())
    torch.manual_seed(config.seed)
    model = build_model(config.model, config.dropout, config.image_size, config.pretrained and not resumed)
    if config.weights != "none" and not resumed:
        path = utils.ROOT / config.weights
        checkpoint.load_weights(model, checkpoint.load(path), path, fine_tune=True)
    model.to(device, memory_format=torch.channels_last)
    ema = EMA(model, config.ema)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config)
    # CPUs are slower in bfloat16.
    amp = config.amp and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    if config.amp and not amp:
        print(f"amp needs a GPU with bfloat16: training in float32 on {device}")
    criterion = build_criterion(config, device)
    stateful = {"model": model, "ema": ema, "optimizer": optimizer, "scheduler": scheduler}
    history = checkpoint.restore(folder, stateful) if resumed else []

    # What the loop calls; the names in a checkpoint are those of the model itself.
    wrapped_model = DistributedDataParallel(model) if utils.world_size() > 1 else model
    if config.compile:
        graphs = device.type == "cuda" and utils.world_size() == 1  # under DDP batch norm makes torch skip them
        wrapped_model = torch.compile(wrapped_model, dynamic=False, mode="reduce-overhead" if graphs else None)
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # optional
    if main_process and not resumed:
        folder = checkpoint.new_run(config)
    writer = SummaryWriter(folder) if config.tensorboard and main_process else None
    about = {"config": asdict(config), **utils.provenance(device)}  # read now, and with it the commit that trains
    print(f"Training {describe(config)} on {len(loader.labels)} {config.dataset} images")
    print(f"{config.epochs - len(history)} epochs left, on {about['machine']}\nRun folder: {folder}", flush=True)

    try:
        for epoch in range(len(history) + 1, config.epochs + 1):
            print(f"Epoch {epoch}/{config.epochs}")
            start, lr = time.perf_counter(), scheduler.get_last_lr()[0]
            loader.epoch = epoch - 1  # counted from 0
            loss, accuracy = train_one_epoch(wrapped_model, loader, criterion, optimizer, ema, amp)
            speed = len(loader) * loader.batch_size / (time.perf_counter() - start)
            scheduler.step()
            print(f"Train Loss: {loss:.4f}, Train Accuracy: {accuracy:.2f}%")
            scores = evaluate(ema.model, *validation) if config.validation_per_class and main_process else None
            if scores:
                print(f"Validation Loss: {scores.loss:.4f}, Validation Accuracy: {scores.top1:.2f}%")
            weights_norm = nn.utils.get_total_norm(ema.averaged).item()
            if not all(map(math.isfinite, (loss, weights_norm, *(scores or ())))):
                raise UserError(
                    f"the loss or a weight is not finite in epoch {epoch} at learning rate {lr:g}. "
                    "Earlier checkpoints stay as they are. Try a lower lr"
                )
            if not main_process:
                continue  # what follows must not wait for the other processes
            row = {
                "epoch": epoch,
                "lr": lr,
                "train_loss": loss,
                "train_accuracy": accuracy,
                "validation_loss": scores and scores.loss,
                "validation_accuracy": scores and scores.top1,
                "images_per_second": speed,
                "seconds": time.perf_counter() - start,
            }
            history.append(row)
            if checkpoint.save_epoch(folder, about, history, stateful):
                print("Saved Best Model")
            print(f"Learning Rate: {lr:.6f}", flush=True)
            if writer:
                for name, value in row.items():
                    if value is not None:
                        writer.add_scalar(name, value, epoch)
                writer.flush()
    except KeyboardInterrupt:
        if main_process and (folder / "last.pth").exists():
            finish(folder, config, history)
            print(f"Stopped. Resume with: python train.py --resume {shlex.quote(str(folder))}", flush=True)
        else:
            print("Stopped before an epoch was finished: start the run again", flush=True)
        raise
    if main_process:
        finish(folder, config, history)
    return folder


@utils.program("train.py")
def main(argv: list[str] | None = None) -> None:
    """Train or resume."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background jobs ignore Ctrl-C's signal otherwise
        signal.signal(number, signal.default_int_handler)
    config, folder, given = parse_command_line(argv)
    if folder:
        config = checkpoint.resumed_config(folder, given)
    with utils.process_group(config.device):
        train(config, folder)


if __name__ == "__main__":
    sys.exit(main())
