"""The written results: made from the records and logs alone, and checked against them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import checkpoint
from config import parse_command_line, preset, restore
from tests.helpers import SCRATCH, made_up_latency
from tools import costs, results
from tools.curves import read_log
from tools.records import EXPERIMENTS, RESULTS, SHIPPED, UNTAUGHT, read_json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of README.md and docs/."""
    shutil.copytree("docs", tmp_path / "docs")
    shutil.copy("README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(path: str | Path, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def check_fails(capsys: pytest.CaptureFixture) -> str:
    """The one line of a check that fails and writes nothing."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert results.main(["--check"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return line


def test_check_passes_on_the_committed_files() -> None:
    assert results.main(["--check"]) == 0


def test_check_fails_when_a_record_changes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = RESULTS / f"{SHIPPED}.json"
    figure = f"{read_json(path)['test']['accuracy']}"
    change(path, f'"accuracy": {figure}', '"accuracy": 12.34')
    line = check_fails(capsys)
    assert "docs/results.md" in line and "README.md" in line and "performance" not in line
    assert results.main([]) == 0
    assert "Accuracy = 12.34 %" in Path("README.md").read_text()
    assert Path("docs/curves/experiments.png").read_bytes().startswith(b"\x89PNG")
    assert results.main(["--check"]) == 0


def test_check_fails_when_a_log_changes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    log = Path("docs/logs/ablation-sgd.csv")
    *rows, last = log.read_text().splitlines()
    cells = last.split(",")
    cells[5] = "12.34"  # validation_accuracy of the last epoch
    log.write_text("\n".join([*rows, ",".join(cells)]) + "\n")
    line = check_fails(capsys)
    assert "docs/results.md" in line and "README.md" not in line


def test_check_fails_when_a_page_is_edited(folder: Path, capsys: pytest.CaptureFixture) -> None:
    change("README.md", "Accuracy = 7", "Accuracy = 8")
    assert check_fails(capsys).startswith("tools.results: error: README.md:")


def test_a_record_that_differs_from_its_log_is_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    best = json.loads(Path("docs/results/result6.json").read_text())["validation"]["accuracy"]
    change("docs/results/result6.json", f'"accuracy": {best}', f'"accuracy": {best + 1}')
    line = check_fails(capsys)
    assert "result6.json" in line and "result6.csv" in line and str(best) in line


def test_a_file_that_is_missing_or_misnamed_is_one_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def moved(path: str, to: str) -> str:
        source, target = Path(path), Path(path).with_name(to)
        source.rename(target)
        line = check_fails(capsys)
        target.rename(source)
        return line

    for path in ("docs/logs/scratch.csv", "docs/curves/scratch.png"):
        assert f"scratch.json names {path}, which is missing" in moved(path, "elsewhere")
    assert "lack 'ablation-cutmix'" in moved("docs/logs/ablation-cutmix.csv", "elsewhere")
    assert "lack 'scratch-280'" in moved("docs/results/scratch-280.json", "elsewhere")
    assert "other.json has the name scratch-280" in moved("docs/results/scratch-280.json", "other.json")
    log = Path("docs/logs/taught.csv")
    log.write_text("\n".join(log.read_text().splitlines()[:50]) + "\n")
    assert "docs/logs/taught.csv ends before epoch" in check_fails(capsys)


def test_a_page_without_its_markers_is_one_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    change("README.md", "<!-- /grade -->", "")
    assert "<!-- /grade -->" in check_fails(capsys)


def test_a_damaged_record_is_one_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    Path("docs/results/others.json").write_text("[")
    assert "others.json is not JSON" in check_fails(capsys)


def test_a_record_with_unknown_settings_is_one_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    change("docs/results/result6.json", '"cutout"', '"cut_out"')
    assert "result6.json has wrong settings: config.py does not know cut_out" in check_fails(capsys)


def test_latency_is_written_where_it_was_measured(folder: Path, monkeypatch, capsys) -> None:
    def block(name: str) -> list[str]:
        _, _, rest = Path("docs/performance.md").read_text().partition(f"<!-- {name} -->\n")
        return rest.partition(f"\n<!-- /{name} -->")[0].splitlines()

    monkeypatch.setattr(results, "draw", lambda records: [])
    costs.LATENCY.unlink(missing_ok=True)
    assert results.main([]) == 0
    assert block("latency") == block("floor") == ["not measured"]
    assert block("processes") == ["Speed: not measured."]
    costs.LATENCY.write_text(json.dumps(made_up_latency("0123456789abcdef")))
    assert "performance.md" in check_fails(capsys)
    assert results.main([]) == 0
    where, _, head, _, *rows = block("latency")
    assert where.startswith("On a box, 8 threads, torch 2.9, onnxruntime 1.30, 2026-02-03; `any.pth`")
    assert where.endswith("with 0123456789ab:")
    assert head == (
        "| file | size | ms an image at batch 1, 1 thread | images/s at batch 64, 1 thread "
        "| ms an image at batch 1, 8 threads | images/s at batch 64, 8 threads |"
    )
    assert rows == [
        "| checkpoint, torch | 4.00 MB | 8.00 | 250 | 2.00 | 1,000 |",
        "| float32 .onnx, onnxruntime | 3.90 MB | 4.00 | 500 | 1.00 | 2,000 |",
        "| int8 .onnx, onnxruntime | 1.20 MB | 2.00 | 1,000 | 0.50 | 4,000 |",
    ]
    assert block("floor") == [
        "| a step of 128 images, 8 threads | work | rate | time |",
        "| - | - | - | - |",
        "| convolutions and linear layers | 8.0 G operations | 200 G/s, a matrix product | 40 ms |",
        "| batch norms and activations | 2.00 GB | 20.0 GB/s, a copy | 100 ms |",
        "| floor |  |  | 140 ms |",
        "| measured |  | 1.5 times the floor | 210 ms |",
    ]
    (line,) = block("processes")
    assert line == (
        "On a box, 4 processes of one thread train 2,100 images/s, one process of 8 threads 2,000: 1.05 times."
    )


def test_our_rows_beside_others_name_the_file_of_their_record() -> None:
    rows = [row for row in read_json(RESULTS / "others.json") if "record" in row]
    found = {row["record"]: Path(row["source"]) for row in rows}
    assert found == {SHIPPED: checkpoint.PUBLISHED, UNTAUGHT: SCRATCH}


def test_records_have_the_recipes_of_the_presets() -> None:
    def recorded(name: str) -> dict[str, Any]:
        config = restore(json.loads(Path(f"docs/results/{name}.json").read_text())["config"])
        return {key: getattr(config, key) for key in preset(name)}

    for name in (*EXPERIMENTS, SHIPPED, UNTAUGHT):
        assert recorded(name) == preset(name), name
    local = {"weights", "pretrained", "distill_loss"}  # it started from a file, and had no teacher
    assert {key for key, value in recorded("teacher").items() if value != preset("teacher")[key]} <= local


@pytest.mark.parametrize(("name", "file"), [(SHIPPED, "published"), (UNTAUGHT, "scratch")])
def test_the_record_agrees_with_the_shipped_checkpoint(name: str, file: str) -> None:
    record, content = (
        read_json(RESULTS / f"{name}.json"),
        checkpoint.load(Path(f"checkpoints/{file}.pth")),
    )
    assert record["test"] == pytest.approx(content["test"], abs=1e-5)
    assert (record["run"], record["best_epoch"], record["torch"]) == (
        content["run"],
        content["epoch"],
        content["torch"],
    )
    assert read_log(Path(record["log"])) == content["history"]


@pytest.mark.parametrize(("file", "kind"), [("ablations", "ablation"), ("distillation", "distill")])
def test_each_comparison_has_its_row_and_flags_that_work(file: str, kind: str) -> None:
    rows = json.loads(Path(f"docs/results/{file}.json").read_text())
    logs = [Path(path) for row in rows for path in row["logs"]]
    stopped = {Path("docs/logs/distill-decoupled.csv")}  # after six epochs: in the text, not in the table
    assert sorted(logs) == sorted({*Path("docs/logs").glob(f"{kind}-*.csv")} - stopped) != []
    for row in rows:
        if "no longer in the code" not in row["changed"]:
            assert parse_command_line(row["flags"].split()).config


def test_no_accuracy_is_typed_into_the_template() -> None:
    assert not re.findall(r"\d\.\d+ %", results.TEMPLATE.read_text())


def test_links_lead_to_files() -> None:
    for page in (Path("README.md"), *Path("docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#:{}]*)(?:#([^)]+))?\)", page.read_text()):
            other = page.parent / target if target else page
            assert other.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, f"{page}: {anchor}"
