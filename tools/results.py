"""Write docs/results.md and the figures of README.md and docs/performance.md: python -m tools.results.

Every figure comes from docs/results/*.json and docs/logs/*.csv, the prose from docs/results.template.md.
"""

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from checkpoint import History, draw_curves
from config import OneLineParser, restore
from tools import tables
from tools.curves import read_log
from tools.tables import EXPERIMENTS, NOT_MEASURED, Logs, Records, accuracy, percent, points
from utils import UserError, atomic_write, one_line, program

RESULTS, LOGS = Path("docs/results"), Path("docs/logs")
README, PERFORMANCE, PAGE = Path("README.md"), Path("docs/performance.md"), Path("docs/results.md")
LATENCY = RESULTS / "latency.json"  # may be missing
TEMPLATE = Path("docs/results.template.md")
LATENCY_FILES = {  # in the order of the table
    "torch": "checkpoint, torch",
    "float32": "float32 .onnx, onnxruntime",
    "int8": "int8 .onnx, onnxruntime",
}
EXPERIMENTS_FIGURE = Path("docs/curves/experiments.png")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}. Repair it by hand") from error


def load_records(logs: Logs) -> Records:
    """The record of each run by its name, with its log as `history`. Raises UserError where they disagree."""
    contents = {path: read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    records = {path: content for path, content in contents.items() if "config" in content}
    for path, record in records.items():
        try:
            restore(record["config"])
        except ValueError as error:
            raise UserError(f"{path} has wrong settings: {error}. Repair it by hand") from error
        record["history"] = logs[Path(record["log"]).stem] if record["log"] else []
        for part in ("train", "validation") if record["log"] else ():
            for figure in ("accuracy", "loss"):
                logged = record["history"][record["best_epoch"] - 1][f"{part}_{figure}"]
                stored = record[part] and record[part][figure]
                if (logged is None) != (stored is None) or abs((logged or 0) - (stored or 0)) > 1e-5:
                    raise UserError(f"{path} has {part} {figure} {stored}, {record['log']} has {logged}. Fix one")
    return {record["name"]: record for record in records.values()}


def small_epoch(history: History, fraction: float) -> float:
    """Time of an epoch of small images over that of one of whole images, medians."""
    small = int(fraction * len(history))
    seconds = [row["seconds"] for row in history]
    return statistics.median(seconds[:small]) / statistics.median(seconds[small:])


def results_page(records: Records, logs: Logs) -> str:
    """docs/results.md: the template with its {fields} filled."""
    ablations = read_json(RESULTS / "ablations.json")
    runs = {name: records[name] for name in EXPERIMENTS}
    untaught = records[tables.UNTAUGHT]
    fields = {
        "run": records,
        "log": logs,
        "last": {name: rows[-1] for name, rows in logs.items()},
        "report": read_json(RESULTS / "report.json"),
        "over": {n: accuracy(r, "test") - accuracy(untaught, "test") for n, r in records.items() if r["test"]},
        "verdict": {name: tables.verdict(run, untaught) for name, run in records.items() if run["test"]},
        "gain": {Path(row["logs"][0]).stem: points(tables.gains(row, logs)) for row in ablations if "base" in row},
        "memorises": {name: tables.memorises(run) for name, run in runs.items()},
        "compare": {n: {base: tables.compare(run, runs[base]) for base in runs} for n, run in runs.items()},
        "seen": {name: percent(accuracy(run, "train_eval")) for name, run in runs.items()},
        "small_epoch": small_epoch(untaught["history"], untaught["config"]["small_fraction"]),
        "spread": {name: tables.spread(records, name) for name in (tables.SHIPPED, tables.UNTAUGHT)},
        "scratch_table": tables.scratch_table(records),
        "experiments_table": tables.experiments_table(records),
        "curves": tables.curves(records),
        "fractions": tables.fractions(records),
        "teachers_table": tables.teachers_table(records),
        "students_table": tables.students_table(records),
        "other_runs": tables.other_runs(records),
        "distill_table": tables.ablation_table(read_json(RESULTS / "distillation.json"), logs),
        "ablation_table": tables.ablation_table(ablations, logs),
        "others_table": tables.others_table(read_json(RESULTS / "others.json"), records),
    }
    return TEMPLATE.read_text().format_map(fields)


def int8_table(result: dict[str, Any]) -> str:
    """What tools/export.py printed of a checkpoint's files."""
    names = {"float32": "`model.onnx`, float32", "int8": "`model-int8.onnx`"}
    rows = [[text, f"{result[k]['bytes'] / 1e6:.2f} MB", percent(result[k]["accuracy"])] for k, text in names.items()]
    where = f"{result['machine']}, onnxruntime {result['onnxruntime']}, {result['date']}; `{result['checkpoint']}`"
    return f"On {where}:\n\n{tables.table('file | size | official test set', rows)}"


def read_latency() -> dict[str, Any] | None:
    """What `python -m tools.benchmark --latency` measured last, where that is kept. Raises UserError."""
    return read_json(LATENCY) if LATENCY.exists() else None


def latency_cells(result: dict[str, Any]) -> list[list[str]]:
    """Head and rows: each file's size, ms an image at batch 1 and images/s of a batch, by the number of threads."""
    cells = [["file", "size"]]
    for count in result["files"]["torch"]["threads"]:
        threads = f"{count} thread{'s' * (count != '1')}"
        cells[0] += [f"ms an image at batch 1, {threads}", f"images/s at batch {result['batch_size']}, {threads}"]
    for name, text in LATENCY_FILES.items():
        file = result["files"][name]
        cells.append([text, f"{file['bytes'] / 1e6:.2f} MB"])
        for figures in file["threads"].values():
            cells[-1] += [f"{figures['ms']:.2f}", f"{figures['images_per_second']:,.0f}"]
    return cells


def latency_table(result: dict[str, Any] | None) -> str:
    """What tools/latency.py measured of a checkpoint and its ONNX files."""
    if result is None:
        return NOT_MEASURED
    (head, *rows), digest = latency_cells(result), result["checkpoint_sha256"][:12]
    where = f"{result['machine']}, torch {result['torch']}, onnxruntime {result['onnxruntime']}, {result['date']}"
    what = f"`{result['checkpoint']}`, whose SHA-256 begins with {digest}"
    return f"On {where}; {what}:\n\n{tables.table(' | '.join(head), rows)}"


def latency_section(path: Path) -> dict[str, list[list[str]]]:
    """A title and the cells of the latency table, or nothing where it was not measured on this checkpoint."""
    result = read_latency()
    if result is None or result["checkpoint_sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
        return {}
    return {f"Latency on {result['machine']}, {result['date']}": latency_cells(result)}


def floor_table(result: dict[str, Any] | None) -> str:
    """What tools/latency.py measured of a training step, and the floor that it computed."""
    if result is None:
        return NOT_MEASURED
    floor, giga = result["floor"], 1e9
    times = [1000 * floor[name] / floor[f"{name}_per_second"] for name in ("operations", "bytes")]
    rows = [
        ["convolutions and linear layers", f"{floor['operations'] / giga:.1f} G operations",
         f"{floor['operations_per_second'] / giga:.0f} G/s, a matrix product", f"{times[0]:.0f} ms"],
        ["batch norms and activations", f"{floor['bytes'] / giga:.2f} GB",
         f"{floor['bytes_per_second'] / giga:.1f} GB/s, a copy", f"{times[1]:.0f} ms"],
        ["floor", None, None, f"{1000 * floor['floor_seconds']:.0f} ms"],
        ["measured", None, f"{floor['times_floor']:.1f} times the floor", f"{1000 * floor['step_seconds']:.0f} ms"],
    ]  # fmt: skip
    step = f"a step of {floor['batch_size']} images, {result['threads']} threads"
    return tables.table(f"{step} | work | rate | time", rows)


def processes_line(result: dict[str, Any] | None) -> str:
    """What tools/latency.py measured of several processes that train together."""
    if result is None:
        return f"Speed: {NOT_MEASURED}."
    one, several, count = (result["processes"][name] for name in ("one", "several", "count"))
    return (
        f"On {result['machine'].partition(',')[0]}, {count} processes of one thread train {several:,.0f} images/s, one "
        f"process of {result['threads']} threads {one:,.0f}: {several / one:.2f} times."
    )


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


def pages() -> tuple[dict[Path, str], Records]:
    """The text of each file that this program writes, and the records that it was made from. Raises UserError."""
    logs = {path.stem: read_log(path) for path in sorted(LOGS.glob("*.csv"))}
    records = load_records(logs)
    readme = {
        "results": tables.claim_table(records),
        "times": tables.times_table(read_json(RESULTS / "times.json"), logs),
        "grade": tables.grade_lines(records),
        "sample": tables.sample_lines(logs["synthetic"]),
    }
    performance = {
        "benchmark": tables.benchmark_table(read_json(RESULTS / "benchmark.json")),
        "int8": int8_table(read_json(RESULTS / "int8.json")),
        "latency": latency_table(read_latency()),
        "floor": floor_table(read_latency()),
        "processes": processes_line(read_latency()),
    }
    texts = {PAGE: results_page(records, logs), README: fill(README, readme)}
    texts[PERFORMANCE] = fill(PERFORMANCE, performance)
    return texts, records


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
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file would change")
    arguments = parser.parse_args(argv)
    texts, records = pages()
    differing = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if arguments.check and differing:
        names = ", ".join(map(str, differing))
        raise UserError(f"{names}: not what docs/results and docs/logs say. Run: python -m tools.results")
    if not arguments.check:
        for path in differing:
            atomic_write(path, lambda file, path=path: file.write(texts[path].encode()))
    written = [] if arguments.check else [*differing, *draw(records)]
    print(f"Up to date: {', '.join(map(str, texts))}", *(f"Written: {path}" for path in written), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
