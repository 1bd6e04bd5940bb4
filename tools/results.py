"""Write docs/results.md and the figures of README.md and docs/performance.md: python -m tools.results.

Every figure comes from docs/results/*.json and docs/logs/*.csv, the prose from docs/results.template.md.
"""

import statistics
from pathlib import Path

from checkpoint import History, draw_curves
from config import OneLineParser
from tools import costs, experiments, tables
from tools.records import (
    EXPERIMENTS,
    RESULTS,
    SHIPPED,
    UNTAUGHT,
    Logs,
    Records,
    accuracy,
    load_logs,
    load_records,
    read_json,
)
from tools.tables import percent, points
from utils import UserError, atomic_write, program

README, PERFORMANCE, PAGE = Path("README.md"), Path("docs/performance.md"), Path("docs/results.md")
TEMPLATE = Path("docs/results.template.md")
EXPERIMENTS_FIGURE = Path("docs/curves/experiments.png")


def small_epoch(history: History, fraction: float) -> float:
    """Time of an epoch of small images over that of one of whole images, medians."""
    small = int(fraction * len(history) + 1e-9)  # as in augment.Loader
    seconds = [row["seconds"] for row in history]
    return statistics.median(seconds[:small]) / statistics.median(seconds[small:])


def results_page(records: Records, logs: Logs) -> str:
    """docs/results.md: the template with its {fields} filled."""
    ablations = read_json(RESULTS / "ablations.json")
    runs = {name: records[name] for name in EXPERIMENTS}
    untaught = records[UNTAUGHT]
    fields = {
        "run": records,
        "log": logs,
        "last": {name: rows[-1] for name, rows in logs.items()},
        "report": read_json(RESULTS / "report.json"),
        "over": {n: accuracy(r, "test") - accuracy(untaught, "test") for n, r in records.items() if r["test"]},
        "verdict": {name: tables.verdict(run, untaught) for name, run in records.items() if run["test"]},
        "gain": {Path(row["logs"][0]).stem: points(tables.gains(row, logs)) for row in ablations if "base" in row},
        "memorises": {name: experiments.memorises(run) for name, run in runs.items()},
        "compare": {n: {base: experiments.compare(run, runs[base]) for base in runs} for n, run in runs.items()},
        "seen": {name: percent(accuracy(run, "train_eval")) for name, run in runs.items()},
        "small_epoch": small_epoch(untaught["history"], untaught["config"]["small_fraction"]),
        "spread": {name: tables.spread(records, name) for name in (SHIPPED, UNTAUGHT)},
        "scratch_table": tables.scratch_table(records),
        "experiments_table": experiments.experiments_table(records),
        "curves": experiments.curves(records),
        "fractions": experiments.fractions(records),
        "teachers_table": tables.teachers_table(records),
        "students_table": tables.students_table(records),
        "other_runs": tables.other_runs(records),
        "distill_table": tables.ablation_table(read_json(RESULTS / "distillation.json"), logs),
        "ablation_table": tables.ablation_table(ablations, logs),
        "others_table": tables.others_table(read_json(RESULTS / "others.json"), records),
    }
    return TEMPLATE.read_text().format_map(fields)


def fill(path: Path, blocks: dict[str, str]) -> str:
    """The file's text with new lines between each pair of markers <!-- NAME --> and <!-- /NAME -->."""
    text = path.read_text()
    for name, lines in blocks.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise UserError(f"{path} lacks the markers {start.strip()} and {end}. Put them back")
        text = f"{before}{start}{lines}\n{end}{after}"
    return text


def texts(records: Records, logs: Logs) -> dict[Path, str]:
    """The text of each file that this program writes."""
    readme = {
        "results": tables.claim_table(records),
        "times": tables.times_table(read_json(RESULTS / "times.json"), logs),
        "grade": tables.grade_lines(records),
        "sample": tables.sample_lines(logs["synthetic"]),
    }
    performance = {
        "benchmark": costs.benchmark_table(read_json(RESULTS / "benchmark.json")),
        "int8": costs.int8_table(read_json(RESULTS / "int8.json")),
        "latency": costs.latency_table(costs.read_latency()),
        "floor": costs.floor_table(costs.read_latency()),
        "processes": costs.processes_line(costs.read_latency()),
    }
    return {
        PAGE: results_page(records, logs),
        README: fill(README, readme),
        PERFORMANCE: fill(PERFORMANCE, performance),
    }


def pages() -> tuple[dict[Path, str], Records]:
    """The text of each file that this program writes, and the records that it was made from. Raises UserError."""
    logs = load_logs()
    records = load_records(logs)
    try:
        return texts(records, logs), records
    except KeyError as error:
        raise UserError(f"docs/results or docs/logs lack {error}, which the pages show. Put it back") from error


def draw(records: Records) -> list[Path]:
    """Draw all experiments in one figure, and each run whose record names a file for it; all files."""
    figures = {EXPERIMENTS_FIGURE: {name: records[name]["history"] for name in EXPERIMENTS if records[name]["log"]}}
    figures |= {Path(run["curves"]): {run["name"]: run["history"]} for run in records.values() if run["curves"]}
    for path, runs in figures.items():
        draw_curves(runs, path)
    return list(figures)


@program("tools.results")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.results", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 unless all texts are up to date")
    arguments = parser.parse_args(argv)
    written, records = pages()
    differing = [path for path, text in written.items() if not path.exists() or path.read_text() != text]
    if arguments.check and differing:
        names = ", ".join(map(str, differing))
        raise UserError(f"{names}: not what docs/results and docs/logs say. Run: python -m tools.results")
    if not arguments.check:
        for path in differing:
            atomic_write(path, lambda file, path=path: file.write(written[path].encode()))
    changed = [] if arguments.check else [*differing, *draw(records)]
    print(f"Up to date: {', '.join(map(str, written))}", *(f"Written: {path}" for path in changed), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
