"""Training with several seeds: their spread, wrong command lines, and Ctrl-C."""

import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
import train
from config import Config
from tools import seeds

SETTINGS = {"epochs": 1, "dataset": "synthetic", "images_per_class": 8, "validation_per_class": 3, "threads": 1}
pytestmark = pytest.mark.usefixtures("handlers")
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def test_seeds_give_mean_and_standard_deviation(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    assert seeds.main(["2", *FLAGS, "--seed", "5", "--runs_dir", tiny.runs_dir]) == 0
    contents = [checkpoint.load(path) for path in sorted(Path(tiny.runs_dir).glob("*/best.pth"))]
    assert [content["config"]["seed"] for content in contents] == [5, 6]
    best = [content["metrics"]["validation_accuracy"] for content in contents]
    mean, std = sum(best) / 2, abs(best[0] - best[1]) / 2**0.5
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"Best validation accuracy of 2 seeds: {mean:.2f} % ± {std:.2f} (standard deviation)"
    )


def test_the_best_epoch_counts(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([50.0, 40.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: evaluate.Scores(1.0, next(accuracies), 90.0))
    assert seeds.train_seeds([replace(tiny, images_per_class=4)]) == [50.0]


def test_each_run_has_a_seed_of_its_own() -> None:
    runs = seeds.configs(["3", *FLAGS, "--seed", "5"])
    assert [run.seed for run in runs] == [5, 6, 7]
    assert {replace(run, seed=0) for run in runs} == {replace(runs[0], seed=0)}
    assert runs[0].epochs == 1


def test_seeds_under_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        seeds.configs(["3", *FLAGS])
    assert stopped.value.code == 2 and "without torchrun" in capsys.readouterr().err


def test_one_seed_has_no_standard_deviation() -> None:
    assert seeds.spread([50.0]) == "Best validation accuracy of 1 seed: 50.00 %"
    assert seeds.spread([50.0, 52.0]).endswith("2 seeds: 51.00 % ± 1.41 (standard deviation)")


@pytest.mark.parametrize(
    "argv, text",
    [
        ("0", "between 1 and 100, not 0"),
        ("101", "between 1 and 100, not 101"),
        ("many", "invalid int"),
        ("", "N"),
        ("2 --validation_per_class 0", "validation_per_class must be above 0"),
        ("2 --seed 1000000", "seed must be between"),
        ("2 --resume runs/any", "train.py --resume RUN"),
        ("2 --epoch 3", "--epoch"),
    ],
)
def test_wrong_command_lines_are_one_line(argv: str, text: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        seeds.main(argv.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and text in line


def test_ctrl_c_says_how_to_go_on(tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """In the second of three seeds, once its run has its folder."""
    starts = iter((0, 1))

    def stop(*arguments: object) -> None:
        if next(starts):
            signal.raise_signal(signal.SIGTERM)
        fit(*arguments)

    fit = train.fit
    monkeypatch.setattr(train, "fit", stop)
    assert seeds.main(["3", *FLAGS, "--runs_dir", f"{tiny.runs_dir} of $me"]) == 128 + signal.SIGTERM
    out, err = capsys.readouterr()
    *_, go_on, unfinished = out.splitlines()
    _, stopped = sorted(Path(f"{tiny.runs_dir} of $me").iterdir())
    assert go_on == f"Stopped. Go on with: python train.py --resume {shlex.quote(str(stopped))}"
    assert unfinished == "Seeds 1 to 2 are not finished: no mean and no standard deviation"
    assert err == ""
