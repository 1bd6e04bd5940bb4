"""Every setting of a run: edit a default here, or give it as a flag (`python train.py --epochs 20`)."""

import argparse
import math
import re
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field: its default, its meaning, and what limits its values: min, max, choices or pattern; path marks
    a file or folder."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Config:
    """All settings. Raises ValueError with one line if a value is wrong or contradicts another.

    Relative paths are relative to the repository; a relative path in a flag is relative to the current folder.
    `experiment` only names the preset: parse_command_line applies it.
    """

    # The recipe: what is trained, and how.
    model: str = setting("mobilenetv3", "mobilenetv3, or any timm model by name", pattern=r"[\w.]+")
    image_size: int = setting(32, "side in pixels to which the model enlarges its images (32 = off)", min=32, max=1_024)
    pretrained: bool = setting(False, "start from timm's ImageNet weights of the model")
    weights: str = setting("none", "checkpoint or state dict to start from", path=True)
    epochs: int = setting(140, "passes over the training images", min=1, max=100_000)
    batch_size: int = setting(128, "images per training step", min=2, max=65_536)
    optimizer: str = setting(
        "adamw", "adamw, or sgd with Nesterov momentum (then --lr 0.2 --weight_decay 5e-4)", choices=("adamw", "sgd")
    )
    lr: float = setting(3e-3, "learning rate after warm-up and before decay", min=1e-9, max=1e3)
    weight_decay: float = setting(0.33, "weight decay; AdamW multiplies it by the learning rate", min=0, max=10)
    decay_norms: bool = setting(False, "apply weight decay to norms and biases too")
    schedule: str = setting("step", "StepLR, or cosine to 0", choices=("step", "cosine"))
    lr_step: int = setting(0, "StepLR: epochs between two decays (0 = a third of the run)", min=0, max=100_000)
    lr_gamma: float = setting(0.3, "StepLR: factor of the learning rate at each decay", min=1e-6, max=1)
    warmup_epochs: int = setting(4, "epochs of linear warm-up (capped at a quarter of the run)", min=0, max=1_000)
    label_smoothing: float = setting(0.1, "part of each target that is spread over all classes", min=0, max=0.99)
    teacher: str = setting("none", "checkpoint whose logits the model learns instead of the labels", path=True)
    dropout: float = setting(0.0, "dropout after each projection and before the classifier", min=0, max=0.95)
    ema: float = setting(0.999, "decay per step of the averaged weights (0 = off)", min=0, max=0.999999)
    flip: bool = setting(True, "mirror half of the images")
    crop_padding: int = setting(4, "pixels of reflection around an image before a random crop (0 = off)", min=0, max=16)
    trivial_augment: float = setting(1.0, "fraction of images that TrivialAugment changes", min=0, max=1)
    mixup: float = setting(0.0, "alpha of mixup's Beta(alpha, alpha) (0 = off)", min=0, max=100)
    cutmix: float = setting(0.0, "alpha of CutMix's Beta(alpha, alpha) (0 = off)", min=0, max=100)
    validation_per_class: int = setting(50, "training images per class kept for validation (0 = none)", min=0, max=499)
    amp: bool = setting(False, "bfloat16 autocast, on GPUs that have it")

    # The run: which data, which machine, where.
    experiment: str = setting(
        "default", "preset to start from: PRESETS in config.py; taught is slow without a GPU", pattern=r"[\w-]{1,40}"
    )
    dataset: str = setting("cifar100", "synthetic images need no download", choices=("cifar100", "synthetic"))
    images_per_class: int = setting(0, "training and validation images per class together (0 = all)", min=0, max=500)
    seed: int = setting(0, "seed of weights, order and augmentation", min=0, max=1_000_000)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"auto|cpu|mps|cuda(:\d{1,2})?")
    threads: int = setting(0, "CPU threads (0 = torch's choice, one per core)", min=0, max=1_024)
    compile: bool = setting(False, "use torch.compile, with CUDA graphs on a GPU")
    deterministic: bool = setting(False, "use deterministic CUDA kernels (slower)")
    tensorboard: bool = setting(False, "also write the log for TensorBoard")
    data_dir: str = setting("data", "folder of the data set", path=True)
    runs_dir: str = setting("runs", "folder in which each run makes its own", path=True)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            allowed = (int, float) if f.type is float else f.type
            if not isinstance(value, allowed) or (isinstance(value, bool) and f.type is not bool):
                raise ValueError(f"{f.name} must be of type {f.type.__name__}, not {value!r}")
            low, high = limits.get("min", -math.inf), limits.get("max", math.inf)
            if f.type in (int, float) and not low <= value <= high:  # false for NaN
                raise ValueError(f"{f.name} must be between {low:g} and {high:g}, not {value}")
            if "choices" in limits and value not in limits["choices"]:
                raise ValueError(f"{f.name} must be one of {', '.join(limits['choices'])}, not {value!r}")
            if "pattern" in limits and not re.fullmatch(limits["pattern"], value):
                raise ValueError(f"{f.name} {value!r} does not match: {limits['help']}")
        if self.pretrained and self.model == "mobilenetv3":
            raise ValueError("pretrained needs a timm model: there are no ImageNet weights of mobilenetv3")


# A recipe without any technique. The presets that start from it stay as they are if a default is edited. A new setting
# of the recipe needs its value here too.
PLAIN: dict[str, Any] = {
    "model": "mobilenetv3", "image_size": 32, "pretrained": False, "weights": "none", "epochs": 100, "batch_size": 128,
    "optimizer": "adamw", "lr": 1e-2, "weight_decay": 1e-4, "decay_norms": True, "schedule": "step", "lr_step": 35,
    "lr_gamma": 0.1, "warmup_epochs": 0, "label_smoothing": 0.0, "teacher": "none", "dropout": 0.0, "ema": 0.0,
    "flip": False, "crop_padding": 0, "trivial_augment": 0.0, "mixup": 0.0, "cutmix": 0.0, "validation_per_class": 50,
    "amp": False,
}  # fmt: skip
# `sgd` and `taught` start from the defaults above. `taught` needs requirements-tools.txt. Without a GPU it is slow, as
# its teacher computes at 128 pixels in every step. result1 to result6 are the experiments of a student's report: batch
# size, weight decay (given for result5 only), no augmentation and the position of the dropout are assumed. `teacher`
# fine-tunes an ImageNet network.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "sgd": {"optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4, "schedule": "cosine", "warmup_epochs": 2},
    "taught": {"teacher": "checkpoints/teacher.pth", "epochs": 200, "lr_step": 47, "amp": True},
    "result1": PLAIN | {"lr_step": 40},
    "result2": PLAIN,
    "result3": PLAIN | {"dropout": 0.2},
    "result4": PLAIN | {"dropout": 0.1},
    "result5": PLAIN | {"lr_step": 38, "lr_gamma": 0.5},
    "result6": PLAIN | {"lr_step": 38, "lr_gamma": 0.5, "epochs": 130},
    "teacher": PLAIN | {
        "model": "tf_efficientnet_lite0", "image_size": 128, "pretrained": True, "epochs": 8, "lr": 1e-3,
        "weight_decay": 0.02, "decay_norms": False, "schedule": "cosine", "warmup_epochs": 1, "ema": 0.998,
        "flip": True, "crop_padding": 4, "trivial_augment": 1.0, "amp": True,
    },
}  # fmt: skip
RESUMABLE = ("device", "threads", "data_dir", "compile", "tensorboard")  # a resumed run may change these


def describe(config: Config) -> str:
    """The preset and the settings in which a run differs from it."""
    start = {f.name: f.default for f in fields(Config)} | PRESETS.get(config.experiment, {})
    start |= {"experiment": config.experiment}
    changed = [f"{name}={getattr(config, name)}" for name in start if getattr(config, name) != start[name]]
    return ", ".join([config.experiment, *changed])


class OneLineParser(argparse.ArgumentParser):
    """argparse, with an error of one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} -h)\n")


def flag_path(text: str) -> str:
    """A path of the command line as Config has it: absolute, or relative to the repository if it lies in it, so that
    a copy of the repository can resume the run. "none" stays."""
    path, root = Path(text).expanduser().absolute(), Path(__file__).resolve().parent
    if path.is_relative_to(root):
        path = path.relative_to(root)
    return text if text == "none" else str(path)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """The flag --data_dir of a program that reads the data set."""
    default = str(Path(__file__).parent / Config.data_dir)  # argparse passes it to flag_path too
    parser.add_argument("--data_dir", type=flag_path, default=default, help="folder of the data set [%(default)s]")


def parse_command_line(argv: list[str] | None = None) -> tuple[Config | None, Path | None, dict[str, Any]]:
    """The command line of train.py: a new run's settings, or the folder of a run to resume; and what flags gave."""
    parser = OneLineParser(
        prog="train.py",
        description="Train the MobileNetV3 of model.py on CIFAR-100. The defaults are constants of config.py.",
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=36, width=120),
    )
    parser.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this folder, with its settings")
    for f in fields(Config):
        text = f"{f.metadata.get('help', '')} [{f.default}]".replace("%", "%%")
        options = {"default": argparse.SUPPRESS, "help": text}
        if f.type is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        elif choices := tuple(PRESETS) if f.name == "experiment" else f.metadata.get("choices"):
            options |= {"choices": choices}
        else:
            options |= {"type": flag_path if "path" in f.metadata else f.type, "metavar": f.type.__name__.upper()}
        parser.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    folder = given.pop("resume")
    if folder and (fixed := sorted(given.keys() - set(RESUMABLE))):
        parser.error(
            f"--resume allows only {', '.join(RESUMABLE)} with it, not {', '.join(fixed)}. "
            f"For other settings or more epochs start a new run with --weights {folder}/best.pth"
        )
    # A resumed run has its own settings: only its flags are checked here, whatever the defaults are.
    preset = PLAIN if folder else PRESETS.get(given.get("experiment", Config.experiment), {})
    try:
        config = Config(**preset | given)
    except (TypeError, ValueError) as error:  # TypeError: a preset names an unknown setting
        parser.error(str(error))
    if folder:
        return None, folder, given
    if config.schedule == "step" and config.lr_step >= config.epochs and "lr_step" not in given:
        parser.error(
            f"lr_step {config.lr_step} is not below {config.epochs} epochs: give --lr_step too (0 = a third of the run)"
        )
    return config, None, given
