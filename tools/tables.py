"""Markdown tables of runs, of comparisons and for README, for tools/results.py."""

import math
import statistics
from pathlib import Path
from typing import Any

from checkpoint import History
from config import restore
from tools.records import SHIPPED, UNTAUGHT, Logs, Record, Records, accuracy, kind

NOT_MEASURED = "not measured"


def percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f} %"


def points(values: list[float]) -> str:
    return " and ".join(f"{value:+.2f}" for value in values)


def duration(seconds: float | None) -> str:
    """Seconds in the unit that reads best."""
    if seconds is None:
        return NOT_MEASURED
    for unit, length in (("hours", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}".replace(".0 ", " ")
    return f"{seconds:.0f} s"


def table(header: str, rows: list[list[Any]]) -> str:
    """A Markdown table; " | " separates the header's cells, and None is an empty cell."""
    names = header.split(" | ")
    lines = [names, ["-"] * len(names), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def link(path: str | None, text: str) -> str:
    """A link from a page in docs/ to a file under docs/."""
    return f"[{text}]({path.removeprefix('docs/')})" if path else "none"


def took(run: Record) -> str:
    """How long a run's epochs took."""
    return duration(sum(row["seconds"] for row in run["history"]) or None)


def spread(records: Records, name: str) -> str:
    """The test accuracies of all runs with that run's recipe."""
    recipe = restore(records[name]["config"])  # a setting that an older record lacks is off
    runs = [run for run in records.values() if run["test"] and restore(run["config"]) == recipe]
    figures = [accuracy(run, "test") for run in runs]
    if not runs:
        return "not measured"
    if len(runs) == 1:
        return f"one run, seed {runs[0]['seed']}"
    each = ", ".join(f"{figure:.2f}" for figure in figures)
    mean, std = statistics.mean(figures), statistics.stdev(figures)
    return f"{len(runs)} seeds: {each}; mean {mean:.2f}, standard deviation {std:.2f}"


def claim_table(records: Records) -> str:
    """The shipped checkpoints beside the best of the report's claims."""
    cost, claim = records[SHIPPED]["cost"], records["result6"]["claimed"]
    figures = {
        name: f"**{percent(accuracy(records[name], 'test'))}** ({spread(records, name)})"
        for name in (SHIPPED, UNTAUGHT, "result6")
    }
    taught = "accuracy of `published.pth`, [taught](docs/teacher.md) by a network with ImageNet weights"
    rows = [
        ["operations", cost["operations"], claim["operations"]],
        ["parameter size", f"{cost['size_kb']:.3f} kB", f"{claim['size_kb']:.3f} kB"],
        [taught, figures[SHIPPED], None],
        ["accuracy of `scratch.pth`, no data but CIFAR-100", figures[UNTAUGHT], None],
        ["accuracy of `result6`, the report's best", figures["result6"], percent(claim["accuracy"])],
    ]
    return table(" | measured, official test set | claimed by a report, unpublished validation file", rows)


def grade_lines(records: Records) -> str:
    """What grading prints of published.pth."""
    cost, measured = records[SHIPPED]["cost"], accuracy(records[SHIPPED], "test")
    size = f"Model parameter size = {cost['size_kb']:.3f} kB"
    return f"```\nflops = {cost['operations']}\n{size}\nAccuracy = {measured:.2f} %\n```"


def sample_lines(history: History) -> str:
    """What a run prints after its last epoch, where that is its best."""
    row, lines = history[-1], [f"Epoch {len(history)}/{len(history)}"]
    for part in ("train", "validation"):
        name, loss, correct = part.capitalize(), row[f"{part}_loss"], row[f"{part}_accuracy"]
        lines.append(f"{name} Loss: {loss:.4f}, {name} Accuracy: {correct:.2f}%")
    return "\n".join(["```", *lines, "Saved Best Model", f"Learning Rate: {row['lr']:.6f}", "```"])


def times_table(times: dict[str, Any], logs: Logs) -> str:
    """How long each command takes on two cores of the CPU that is named; where it has a log, what its epochs took."""
    rows = []
    for row in times["times"]:
        seconds = sum(epoch["seconds"] for epoch in logs[Path(row["log"]).stem]) if "log" in row else row["cpu_seconds"]
        rows.append([row["what"], duration(seconds), row["cpu"], duration(row["gpu_seconds"])])
    return table("each timed once | 2 CPU cores | CPU | one CUDA GPU", rows)


def scratch_table(records: Records) -> str:
    """The untaught run that is shipped and the others of its kind, in the order in which they ended."""
    rows, runs = [], [run for run in records.values() if kind(run) == UNTAUGHT]
    for run in sorted(runs, key=lambda run: run["date"]):
        made = [run["seed"], run["commit"] or "not recorded", run["torch"] or "not recorded"]
        scores = [percent(accuracy(run, "test")), percent(run["test"]["top5"]), f"{run['test']['loss']:.4f}"]
        train = percent(accuracy(run, "train"))
        rows.append([f"`{run['name']}`", run["title"], *made, train, *scores, took(run), link(run["log"], "log")])
    return table("run | what | seed | commit | torch | train | test top-1 | top-5 | loss | took | log", rows)


def teachers_table(records: Records) -> str:
    """The larger networks that teach ours."""
    rows = []
    for run in (run for run in records.values() if kind(run) == "teacher"):
        config, cost = run["config"], run["cost"]
        made = [f"{config['image_size']} pixels", f"{cost['operations'] / 1e6:.0f} M", f"{cost['size_kb']:,.0f} kB"]
        figures = [percent(accuracy(run, part)) for part in ("train_eval", "validation", "test")]
        rows.append([f"`{config['model']}`", *made, *figures, link(run["log"], "log"), link(run["curves"], "curves")])
    head = "network | enlarged to | operations | parameter size | train, eval mode | validation | test | log | curves"
    return table(head, rows) if rows else f"A teacher: {NOT_MEASURED}."


def students_table(records: Records) -> str:
    """The runs that learnt from a teacher."""
    runs = [run for run in records.values() if kind(run) == "student"]
    return runs_table(runs) if runs else f"A run with a teacher: {NOT_MEASURED}."


def other_runs(records: Records) -> str:
    """A section with the runs that no other table shows; empty where there are none."""
    runs = [run for run in records.values() if kind(run) == "other"]
    return f"\n## Other runs\n\n{runs_table(runs)}\n" if runs else ""


def runs_table(runs: list[Record]) -> str:
    """Runs with their changed settings and all their accuracies."""
    rows = []
    for run in runs:
        figures = [percent(accuracy(run, part)) for part in ("train", "train_eval", "validation", "test")]
        made = [run["config"]["epochs"], run["seed"], run["commit"], took(run)]
        links = [link(run["log"], "log"), link(run["curves"], "curves")]
        rows.append([f"`{run['name']}`", run["title"], *made, *figures, *links])
    head = "run | what | epochs | seed | commit | took | train | train, eval mode | validation | test | log | curves"
    return table(head, rows)


def noise(run: Record, base: Record) -> float:
    """Two standard errors of the difference between the test accuracies of two runs, in points."""
    variances = (accuracy(r, "test") * (100 - accuracy(r, "test")) / r["test"]["images"] for r in (run, base))
    return 2 * math.sqrt(sum(variances))


def verdict(run: Record, base: Record) -> str:
    """Whether the test accuracies of two runs differ by more than chance."""
    clear = abs(accuracy(run, "test") - accuracy(base, "test")) >= noise(run, base)
    return f"{'more' if clear else 'less'} than two standard errors ({noise(run, base):.2f} points)"


def gains(row: dict[str, Any], logs: Logs) -> list[float]:
    """Validation accuracy after the last epoch minus that of the row's base, for each seed that both have."""
    names = [Path(path).stem for path in row["logs"]]
    kind = names[0].partition("-")[0]  # of comparison: "ablation" or "distill"
    bases = [name.replace(names[0], f"{kind}-{row['base']}") for name in names]
    pairs = [pair for pair in zip(names, bases, strict=True) if pair[1] in {bases[0], *logs}]
    ends = [[logs[name][-1]["validation_accuracy"] for name in pair] for pair in pairs]
    return [run - base for run, base in ends]


def ablation_table(rows: list[dict[str, Any]], logs: Logs) -> str:
    """One change a row: validation accuracy after the last epoch, and what it gained over its base, by seed."""
    lines = []
    for row in rows:
        ends = [percent(logs[Path(path).stem][-1]["validation_accuracy"]) for path in row["logs"]]
        gained = f"{points(gains(row, logs))} over {row['base']}" if "base" in row else None
        links = ", ".join(link(path, Path(path).stem.partition("-")[2]) for path in row["logs"])
        flags = f"`{row['flags']}`" if row["flags"] else None
        lines.append([row["changed"], *[*ends, None][:2], gained, flags, links])
    return table("changed | seed 0 | seed 1 | points | flags after the base's | logs", lines)


def others_table(others: list[dict[str, Any]], records: Records) -> str:
    """Published networks, and ours with the figure of its record."""
    rows = []
    for other in others:
        figure = accuracy(records[other["record"]], "test") if "record" in other else other["accuracy"]
        cells = [other["network"], other["parameters"], other["multiply_adds"], percent(figure)]
        rows.append([*cells, other["teacher"] or "no", other["source"]])
    return table("network | parameters | multiply-adds | top-1 | teacher | source", rows)
