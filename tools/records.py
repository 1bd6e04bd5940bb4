"""The records of docs/results and the logs of docs/logs: reading them, and what they hold."""

import json
from pathlib import Path
from typing import Any

from checkpoint import History
from config import restore
from tools.curves import read_log
from utils import UserError, one_line

RESULTS, LOGS = Path("docs/results"), Path("docs/logs")
EXPERIMENTS = tuple(f"result{number}" for number in range(1, 7))
SHIPPED = "taught"  # the run that checkpoints/published.pth is of
UNTAUGHT = "scratch"  # the run that checkpoints/scratch.pth is of

Record = dict[str, Any]  # a run's record, and the rows of its log under "history"
Records = dict[str, Record]
Logs = dict[str, History]  # by the file's name without .csv


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}. Repair it by hand") from error


def load_logs() -> Logs:
    """All logs. Raises UserError."""
    return {path.stem: read_log(path) for path in sorted(LOGS.glob("*.csv"))}


def load_records(logs: Logs) -> Records:
    """The record of each run by its name, with its log as `history`. Raises UserError where they disagree."""
    contents = {path: read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    records = {path: content for path, content in contents.items() if "config" in content}
    for path, record in records.items():
        try:
            restore(record["config"])
        except ValueError as error:
            raise UserError(f"{path} has wrong settings: {error}. Repair it by hand") from error
        if record["name"] != path.stem:
            raise UserError(f"{path} has the name {record['name']}. Give it that of its file")
        if missing := [file for file in (record["log"], record["curves"]) if file and not Path(file).exists()]:
            raise UserError(f"{path} names {' and '.join(missing)}, which is missing. Put it back")
        record["history"] = logs[Path(record["log"]).stem] if record["log"] else []
        if record["log"] and len(record["history"]) < record["best_epoch"]:
            raise UserError(f"{record['log']} ends before epoch {record['best_epoch']}, the best in {path}. Fix one")
        for part in ("train", "validation") if record["log"] else ():
            for figure in ("accuracy", "loss"):
                logged = record["history"][record["best_epoch"] - 1][f"{part}_{figure}"]
                stored = record[part] and record[part][figure]
                if (logged is None) != (stored is None) or abs((logged or 0) - (stored or 0)) > 1e-5:
                    raise UserError(f"{path} has {part} {figure} {stored}, {record['log']} has {logged}. Fix one")
    return {record["name"]: record for record in records.values()}


def accuracy(run: Record, part: str) -> float | None:
    """Accuracy in % on "train", "train_eval", "validation" or "test" images, or as "claimed"."""
    return run[part] and run[part]["accuracy"]


def kind(run: Record) -> str:
    """Which table shows a run."""
    config = run["config"]
    if run["name"] in EXPERIMENTS:
        return "experiment"
    if config.get("model", "mobilenetv3") != "mobilenetv3":
        return "teacher"
    if config.get("teacher", "none") != "none":
        return "student"
    return "other" if config.get("validation_per_class") or not run["name"].startswith(UNTAUGHT) else UNTAUGHT
