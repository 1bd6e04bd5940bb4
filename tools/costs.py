"""Tables of what was measured of speed, memory and file size, for tools/results.py."""

import hashlib
from pathlib import Path
from typing import Any

from tools.records import RESULTS, read_json
from tools.tables import NOT_MEASURED, percent, table

LATENCY = RESULTS / "latency.json"  # may be missing
LATENCY_FILES = {  # in the order of the table
    "torch": "checkpoint, torch",
    "float32": "float32 .onnx, onnxruntime",
    "int8": "int8 .onnx, onnxruntime",
}


def benchmark_table(result: dict[str, Any]) -> str:
    """What tools/benchmark.py measured."""
    step, pipeline = result["train_images_per_second"], result["pipeline_images_per_second"]

    def versus(speed: float, ratio: float) -> list[str]:
        return [f"{speed:,.0f} images/s", f"{speed / ratio:,.0f} images/s", f"{ratio:.2f}"]

    rows = [
        ["training step, against the plain loop", *versus(step, result["train_cpu_ratio"])],
        ["training step, against the tuned loader", *versus(step, result["train_cpu_tuned_ratio"])],
        ["input alone, against the tuned loader", *versus(pipeline, result["pipeline_ratio"])],
        ["grading 10,000 images, against one at a time", f"{result['grade_seconds']:.1f} s",
         f"{result['grade_seconds'] * result['grade_ratio']:.1f} s", f"{result['grade_ratio']:.2f}"],
        ["from `python train.py` to the first step", f"{result['start_seconds']:.1f} s", None, None],
        ["`python train.py -h`", f"{result['help_seconds']:.2f} s", None, None],
        ["peak memory of training with the defaults", f"{result['peak_rss_mb']:,.0f} MiB", None, None],
    ]  # fmt: skip
    rows.append(["training on a GPU", NOT_MEASURED, None, None])
    where = f"{result['machine']}, torch {result['torch']}"
    first = result["growth"][0]
    growth = [
        [f"{row['images'] // row['epochs']:,}", row["epochs"], f"{row['seconds']:.1f} s",
         f"{row['seconds'] / first['seconds']:.1f}", f"{row['rss_mb']:,.0f} MiB"]
        for row in result["growth"]
    ]  # fmt: skip
    speed = table(" | ours | what a user would otherwise run | ratio", rows)
    return f"On {where}:\n\n{speed}\n\n" + table("images an epoch | epochs | time | ratio | peak memory", growth)


def int8_table(result: dict[str, Any]) -> str:
    """What tools/export.py printed of a checkpoint's files."""
    names = {"float32": "`model.onnx`, float32", "int8": "`model-int8.onnx`"}
    rows = [[text, f"{result[k]['bytes'] / 1e6:.2f} MB", percent(result[k]["accuracy"])] for k, text in names.items()]
    where = f"{result['machine']}, onnxruntime {result['onnxruntime']}, {result['date']}; `{result['checkpoint']}`"
    return f"On {where}:\n\n{table('file | size | official test set', rows)}"


def read_latency() -> dict[str, Any] | None:
    """What `python -m tools.latency` measured last, where that is kept. Raises UserError."""
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
    return f"On {where}; {what}:\n\n{table(' | '.join(head), rows)}"


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
    return table(f"{step} | work | rate | time", rows)


def processes_line(result: dict[str, Any] | None) -> str:
    """What tools/latency.py measured of several processes that train together."""
    if result is None:
        return f"Speed: {NOT_MEASURED}."
    one, several, count = (result["processes"][name] for name in ("one", "several", "count"))
    return (
        f"On {result['machine'].partition(',')[0]}, {count} processes of one thread train {several:,.0f} images/s, one "
        f"process of {result['threads']} threads {one:,.0f}: {several / one:.2f} times."
    )
