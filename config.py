"""Every setting of a run: edit a default here, or give it as a flag (`python train.py --epochs 20`)."""

import argparse
import math
import os
import re
import sys
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

# Read when torch is imported: this module comes first in every program. OpenMP's threads else spin so long that a
# step takes seconds on cores shared with one other busy process; on idle cores the difference is within the noise.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own traceback, but none after Ctrl-C or where a pipe's reader has gone (`| head`)."""
    if issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again at the end
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = show_error  # here, as the imports that follow take seconds


def setting(
    default: Any,
    text: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    choices: tuple = (),
    pattern: str = "",
    run: bool = False,
) -> Any:
    """A dataclass field with its default, its unit and meaning, and the values it allows.

    One marked `run` says where and how a run goes: it is no part of the recipe, and no named set fixes it.
    """
    limits = {"low": low, "high": high, "choices": choices, "pattern": pattern}
    return field(default=default, metadata={"text": text, "run": run, **limits})


@dataclass(frozen=True)
class Config:
    """All settings; raises ValueError with one line where a value has a wrong type, range or partner."""

    epochs: int = setting(140, "passes over the training images", 1, 100_000)
    batch_size: int = setting(128, "images a step", 2, 65_536)
    optimizer: str = setting("sgd", "adamw, or sgd with Nesterov momentum 0.9", choices=("adamw", "sgd"))
    lr: float = setting(0.2, "learning rate after warm-up, before decay", 1e-9, 1e3)
    weight_decay: float = setting(5e-4, "as torch's optimizer applies it", 0, 10)
    decay_norms: bool = setting(False, "weight decay on norms and biases too")
    schedule: str = setting("cosine", "decay of the learning rate: StepLR, or cosine to 0", choices=("step", "cosine"))
    lr_step: int = setting(0, "StepLR: epochs between decays; 0: 38/130 of the run", 0, 100_000)
    lr_gamma: float = setting(0.5, "StepLR: factor of each decay", 1e-6, 1)
    warmup_epochs: int = setting(2, "epochs of linear warm-up, at most a quarter of the run", 0, 1_000)
    label_smoothing: float = setting(0.1, "share of the target spread over all classes", 0, 0.99)
    dropout: float = setting(0.0, "probability, after each projection and before the classifier; 0: no module", 0, 0.95)
    ema: float = setting(
        0.999, "decay a step of the averaged weights that are validated and saved; 0: off", 0, 0.999999
    )
    flip: bool = setting(True, "mirror half of the images")
    crop_padding: int = setting(4, "pixels added on each side before a random 32x32 crop; 0: off", 0, 16)
    crop_reflect: bool = setting(True, "pad by reflection, not with black")
    trivial_augment: float = setting(1.0, "share of the images given one TrivialAugment operation", 0, 1)
    cutout: int = setting(0, "side in pixels of a square set to the mean colour; 0: off", 0, 32)
    mixup: float = setting(0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", 0, 100)
    cutmix: float = setting(0.0, "alpha of CutMix's Beta(alpha, alpha); 0: off", 0, 100)
    mix_share: float = setting(1.0, "share of the batches that mixup or CutMix changes", 0, 1)
    small_share: float = setting(0.5, "share of the epochs, rounded down, that train first on 24x24 pixels", 0, 1)
    validation_per_class: int = setting(50, "training images a class kept for validation; 0: train on all", 0, 499)

    experiment: str = setting("default", "name of the set that the run started from", pattern=r"[\w-]{1,40}", run=True)
    dataset: str = setting(
        "cifar100", "cifar100, or synthetic (no download)", choices=("cifar100", "synthetic"), run=True
    )
    images_per_class: int = setting(0, "use only so many training images a class; 0: all", 0, 500, run=True)
    seed: int = setting(0, "of weights, order and augmentation", 0, 1_000_000, run=True)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:\d{1,2})?", run=True)
    threads: int = setting(0, "CPU threads; 0: torch's choice, one a core", 0, 1_024, run=True)
    compile: bool = setting(False, "torch.compile the network; needs a C++ compiler, or Triton on a GPU", run=True)
    deterministic: bool = setting(False, "ask torch for deterministic CUDA kernels (slower)", run=True)
    data_dir: str = setting("data", "folder of the data set", run=True)
    runs_dir: str = setting("runs", "folder in which a run makes its own", run=True)

    def __post_init__(self) -> None:
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        if 0 < self.images_per_class <= self.validation_per_class:
            raise ValueError(
                f"images_per_class {self.images_per_class} must be above validation_per_class "
                f"{self.validation_per_class}, or nothing is left to train on"
            )
        if self.schedule == "cosine" and self.lr_step:
            raise ValueError(f"lr_step {self.lr_step} has no meaning with schedule cosine; use 0")


def check_value(f: Field, value: Any) -> None:
    """Raise ValueError unless `value` suits the field's type, range, choices and pattern."""
    allowed = (int, float) if f.type is float else f.type
    if not isinstance(value, allowed) or (isinstance(value, bool) and f.type is not bool):
        raise ValueError(f"{f.name} must be of type {f.type.__name__}, not {value!r}")
    limits = f.metadata
    if f.type in (int, float) and not limits["low"] <= value <= limits["high"]:  # false for NaN
        raise ValueError(f"{f.name} must be between {limits['low']:g} and {limits['high']:g}, not {value}")
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"{f.name} must be one of {', '.join(limits['choices'])}, not {value!r}")
    if limits["pattern"] and not re.fullmatch(limits["pattern"], value):
        raise ValueError(f"{f.name} {value!r} does not match: {limits['text']}")
    if f.type is str and not value:
        raise ValueError(f"{f.name} must not be empty")


# The experiments of the report: AdamW, learning rate 1e-2; batch size, weight decay (given for result5 only), no
# augmentation and the place of the dropout are assumed. A set fixes every field of the recipe.
REPORT: dict[str, Any] = {
    "epochs": 100, "batch_size": 128, "optimizer": "adamw", "lr": 1e-2, "weight_decay": 1e-4, "decay_norms": True,
    "schedule": "step", "lr_step": 35, "lr_gamma": 0.1, "warmup_epochs": 0, "label_smoothing": 0.0, "dropout": 0.0,
    "ema": 0.0, "flip": False, "crop_padding": 0, "crop_reflect": False, "trivial_augment": 0.0, "cutout": 0,
    "mixup": 0.0, "cutmix": 0.0, "mix_share": 1.0, "small_share": 0.0, "validation_per_class": 50,
}  # fmt: skip
# The published checkpoint's, on all 50,000 images; the defaults are the same with validation_per_class 50.
SCRATCH: dict[str, Any] = {
    "epochs": 140, "batch_size": 128, "optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4, "decay_norms": False,
    "schedule": "cosine", "lr_step": 0, "lr_gamma": 0.5, "warmup_epochs": 2, "label_smoothing": 0.1, "dropout": 0.0,
    "ema": 0.999, "flip": True, "crop_padding": 4, "crop_reflect": True, "trivial_augment": 1.0, "cutout": 0,
    "mixup": 0.0, "cutmix": 0.0, "mix_share": 1.0, "small_share": 0.5, "validation_per_class": 0,
}  # fmt: skip
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "result1": REPORT | {"lr_step": 40},
    "result2": REPORT,
    "result3": REPORT | {"dropout": 0.2},
    "result4": REPORT | {"dropout": 0.1},
    "result5": REPORT | {"lr_step": 38, "lr_gamma": 0.5},
    "result6": REPORT | {"lr_step": 38, "lr_gamma": 0.5, "epochs": 130},
    "scratch": SCRATCH,
}
# Claimed accuracy, on a validation file that was not published; result3's and result4's of the last epoch.
CLAIMED = {
    "result1": "83.35 %",
    "result2": "84.13 %",
    "result3": "62.02 %",
    "result4": "78.77 %",
    "result5": "85.62 %",
    "result6": "86.95 %",
}


MACHINE = {"device", "threads", "data_dir"}  # settings that a resumed run may change


def changes(config: Config) -> dict[str, Any]:
    """The settings that differ from the set that the run started from (from the defaults, where it is none)."""
    base = {f.name: f.default for f in fields(Config)} | EXPERIMENTS.get(config.experiment, {})
    base["experiment"] = config.experiment
    return {name: getattr(config, name) for name, value in base.items() if getattr(config, name) != value}


def restore(stored: dict[str, Any]) -> Config:
    """The settings that a run wrote; raises ValueError where they are not this version's, or wrong."""
    differing = sorted(stored.keys() ^ {f.name for f in fields(Config)})
    if differing:
        raise ValueError(f"written by another version of this program, which differs in {', '.join(differing)}")
    return Config(**stored)


def describe_sets(shipped: dict[str, Any]) -> str:
    """The named sets, their differences from the defaults, and their figures; `shipped` is a published checkpoint."""
    lines = []
    for name, recipe in EXPERIMENTS.items():
        differences = {f.name: recipe[f.name] for f in fields(Config) if recipe.get(f.name, f.default) != f.default}
        lines.append(f"{name}: {', '.join(f'{key}={value}' for key, value in differences.items()) or 'the defaults'}")
        if name in CLAIMED:
            lines.append(f"    claimed, on a validation file that was not published: {CLAIMED[name]}")
        if shipped["config"]["experiment"] == name and recipe.items() <= shipped["config"].items():
            lines.append(f"    measured on the official test set: {shipped['test']['accuracy']:.2f} %")
    return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    """argparse, with an error of one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of train.py: `config`, `given` (settings by flags), `resume`, `publish`, `list`, `seeds`."""
    parser = OneLineParser(
        prog="train.py",
        description="Train the MobileNetV3 of model.py on CIFAR-100. Constants: config.py.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120),
    )
    parser.add_argument(
        "--resume", type=Path, metavar="RUN_FOLDER", help="continue a run after its last finished epoch"
    )
    parser.add_argument(
        "--publish", type=Path, metavar="RUN_FOLDER", help="grade a finished run once and ship its best weights"
    )
    parser.add_argument("--list", action="store_true", help="list the named sets and their figures")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="train N seeds in turn, print mean and spread"
    )
    for f in fields(Config):
        text = f"{f.metadata['text']} [{f.default}]"
        if f.name == "experiment":
            help_text = f"start from a named set: {', '.join(EXPERIMENTS)}"
            parser.add_argument("--experiment", choices=tuple(EXPERIMENTS), default=argparse.SUPPRESS, help=help_text)
        elif f.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(f"--{f.name}", action=action, default=argparse.SUPPRESS, help=text)
        else:
            choices = f.metadata["choices"] or None
            metavar = None if choices else f.type.__name__.upper()
            options = {"type": f.type, "metavar": metavar, "choices": choices, "help": text}
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **options)
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    names = {f.name for f in fields(Config)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    actions = [arguments.list, arguments.publish, arguments.resume, arguments.seeds != 1]
    if sum(map(bool, actions)) > 1 or (given and (arguments.list or arguments.publish)):
        parser.error("--list and --publish take no other flag, --resume no --seeds")
    try:
        # A resumed run brings its own settings: those given are compared with them, but for the machine's.
        base = EXPERIMENTS.get(given.get("experiment", ""), {})
        config = Config(**({k: given[k] for k in MACHINE & given.keys()} if arguments.resume else base | given))
        replace(config, seed=config.seed + max(0, arguments.seeds - 1))
    except ValueError as error:
        parser.error(str(error))
    if not 1 <= arguments.seeds <= 100:
        parser.error(f"seeds must be between 1 and 100, not {arguments.seeds}")
    if arguments.seeds > 1 and not config.validation_per_class:
        parser.error("--seeds compares validation accuracies: validation_per_class must be above 0")
    arguments.config, arguments.given = config, given
    return arguments
