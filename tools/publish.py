"""Grade a finished run once on the official test set and record it: python -m tools.publish RUN.

Writes docs/results/NAME.json, docs/logs/NAME.csv and docs/curves/NAME.png; with --ship FILE the weights too.
"""

import json
import os
import re
import shlex
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or OpenMP's idle threads take the cores from other processes

import torch
from torch import Tensor, nn

import data
import evaluate
from checkpoint import PUBLISHED, CheckpointError, draw_curves, load, save, write_log
from config import Config, OneLineParser, describe, restore
from tools import calibrate
from tools.records import read_json
from utils import UserError, atomic_write, choose_device, keep_freed_memory, program

DOCS = Path("docs")
NOTES = {
    True: "The epoch that was best on the validation images, graded once.",
    False: "Trained without validation images: the weights after the last epoch, graded once.",
}

Content = dict[str, Any]  # of a checkpoint
# Of docs/results/NAME.json: accuracies in percent, losses as mean cross-entropy, but the train loss as the run has it.
Record = dict[str, Any]


def open_run(run: Path) -> tuple[Content, Content, Config]:
    """The contents of a finished run's last.pth and best.pth, and its settings. Raises CheckpointError."""
    last, best = load(run / "last.pth"), load(run / "best.pth")
    if best["config"]["dataset"] != "cifar100":
        raise CheckpointError(f"{run} was trained on {best['config']['dataset']} data: not published")
    if last["epoch"] < last["config"]["epochs"]:
        raise CheckpointError(
            f"{run} has finished {last['epoch']} of {last['config']['epochs']} epochs. "
            f"First finish it: python train.py --resume {shlex.quote(str(run))}"
        )
    try:
        config = restore(best["config"])
    except ValueError as error:
        raise CheckpointError(f"{run} cannot be published: {error}") from error
    if config.images_per_class:
        raise CheckpointError(f"{run} was trained on {config.images_per_class} images a class, not on all of them")
    if "history" not in last:
        raise CheckpointError(f"{run}/last.pth is not what a run writes under that name")
    config = replace(config, **{name: portable(getattr(config, name)) for name in ("weights", "teacher")})
    return last, best | {"config": asdict(config)}, config


def portable(path: str) -> str:
    """A relative path as it is, and of an absolute one, which means nothing on another machine, the file's name."""
    return Path(path).name if Path(path).is_absolute() else path


def halve(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose matrices and convolutions are float16; norms and biases stay, as they are small."""
    return {name: value.half() if value.ndim > 1 else value for name, value in weights.items()}


def recipe(config: Config) -> dict[str, Any]:
    """The settings that say what is trained, without those that say where."""
    return {f.name: getattr(config, f.name) for f in fields(Config) if f.metadata["recipe"]}


def read_record(path: Path, config: Config, again: bool) -> Record:
    """The record that is there already, of the same settings and not yet measured, or nothing. Raises UserError."""
    if not path.exists():
        return {}
    record = read_json(path)
    if not isinstance(record, dict) or "config" not in record:
        raise UserError(f"{path} is not the record of a run. Give another --name")
    now = recipe(config) | {"seed": config.seed}
    try:
        then = recipe(restore(record["config"])) | {"seed": record.get("seed")}
    except ValueError as error:
        raise UserError(f"{path} has wrong settings: {error}. Give another --name") from error
    if differing := [f"{name} {then[name]} (now {value})" for name, value in now.items() if then[name] != value]:
        raise UserError(f"{path} is of a run with other settings: {', '.join(differing)}. Give another --name")
    if record.get("test") and not again:
        raise UserError(
            f"{path} is measured: its run was graded on {record['test']['images']} test images. A run is graded once; "
            "give another --name, or --again to replace the record"
        )
    return record


def score_training_images(model: nn.Module, config: Config, data_dir: str) -> dict[str, Any]:
    """The best weights' scores, in eval mode and without augmentation, on the images that they were trained on."""
    images, _ = data.load_training("cifar100", data_dir, config.validation_per_class, config.images_per_class)
    scores = evaluate.evaluate(model, *images.to(next(model.parameters()).device))
    return {"accuracy": round(scores.top1, 6), "loss": round(scores.loss, 6), "images": len(images.labels)}


def part(row: dict[str, Any], name: str) -> dict[str, float] | None:
    """Accuracy and loss on "train" or "validation" images in a row of the log; None where not measured."""
    accuracy, loss = row[f"{name}_accuracy"], row[f"{name}_loss"]
    return None if accuracy is None else {"accuracy": round(accuracy, 6), "loss": round(loss, 6)}


def publish(
    run: Path,
    name: str | None = None,
    ship: Path | None = None,
    half: bool = False,
    again: bool = False,
    commit: str | None = None,
    machine: str | None = None,
    data_dir: str = Config.data_dir,
) -> tuple[Path, dict[str, Any]]:
    """Grade a run and write its files; the record's path and the grade. Raises UserError.

    A record without test figures, which holds what is claimed of a run, keeps its name, title and claim. With `half` it
    is the weights rounded to float16 that are graded and shipped; the log's figures are those of the run.
    """
    last, best, config = open_run(run)
    best["weights"] = halve(best["weights"]) if half else best["weights"]
    name = name or config.experiment
    path, log, curves = (DOCS / file for file in (f"results/{name}.json", f"logs/{name}.csv", f"curves/{name}.png"))
    before = read_record(path, config, again)
    if taken := [str(file) for file in (log, curves) if file.exists() and not before.get("log")]:
        raise UserError(f"{', '.join(taken)}: there already, without a record. Delete that, or give another --name")
    if ship and ship.is_dir():
        raise UserError(f"--ship {ship} is a folder. Give the name of a file")
    for file in (path, log, curves, *([ship] if ship else [])):  # before the run is graded, which is done once
        file.parent.mkdir(parents=True, exist_ok=True)
    row = last["history"][best["epoch"] - 1]
    model, _ = evaluate.load_model(run / "best.pth")
    model.to(choose_device("auto"), memory_format=torch.channels_last).load_state_dict(best["weights"])
    temperature = calibrate.fit_on_validation(model, config, data_dir)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "best.pth"), best)
        grade = evaluate.grade(Path(folder, "best.pth"), data_dir=data_dir) | {"checkpoint": str(ship or run)}
    test = {key: grade[key] for key in ("accuracy", "top5", "loss", "images")}
    record = {
        "name": name,
        "title": before.get("title") or describe(config),
        "config": recipe(config),
        "seed": config.seed,
        "commit": commit or best.get("commit"),
        "torch": best["torch"],
        "machine": machine or best.get("machine"),
        "date": best["date"],
        "run": run.resolve().name,
        "epochs": last["epoch"],
        "best_epoch": best["epoch"],
        "train": part(row, "train"),
        "train_mode": "running",  # averaged over the epoch, on augmented images, while the weights change
        "train_eval": score_training_images(model, config, data_dir),
        "validation": part(row, "validation"),
        "temperature": temperature,  # fitted on the validation images; tools/calibrate.py
        "test": {key: round(value, 6) for key, value in test.items()},
        "cost": {"operations": grade["flops"], "size_kb": round(grade["size_kb"], 3)},
        "claimed": before.get("claimed"),
        "log": str(log),
        "curves": str(curves),
        "note": NOTES[bool(config.validation_per_class)],
    }
    write_log(log, last["history"])
    draw_curves({name: last["history"]}, curves)
    if ship:
        provenance = {"run": record["run"], "test": test, "history": last["history"], "digests": data.SHA256}
        save(ship, best | provenance | {"temperature": temperature})
    atomic_write(path, lambda file: file.write(f"{json.dumps(record, indent=1, ensure_ascii=False)}\n".encode()))
    return path, grade


@program("tools.publish")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.publish", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--name", help="of the record, log and curves: letters, digits, _ and - [the run's experiment]")
    parser.add_argument(
        "--ship", type=Path, metavar="FILE", help=f"write the weights too; {PUBLISHED} is what is graded by default"
    )
    parser.add_argument("--half", action="store_true", help="round the weights to float16: half the bytes")
    parser.add_argument("--again", action="store_true", help="replace a record that is measured")
    parser.add_argument("--commit", help="that the run was made at [as the run wrote]")
    parser.add_argument("--machine", help="that the run was made on [as the run wrote]")
    parser.add_argument("--data_dir", default=Config.data_dir, help="folder of the data set [%(default)s]")
    arguments = parser.parse_args(argv)
    if arguments.name is not None and not re.fullmatch(r"[\w-]{1,60}", arguments.name):
        parser.error(f"--name {arguments.name!r} must have 1 to 60 letters, digits, _ and -")
    keep_freed_memory()
    path, grade = publish(**vars(arguments))
    print(f"{evaluate.format_grade(grade)}\nRecord: {path}. Bring the pages up to date: python -m tools.results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
