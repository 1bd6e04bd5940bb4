"""Grade a finished run once on the official test set and record it: python -m tools.results RUN --name NAME.

That writes docs/results/NAME.json, docs/logs/NAME.csv and docs/curves/NAME.png. Without RUN the tables between the
markers in docs/results.md and README.md are made anew from those files.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import checkpoint
import data
import evaluate
from config import PLAIN, Config, OneLineParser, add_data_dir, describe
from curves import draw_curves
from utils import ROOT, UserError, atomic_write, choose_device, program

# The content of docs/results/NAME.json, with the run's log under "history". Accuracies are in percent.
Record = dict[str, Any]

DOCS, README = ROOT / "docs", ROOT / "README.md"
PUBLISHED = "taught-200"  # the record of checkpoints/published.pth


def record_run(run: Path, name: str, data_dir: str) -> Path:
    """Grade a run and write its record, log and curves. Returns the record's path. Raises UserError."""
    path = DOCS / "results" / f"{name}.json"
    if path.exists():
        raise UserError(f"{path} exists, and a run is graded once. To grade again, delete it")
    config = checkpoint.resumed_config(run, {})
    last, best = checkpoint.load(run / "last.pth"), checkpoint.load(run / "best.pth")
    if config.dataset != "cifar100" or config.images_per_class:
        raise UserError(f"{run} was not trained on all images of CIFAR-100. Give a run that was")
    if last["epoch"] < config.epochs:
        raise UserError(
            f"{run} has finished {last['epoch']} of {config.epochs} epochs. First: python train.py --resume {run}"
        )

    grade = evaluate.grade(run / "best.pth", Config.device, data_dir)
    train_set, _ = data.load_training("cifar100", data_dir, config.validation_per_class)
    device = choose_device(Config.device)
    model = checkpoint.load_model(run / "best.pth")[0].to(device)
    train_eval = evaluate.evaluate(model, *train_set.to(device))
    row, recipe = best["metrics"], {setting: getattr(config, setting) for setting in PLAIN}
    for setting in ("weights", "teacher"):
        if Path(recipe[setting]).is_absolute():
            recipe[setting] = Path(recipe[setting]).name  # the folder means nothing on another machine
    record = {
        "name": name,
        "title": describe(Config(**recipe, experiment=config.experiment)),
        "config": recipe,
        "seed": config.seed,
        **{key: best[key] for key in ("commit", "torch", "machine", "date")},
        "run": run.resolve().name,
        "epochs": last["epoch"],
        "best_epoch": best["epoch"],
        "train": scores(row["train_accuracy"], row["train_loss"]),
        "train_mode": "running",  # on augmented images, averaged over the epoch while the weights change
        "train_eval": scores(train_eval.top1, train_eval.loss, images=len(train_set.labels)),
        "validation": scores(row["validation_accuracy"], row["validation_loss"]),
        "test": scores(grade["accuracy"], grade["loss"], top5=round(grade["top5"], 6), images=grade["images"]),
        "cost": {"operations": grade["flops"], "size_kb": round(grade["size_kb"], 3)},
        "claimed": None,
        "log": f"docs/logs/{name}.csv",
        "curves": f"docs/curves/{name}.png",
        "note": f"The {'best epoch on validation' if config.validation_per_class else 'last epoch'}, graded once.",
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"  # no run saves a NaN
    checkpoint.write_log(DOCS / "logs" / f"{name}.csv", last["history"])
    draw_curves({name: last["history"]}, DOCS / "curves" / f"{name}.png")
    atomic_write(path, lambda file: file.write(text.encode()))
    print(evaluate.format_grade(grade))
    return path


def scores(accuracy: float | None, loss: float | None, **more: float) -> dict[str, float] | None:
    """Accuracy and loss as a record has them; None if they were not measured."""
    return None if accuracy is None else {"accuracy": round(accuracy, 6), "loss": round(loss, 6), **more}


def read_records() -> dict[str, Record]:
    """The records that have test figures, by name, in the order of their dates. Raises UserError."""
    contents = [json.loads(path.read_text("utf-8")) for path in sorted((DOCS / "results").glob("*.json"))]
    records = [content for content in contents if content.get("test")]  # benchmark.json has none
    for record in records:
        record["history"] = checkpoint.read_log(DOCS / "logs" / f"{record['name']}.csv")
    return {record["name"]: record for record in sorted(records, key=lambda record: record["date"])}


def table(heads: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown, without the columns in which all cells are empty."""
    kept = [i for i in range(len(heads)) if any(row[i] != "" for row in rows)]
    lines = [heads, ["-"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(line[i]) for i in kept)} |" for line in lines)


def hours(record: Record) -> float:
    """What the epochs of a run took."""
    return sum(row["seconds"] for row in record["history"]) / 3600


def runs_table(records: list[Record]) -> str:
    """A row per run."""
    rows = []
    for record in records:
        made = [record["seed"], record["commit"] or "not recorded", f"{hours(record):.1f}", record["best_epoch"]]
        parts = [record.get(part) for part in ("claimed", "train", "train_eval", "validation", "test")]
        accuracies = [f"{part['accuracy']:.2f} %" if part else "" for part in parts]
        files = [f"[{key}]({record[key].removeprefix('docs/')})" for key in ("log", "curves") if record[key]]
        rows.append([f"`{record['name']}`", record["title"], *made, *accuracies, ", ".join(files)])
    heads = ["run", "what", "seed", "commit", "hours", "best epoch"]
    heads += ["claimed, unpublished file", "train", "train, eval mode", "validation", "test", "files"]
    return table(heads, rows)


def seeds_text(records: list[Record]) -> str:
    """The test accuracy of runs that differ in their seed only."""
    figures = [record["test"]["accuracy"] for record in records]
    seeds = ", ".join(str(record["seed"]) for record in records)
    if len(figures) == 1:
        return f"**{figures[0]:.2f} %** (one run, seed {seeds})"
    deviation = statistics.stdev(figures)
    return f"**{statistics.mean(figures):.2f} %** ± {deviation:.2f} (mean and standard deviation of seeds {seeds})"


def make_tables(records: dict[str, Record], default: list[Record]) -> dict[str, str]:
    """The tables of both pages, by the names of their markers."""
    published = records[PUBLISHED]
    experiments = [records[f"result{number}"] for number in range(1, 7)]
    others = [run for run in records.values() if run not in default + experiments]
    results = [
        ["test accuracy after `python train.py`, AdamW with StepLR", seeds_text(default)],
        ["time of such a run", f"{hours(default[0]):.1f} hours on {default[0]['machine']}"],
        ["test accuracy of `checkpoints/published.pth`, trained with a teacher", seeds_text([published])],
        ["multiply-adds", f"{published['cost']['operations']:,}"],
        ["parameter size", f"{published['cost']['size_kb']:.3f} kB"],
    ]
    return {
        "results": table(["what", "figure"], results),
        "default": f"{runs_table(default)}\n\nTest: {seeds_text(default)}.",
        "experiments": runs_table(experiments),
        "runs": runs_table(others),
    }


def write_pages(check: bool) -> None:
    """Write the tables between <!-- NAME --> and <!-- /NAME --> of both pages, and docs/curves/default.png. With
    `check` only compare. Raises UserError."""
    records = read_records()
    default = [records[name] for name in sorted(records) if re.fullmatch(r"default-\d+", name)]
    if any(record["config"] != default[0]["config"] for record in default):
        raise UserError("the records default-N have different settings. Give those of another recipe another name")
    tables = make_tables(records, default)
    marked = re.compile(rf"(<!-- ({'|'.join(tables)}) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    pages = {path: path.read_text("utf-8") for path in (README, DOCS / "results.md")}
    if len(marked.findall("".join(pages.values()))) != len(tables):
        raise UserError(f"the pages lack markers of {', '.join(tables)}. Put each on a line of its own")
    for path, old in pages.items():
        new = marked.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[3]}", old)
        if check and new != old:
            raise UserError(f"{path} is not up to date. Run: python -m tools.results")
        if not check:
            atomic_write(path, lambda file, new=new: file.write(new.encode()))
    if not check:
        draw_curves({run["name"]: run["history"] for run in default}, DOCS / "curves" / "default.png")


@program("tools.results")
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m tools.results", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--name", help="of its record: letters, digits, _ and -")
    add_data_dir(parser)
    parser.add_argument("--check", action="store_true", help="write nothing; fail unless both pages are up to date")
    arguments = parser.parse_args(argv)
    if (arguments.run is None) != (arguments.name is None) or (arguments.run and arguments.check):
        parser.error("give RUN with its --name to record a run, or neither to write the pages")
    if not re.fullmatch(r"[\w-]{1,60}", arguments.name or "none"):
        parser.error(f"--name {arguments.name!r} must have 1 to 60 letters, digits, _ and -")
    if arguments.run:
        path = record_run(arguments.run, arguments.name, arguments.data_dir)
        print(f"Record: {path}. Bring the pages up to date: python -m tools.results")
    else:
        write_pages(arguments.check)


if __name__ == "__main__":
    sys.exit(main())
