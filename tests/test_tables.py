"""Tables and sentences from made-up records."""

from typing import Any

import pytest

import evaluate
from tools import experiments, tables
from tools.records import EXPERIMENTS, SHIPPED, UNTAUGHT


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


def test_fraction_by_hand() -> None:
    """0.6 of the images seen and always right, 0.4 held out and right half of the time: 80 %."""
    assert experiments.fraction(80, 100, 50) == pytest.approx(0.6)
    assert experiments.fraction(50, 100, 50) == 0


def test_fractions_agree_or_not() -> None:
    records = {name: run(name, 80) for name in EXPERIMENTS}
    records["result1"] = run("result1", 80, test=50, train_eval=100)
    records["result2"] = run("result2", 68, test=40, train_eval=90)
    text = experiments.fractions(records)
    assert "| `result1` | 80.00 % | 100.00 % | 50.00 % | 60.00 % |" in text
    assert "| `result3` | 80.00 % | not measured | not measured | not measured |" in text
    assert "\n\n2 of 6 fractions can be computed. They lie between 56.0 and 60.0 %" in text
    assert text.endswith("4.0 points apart:\nthey agree within 5 points, so one f fits all claims.")
    records["result2"] = run("result2", 50, test=40) | {"train": {"accuracy": 90}}
    assert "| `result2` | 50.00 % | 90.00 % (running) | 40.00 % | 20.00 % |" in experiments.fractions(records)
    assert "do not agree within 5 points, so no single f fits all claims" in experiments.fractions(records)


def test_a_gain_is_compared_with_the_claim() -> None:
    base = run("result1", claimed=80, test=50)
    assert "measured +4.00 points" in experiments.compare(run("result2", 85, test=54), base)
    assert "The direction holds" in experiments.compare(run("result2", 85, test=54), base)
    assert "The opposite holds" in experiments.compare(run("result2", 85, test=46), base)
    # Two standard errors of a difference near 50 % on 10,000 images: 2 * sqrt(2 * 0.25 / 10,000) = 1.41 points.
    assert "two standard errors are 1.41 points" in experiments.compare(run("result2", 85, test=51), base)
    assert "Equal: all their test figures are the same" in experiments.compare(run("result2", 85, test=50), base)
    assert "claimed +5.00 points; not measured (`result2`)" in experiments.compare(run("result2", 85), base)


def test_a_run_memorises_when_train_is_right_and_validation_loss_rises() -> None:
    def history(train: float, losses: list[float]) -> list[dict[str, float]]:
        common = {"train_accuracy": train, "train_loss": 0.1, "validation_accuracy": 40.0}
        return [common | {"epoch": epoch, "validation_loss": loss} for epoch, loss in enumerate(losses, start=1)]

    assert experiments.memorises(run("a", 80) | {"history": history(99, [3, 2, 4])}).endswith("It holds.")
    assert experiments.memorises(run("a", 80) | {"history": history(99, [4, 3, 2])}).endswith("It does not hold.")
    assert experiments.memorises(run("a", 80) | {"history": history(60, [3, 2, 4])}).endswith("It does not hold.")
    assert experiments.memorises(run("a", 80)) == "- `a`: not measured."


def test_gains_are_paired_by_seed() -> None:
    ends = {"ablation-base": 50.0, "ablation-base-seed1": 60.0, "ablation-sgd": 53.0, "ablation-sgd-seed1": 61.0}
    logs = {name: [{"validation_accuracy": 0.0}, {"validation_accuracy": end}] for name, end in ends.items()}
    row = {"base": "base", "logs": ["docs/logs/ablation-sgd.csv", "docs/logs/ablation-sgd-seed1.csv"]}
    assert tables.gains(row, logs) == [3.0, 1.0]
    other = {f"distill-{name}": [{"validation_accuracy": end}] for name, end in (("base", 40.0), ("kl", 45.0))}
    assert tables.gains({"base": "base", "logs": ["docs/logs/distill-kl.csv"]}, logs | other) == [5.0]
    del logs["ablation-base-seed1"]
    assert tables.gains(row, logs) == [3.0]
    del logs["ablation-base"]
    with pytest.raises(KeyError, match="ablation-base"):
        tables.gains(row, logs)


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


def test_the_claim_is_beside_the_run_of_its_own_recipe() -> None:
    cost = {"operations": 5, "size_kb": 7}
    records = {
        name: run(name, 0, test=test) | {"config": {"epochs": epochs}, "seed": 0, "cost": cost}
        for name, test, epochs in ((SHIPPED, 75, 1), (UNTAUGHT, 73, 2), ("result6", 47, 3))
    }
    records["result6"]["claimed"] |= {"accuracy": 87, "operations": 5, "size_kb": 7}
    *_, taught, untaught, best = tables.claim_table(records).splitlines()
    assert "`published.pth`" in taught and "75.00 %" in taught and "87.00 %" not in taught
    assert "`scratch.pth`" in untaught and "73.00 %" in untaught and "87.00 %" not in untaught
    assert "`result6`" in best and "47.00 %" in best and "87.00 %" in best


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


def test_the_sample_of_a_grade_is_what_grading_prints() -> None:
    cost = {"operations": 123, "size_kb": 4.5678}
    rest = dict.fromkeys(("checkpoint", "settings", "epoch", "date", "images", "dataset"), "") | {"top5": 0, "loss": 0}
    result = rest | {"flops": 123, "size_kb": 4.5678, "accuracy": 67.891, "seconds": 0}
    expected = ["```", *evaluate.format_grade(result).splitlines()[-3:], "```"]
    assert tables.grade_lines({SHIPPED: {"cost": cost, "test": {"accuracy": 67.891}}}).splitlines() == expected


def test_null_is_printed_as_not_measured() -> None:
    assert (tables.percent(None), tables.duration(None)) == ("not measured", "not measured")
    times = {"times": [{"what": "any", "cpu": "a box", "cpu_seconds": 40, "gpu_seconds": None}]}
    assert tables.times_table(times, {}).splitlines()[-1] == "| any | 40 s | a box | not measured |"
    assert [tables.duration(seconds) for seconds in (40, 180, 7524)] == ["40 s", "3 min", "2.1 hours"]
