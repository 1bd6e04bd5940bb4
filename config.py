"""Every setting of a run: edit a default here, or give it as a flag (`python train.py --epochs 20`)."""

import argparse
import math
import re
import textwrap
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn


def setting(
    default: Any,
    help: str,
    base: Any = MISSING,
    *,
    min: float = -math.inf,
    max: float = math.inf,
    choices: tuple = (),
    pattern: str = "",
    recipe: bool = True,
) -> Any:
    """A dataclass field: its default, its unit and meaning, and the values that it allows.

    `base` is its value in the base recipe, in which every technique is off: presets start from there, and an older
    run that lacks the setting has it. With `recipe` False it is a setting of the machine or the run, not of the
    training recipe, and needs no `base`.
    """
    if recipe and base is MISSING:
        raise TypeError(f"the setting with the help {help!r} needs a base, the value that turns it off")
    metadata = {"help": help, "min": min, "max": max, "choices": choices, "pattern": pattern, "recipe": recipe}
    return field(default=default, metadata=metadata | {"base": default if base is MISSING else base})


DISTILL_LOSSES = ("kl", "standardised", "mse")


@dataclass(frozen=True)
class Config:
    """All settings. Raises ValueError with one line where a value is wrong or contradicts another."""

    model: str = setting("mobilenetv3", "mobilenetv3, or any timm model by name", base="mobilenetv3", pattern=r"[\w.]+")
    image_size: int = setting(32, "enlarge images to so many pixels a side; 32: off", base=32, min=32, max=1_024)
    pretrained: bool = setting(False, "start from timm's ImageNet weights of the model", base=False)
    weights: str = setting("none", "file of weights to start from: safetensors or a state dict", base="none")
    epochs: int = setting(140, "passes over the training images", base=100, min=1, max=100_000)
    batch_size: int = setting(128, "images in one training step", base=128, min=2, max=65_536)
    optimizer: str = setting("sgd", "optimizer; sgd has Nesterov momentum 0.9", base="adamw", choices=("adamw", "sgd"))
    lr: float = setting(0.2, "learning rate after warm-up and before decay", base=1e-2, min=1e-9, max=1e3)
    weight_decay: float = setting(5e-4, "weight decay, as torch's optimizer applies it", base=1e-4, min=0, max=10)
    decay_norms: bool = setting(False, "apply weight decay to norms and biases too", base=True)
    schedule: str = setting("cosine", "how the learning rate decays", base="step", choices=("step", "cosine"))
    lr_step: int = setting(0, "StepLR: epochs between decays; 0: 38/130 of the run", base=35, min=0, max=100_000)
    lr_gamma: float = setting(0.5, "StepLR: factor of the learning rate in each decay", base=0.1, min=1e-6, max=1)
    warmup_epochs: int = setting(2, "epochs of warm-up, at most a quarter of the run", base=0, min=0, max=1_000)
    label_smoothing: float = setting(0.1, "part of a target spread over all classes", base=0.0, min=0, max=0.99)
    teacher: str = setting("none", "checkpoint of the model to learn from; none: off", base="none")
    distill_loss: str = setting("standardised", "how logits are compared", base="standardised", choices=DISTILL_LOSSES)
    distill_temperature: float = setting(2.0, "temperature that divides the logits of both", base=2.0, min=0.1, max=100)
    label_weight: float = setting(0.0, "weight of the labels' loss beside the teacher's", base=0.0, min=0, max=100)
    teacher_views: int = setting(0, "repeat the augmented views every N epochs; 0: never", base=0, min=0, max=1_000)
    dropout: float = setting(0.0, "dropout after each projection and before the classifier", base=0.0, min=0, max=0.95)
    ema: float = setting(0.999, "decay of the EMA weights in each step; 0: off", base=0.0, min=0, max=0.999999)
    flip: bool = setting(True, "mirror half of the images", base=False)
    crop_padding: int = setting(4, "pixels of padding before a random 32x32 crop; 0: off", base=0, min=0, max=16)
    crop_reflect: bool = setting(True, "pad by reflection, not with black", base=False)
    trivial_augment: float = setting(1.0, "fraction of images that TrivialAugment changes", base=0.0, min=0, max=1)
    cutout: int = setting(0, "side in pixels of a square set to the mean colour; 0: off", base=0, min=0, max=32)
    mixup: float = setting(0.0, "alpha of mixup's Beta(alpha, alpha); 0: off", base=0.0, min=0, max=100)
    cutmix: float = setting(0.0, "alpha of CutMix's Beta(alpha, alpha); 0: off", base=0.0, min=0, max=100)
    mix_prob: float = setting(1.0, "probability that mixup or CutMix changes a batch", base=1.0, min=0, max=1)
    small_fraction: float = setting(0.5, "first fraction of the epochs, with 24x24 pixels", base=0.0, min=0, max=1)
    validation_per_class: int = setting(50, "images a class kept for validation; 0: none", base=50, min=0, max=499)

    experiment: str = setting("default", "preset that the run started from", pattern=r"[\w-]{1,40}", recipe=False)
    dataset: str = setting("cifar100", "synthetic needs no download", choices=("cifar100", "synthetic"), recipe=False)
    images_per_class: int = setting(0, "use so many training images a class; 0: all", min=0, max=500, recipe=False)
    seed: int = setting(0, "seed of weights, order and augmentation", min=0, max=1_000_000, recipe=False)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:\d{1,2})?", recipe=False)
    threads: int = setting(0, "CPU threads; 0: torch's choice, one a core", min=0, max=1_024, recipe=False)
    compile: bool = setting(False, "use torch.compile (needs a C++ compiler, or Triton on a GPU)", recipe=False)
    deterministic: bool = setting(False, "ask torch for deterministic CUDA kernels (slower)", recipe=False)
    tensorboard: bool = setting(False, "write the log to the run folder for TensorBoard too", recipe=False)
    data_dir: str = setting("data", "folder of the data set", recipe=False)
    runs_dir: str = setting("runs", "folder in which a run makes its own", recipe=False)

    def __post_init__(self) -> None:
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        count, kept = self.images_per_class, self.validation_per_class
        if 0 < count <= kept:
            raise ValueError(f"images_per_class {count} must be above validation_per_class {kept}, or 0 for all")
        if self.schedule == "cosine" and self.lr_step:
            raise ValueError(f"lr_step {self.lr_step} has no meaning with schedule cosine; use 0")
        if self.pretrained and self.model == "mobilenetv3":
            raise ValueError("pretrained needs a timm model: there are no ImageNet weights of mobilenetv3")
        if self.teacher_views and self.teacher == "none":
            raise ValueError(f"teacher_views {self.teacher_views} needs a teacher: it repeats what the model sees")
        if self.teacher_views and self.dropout:
            raise ValueError("teacher_views needs dropout 0: dropout and mixing share one random generator")

    @property
    def updates_best(self) -> bool:
        """Whether the best weights also go to checkpoints/best.pth: those of our network on 32x32 real images."""
        return self.dataset != "synthetic" and (self.model, self.image_size) == ("mobilenetv3", 32)


def check_value(f: Field, value: Any) -> None:
    """Raise ValueError unless `value` suits the field's type, range, choices and pattern."""
    allowed = (int, float) if f.type is float else f.type
    if not isinstance(value, allowed) or (isinstance(value, bool) and f.type is not bool):
        raise ValueError(f"{f.name} must be of type {f.type.__name__}, not {value!r}")
    limits = f.metadata
    if f.type in (int, float) and not limits["min"] <= value <= limits["max"]:  # false for NaN
        raise ValueError(f"{f.name} must be between {limits['min']:g} and {limits['max']:g}, not {value}")
    if limits["choices"] and value not in limits["choices"]:
        raise ValueError(f"{f.name} must be one of {', '.join(limits['choices'])}, not {value!r}")
    if limits["pattern"] and not re.fullmatch(limits["pattern"], value):
        raise ValueError(f"{f.name} {value!r} does not match: {limits['help']}")
    if f.type is str and not value:
        raise ValueError(f"{f.name} must not be empty")


BASE_RECIPE = {f.name: f.metadata["base"] for f in fields(Config) if f.metadata["recipe"]}  # every technique is off
# A preset is the base recipe with these changes. Editing a default changes no preset.
# result1 to result6 are the experiments of the report: AdamW, learning rate 1e-2. Batch size, weight decay (given for
# result5 only), no augmentation and the position of the dropout are assumed. scratch and taught made the shipped
# weights without and with a teacher; teacher fine-tunes a network that was trained on ImageNet.
SCRATCH = {
    "epochs": 140, "optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4, "decay_norms": False, "schedule": "cosine",
    "lr_step": 0, "lr_gamma": 0.5, "warmup_epochs": 2, "label_smoothing": 0.1, "ema": 0.999, "flip": True,
    "crop_padding": 4, "crop_reflect": True, "trivial_augment": 1.0, "small_fraction": 0.5, "validation_per_class": 0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "result1": {"lr_step": 40},
    "result2": {},
    "result3": {"dropout": 0.2},
    "result4": {"dropout": 0.1},
    "result5": {"lr_step": 38, "lr_gamma": 0.5},
    "result6": {"lr_step": 38, "lr_gamma": 0.5, "epochs": 130},
    "scratch": SCRATCH,
    "taught": SCRATCH | {
        "epochs": 110, "teacher": "checkpoints/teacher.pth", "distill_loss": "standardised", "distill_temperature": 2.0,
        "label_weight": 0.0, "teacher_views": 14, "validation_per_class": 50,
    },
    "teacher": {
        "model": "tf_efficientnet_lite0", "image_size": 128, "pretrained": True, "epochs": 8, "lr": 1e-3,
        "weight_decay": 0.02, "decay_norms": False, "schedule": "cosine", "lr_step": 0, "lr_gamma": 0.5,
        "warmup_epochs": 1, "ema": 0.998, "flip": True, "crop_padding": 4, "crop_reflect": True, "trivial_augment": 1.0,
    },
}  # fmt: skip
OLD_NAMES = {"mix_share": "mix_prob", "small_share": "small_fraction"}  # still read from older runs and checkpoints
MACHINE = {"device", "threads", "data_dir", "compile", "tensorboard"}  # a resumed run may change these


def preset(name: str) -> dict[str, Any]:
    """The whole recipe of a preset. Raises ValueError where it has a setting that there is not."""
    if unknown := sorted(PRESETS[name].keys() - BASE_RECIPE.keys()):
        raise ValueError(f"preset {name} in config.py has unknown settings: {', '.join(unknown)}")
    return BASE_RECIPE | PRESETS[name]


def changes(config: Config) -> dict[str, Any]:
    """The settings that differ from the preset that the run started from (from the defaults, where it is none)."""
    start = {f.name: f.default for f in fields(Config)} | {"experiment": config.experiment}
    if config.experiment in PRESETS:
        start |= preset(config.experiment)
    return {name: getattr(config, name) for name, value in start.items() if getattr(config, name) != value}


def describe(config: Config) -> str:
    """What is trained: the preset and the settings that differ from it, but for those of the machine."""
    changed = {name: value for name, value in changes(config).items() if name not in MACHINE | {"runs_dir"}}
    return ", ".join([config.experiment, *(f"{name}={value}" for name, value in changed.items())])


def restore(stored: dict[str, Any]) -> Config:
    """The settings that a run wrote. One that an older run lacks has its base value, "off". Raises ValueError."""
    if not isinstance(stored, dict):
        raise ValueError("there are no settings in it")
    stored = {OLD_NAMES.get(name, name): value for name, value in stored.items()}
    if unknown := sorted(stored.keys() - {f.name for f in fields(Config)}):
        names = ", ".join(unknown)
        raise ValueError(f"config.py does not know {names}: of a newer version, or renamed (then see OLD_NAMES there)")
    return Config(**{f.name: f.metadata["base"] for f in fields(Config)} | stored)


def resume(stored: dict[str, Any], given: dict[str, Any]) -> Config:
    """The settings that a run wrote, with the given ones of MACHINE. Raises ValueError where another one differs."""
    config = restore(stored)
    changed = {name: value for name, value in given.items() if getattr(config, name) != value}
    if differing := changed.keys() - MACHINE:
        text = ", ".join(f"{name} {getattr(config, name)} (now {given[name]})" for name in sorted(differing))
        raise ValueError(f"it was started with other settings: {text}")
    return replace(config, **changed)


def describe_presets() -> str:
    """The base recipe, and a line for each preset: what it changes in it."""
    lines = ["presets (figures: docs/results.md):"]
    for name, recipe in {"the base recipe": BASE_RECIPE, **PRESETS}.items():
        text = f"{name}: " + (", ".join(f"{key}={value}" for key, value in recipe.items()) or "the base recipe")
        lines.append(textwrap.fill(text, 120, initial_indent="  ", subsequent_indent="    "))
    return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    """argparse, with an error of one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of train.py: `config`, `given` (the settings that flags gave) and `resume`."""
    parser = OneLineParser(
        prog="train.py",
        description="Train the MobileNetV3 of model.py on CIFAR-100. The defaults are constants of config.py.",
        epilog=describe_presets(),
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    for f in fields(Config):
        options = {"default": argparse.SUPPRESS, "help": f"{f.metadata['help']} [{f.default}]"}
        if f.name == "experiment":
            options |= {"choices": tuple(PRESETS), "help": "start from a preset, see below"}
        elif f.type is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif f.metadata["choices"]:
            options |= {"choices": f.metadata["choices"]}
        else:
            options |= {"type": f.type, "metavar": f.type.__name__.upper()}
        parser.add_argument(f"--{f.name}", **options)
    arguments = parser.parse_args(argv)
    given = {f.name: getattr(arguments, f.name) for f in fields(Config) if hasattr(arguments, f.name)}
    try:
        # A resumed run brings its own settings; only the machine's are checked here.
        start = preset(given["experiment"]) if "experiment" in given else {}
        config = restore({k: given[k] for k in MACHINE & given.keys()}) if arguments.resume else Config(**start | given)
        if config.label_weight and config.teacher == "none":  # an older run may have it, and was trained without
            raise ValueError(f"label_weight {config.label_weight:g} needs a teacher: without one give 0")
    except ValueError as error:
        parser.error(str(error))
    return argparse.Namespace(config=config, given=given, resume=arguments.resume)
