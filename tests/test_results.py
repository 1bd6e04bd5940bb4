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
from tools import results, tables


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


def run(name: str, claimed: float, test: float | None = None, train_eval: float | None = None) -> dict[str, Any]:
    """A record with the figures that the sentences need."""
    record: dict[str, Any] = {
        "name": name,
        "claimed": {"accuracy": claimed, "epoch": "best"},
        "history": [],
        "train": None,
    }
    record["test"] = None if test is None else {"accuracy": test, "images": 10_000}
    return record | {"train_eval": None if train_eval is None else {"accuracy": train_eval}}


def test_check_passes_on_the_committed_files() -> None:
    assert results.main(["--check"]) == 0


def test_check_fails_when_a_record_changes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = results.RESULTS / f"{tables.SHIPPED}.json"
    figure = f"{results.read_json(path)['test']['accuracy']}"
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
    results.LATENCY.unlink(missing_ok=True)
    assert results.main([]) == 0
    assert block("latency") == block("floor") == ["not measured"]
    assert block("processes") == ["Speed: not measured."]
    results.LATENCY.write_text(json.dumps(made_up_latency("0123456789abcdef")))
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


def test_fraction_by_hand() -> None:
    """0.6 of the images seen and always right, 0.4 held out and right half of the time: 80 %."""
    assert tables.fraction(80, 100, 50) == pytest.approx(0.6)
    assert tables.fraction(50, 100, 50) == 0


def test_fractions_agree_or_not() -> None:
    records = {name: run(name, 80) for name in tables.EXPERIMENTS}
    records["result1"] = run("result1", 80, test=50, train_eval=100)
    records["result2"] = run("result2", 68, test=40, train_eval=90)
    text = tables.fractions(records)
    assert "| `result1` | 80.00 % | 100.00 % | 50.00 % | 60.00 % |" in text
    assert "| `result3` | 80.00 % | not measured | not measured | not measured |" in text
    assert "\n\n2 of 6 fractions can be computed. They lie between 56.0 and 60.0 %" in text
    assert text.endswith("4.0 points apart: they agree within 5 points.")
    records["result2"] = run("result2", 50, test=40) | {"train": {"accuracy": 90}}
    assert "| `result2` | 50.00 % | 90.00 % (running) | 40.00 % | 20.00 % |" in tables.fractions(records)
    assert "do not agree within 5 points" in tables.fractions(records)


def test_a_gain_is_compared_with_the_claim() -> None:
    base = run("result1", claimed=80, test=50)
    assert "measured +4.00 points" in tables.compare(run("result2", 85, test=54), base)
    assert "The direction holds" in tables.compare(run("result2", 85, test=54), base)
    assert "The opposite holds" in tables.compare(run("result2", 85, test=46), base)
    # Two standard errors of a difference near 50 % on 10,000 images: 2 * sqrt(2 * 0.25 / 10,000) = 1.41 points.
    assert "two standard errors are 1.41 points" in tables.compare(run("result2", 85, test=51), base)
    assert "claimed +5.00 points; not measured (`result2`)" in tables.compare(run("result2", 85), base)


def test_a_run_memorises_when_train_is_right_and_validation_loss_rises() -> None:
    def history(train: float, losses: list[float]) -> list[dict[str, float]]:
        common = {"train_accuracy": train, "train_loss": 0.1, "validation_accuracy": 40.0}
        return [common | {"epoch": epoch, "validation_loss": loss} for epoch, loss in enumerate(losses, start=1)]

    assert tables.memorises(run("a", 80) | {"history": history(99, [3, 2, 4])}).endswith("It holds.")
    assert tables.memorises(run("a", 80) | {"history": history(99, [4, 3, 2])}).endswith("It does not hold.")
    assert tables.memorises(run("a", 80) | {"history": history(60, [3, 2, 4])}).endswith("It does not hold.")
    assert tables.memorises(run("a", 80)) == "- `a`: not measured."


def test_gains_are_paired_by_seed() -> None:
    ends = {"ablation-base": 50.0, "ablation-base-seed1": 60.0, "ablation-sgd": 53.0, "ablation-sgd-seed1": 61.0}
    logs = {name: [{"validation_accuracy": 0.0}, {"validation_accuracy": end}] for name, end in ends.items()}
    row = {"base": "base", "logs": ["docs/logs/ablation-sgd.csv", "docs/logs/ablation-sgd-seed1.csv"]}
    assert tables.gains(row, logs) == [3.0, 1.0]
    other = {f"distill-{name}": [{"validation_accuracy": end}] for name, end in (("base", 40.0), ("kl", 45.0))}
    assert tables.gains({"base": "base", "logs": ["docs/logs/distill-kl.csv"]}, logs | other) == [5.0]


def test_teachers_are_the_runs_of_other_networks() -> None:
    ours = run("scratch", 0, test=73) | {"config": {"epochs": 140}}
    assert tables.teachers_table({"scratch": ours}) == "A teacher: not measured."
    record = run("teacher", 0, test=80, train_eval=99) | {"config": {"model": "net", "image_size": 64}}
    record |= {"validation": {"accuracy": 81}, "cost": {"operations": 123e6, "size_kb": 14000.4}}
    record |= {"log": "docs/logs/teacher.csv", "curves": None}
    (line,) = tables.teachers_table({"scratch": ours, "teacher": record}).splitlines()[2:]
    assert line == (
        "| `net` | 64 pixels | 123 M | 14,000 kB | 99.00 % | 81.00 % | 80.00 % | [log](logs/teacher.csv) | none |"
    )


def test_students_are_the_runs_with_a_teacher() -> None:
    ours = run("scratch", 0, test=73) | {"config": {"epochs": 140}}
    assert tables.students_table({"scratch": ours}) == "A run with a teacher: not measured."
    record = run("taught", 0, test=75, train_eval=80) | {"config": {"teacher": "any.pth", "epochs": 9}, "seed": 1}
    record |= {"title": "how", "commit": "abc", "train": {"accuracy": 60}, "validation": {"accuracy": 74}}
    record |= {"log": "docs/logs/taught.csv", "curves": None, "history": 9 * [{"seconds": 60.0}]}
    (line,) = tables.students_table({"scratch": ours, "taught": record}).splitlines()[2:]
    assert line.startswith("| `taught` | how | 9 | 1 | abc | 9 min | 60.00 % | 80.00 % | 74.00 % | 75.00 % |")
    assert line.endswith("| [log](logs/taught.csv) | none |")


def test_a_run_of_no_other_table_has_a_section_of_its_own() -> None:
    """A run of any name, and one that is called scratch but kept validation images."""
    ours = run("scratch", 0, test=73) | {"config": {"epochs": 140, "validation_per_class": 0}}
    assert tables.other_runs({"scratch": ours}) == ""
    for name in ("mine", "scratch-mine"):
        record = run(name, 0, test=70) | {"config": {"epochs": 9, "validation_per_class": 50}, "seed": 1}
        record |= {"title": "how", "commit": "abc", "validation": None, "log": None, "curves": None}
        text = tables.other_runs({"scratch": ours, name: record})
        assert "## Other runs" in text and f"| `{name}` | how |" in text and "70.00 %" in text


def test_the_claim_stands_beside_both_shipped_files() -> None:
    cost = {"operations": 5, "size_kb": 7}
    records = {
        name: run(name, 0, test=test) | {"config": {"epochs": epochs}, "seed": 0, "cost": cost}
        for name, test, epochs in ((tables.SHIPPED, 75, 1), (tables.UNTAUGHT, 73, 2))
    }
    records["result6"] = {"claimed": {"accuracy": 87, "operations": 5, "size_kb": 7}, "test": None}
    *_, taught, untaught = tables.claim_table(records).splitlines()
    assert "`published.pth`" in taught and "75.00 %" in taught and "87.00 %" not in taught
    assert "`scratch.pth`" in untaught and "73.00 %" in untaught and "87.00 %" in untaught


def test_our_rows_beside_others_name_the_file_of_their_record() -> None:
    rows = [row for row in results.read_json(results.RESULTS / "others.json") if "record" in row]
    found = {row["record"]: Path(row["source"]) for row in rows}
    assert found == {tables.SHIPPED: checkpoint.PUBLISHED, tables.UNTAUGHT: SCRATCH}


def test_a_difference_is_held_against_its_standard_error() -> None:
    """At 50 %, of 10,000 images each, two standard errors of a difference are the root of 2."""
    base, near, far = (run(name, 0, test=test) for name, test in (("a", 50), ("b", 51), ("c", 52)))
    assert tables.verdict(near, base) == "less than two standard errors (1.41 points)"
    assert tables.verdict(far, base) == "more than two standard errors (1.41 points)"


def test_more_seeds_give_mean_and_deviation() -> None:
    records = {"scratch": run("scratch", 0, test=73) | {"config": {"epochs": 140}, "seed": 0}}
    assert tables.spread(records, "scratch") == "one run, seed 0"
    records["other"] = run("other", 0, test=90) | {"config": {"epochs": 1}, "seed": 1}
    records["scratch-seed1"] = records["scratch"] | run("scratch-seed1", 0, test=75)
    assert tables.spread(records, "scratch") == "2 seeds: 73.00, 75.00; mean 74.00, standard deviation 1.41"


def test_null_is_printed_as_not_measured() -> None:
    assert (tables.percent(None), tables.duration(None)) == ("not measured", "not measured")
    times = {"machine": "a box", "times": [{"what": "any", "cpu_seconds": 40, "gpu_seconds": None}]}
    header, _, row = tables.times_table(times, {}).splitlines()
    assert (header, row) == ("| each timed once | a box | one CUDA GPU |", "| any | 40 s | not measured |")
    assert [tables.duration(seconds) for seconds in (40, 180, 7524)] == ["40 s", "3 min", "2.1 hours"]


def test_records_have_the_recipes_of_the_presets() -> None:
    def recorded(name: str) -> dict[str, Any]:
        config = restore(json.loads(Path(f"docs/results/{name}.json").read_text())["config"])
        return {key: getattr(config, key) for key in preset(name)}

    for name in (*tables.EXPERIMENTS, tables.SHIPPED, tables.UNTAUGHT):
        assert recorded(name) == preset(name), name
    local = {"weights", "pretrained", "distill_loss"}  # it started from a file, and had no teacher
    assert {key for key, value in recorded("teacher").items() if value != preset("teacher")[key]} <= local


@pytest.mark.parametrize(("name", "file"), [(tables.SHIPPED, "published"), (tables.UNTAUGHT, "scratch")])
def test_the_record_agrees_with_the_shipped_checkpoint(name: str, file: str) -> None:
    record, content = (
        results.read_json(results.RESULTS / f"{name}.json"),
        checkpoint.load(Path(f"checkpoints/{file}.pth")),
    )
    assert record["test"] == pytest.approx(content["test"], abs=1e-5)
    assert (record["run"], record["best_epoch"], record["torch"]) == (
        content["run"],
        content["epoch"],
        content["torch"],
    )
    assert results.read_log(Path(record["log"])) == content["history"]


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
