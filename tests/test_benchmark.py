"""The benchmark: what it counts, what is timed, and the names in its JSON."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

import evaluate
from config import Config
from data import synthetic
from tests.helpers import TINY
from tools import benchmark

SETTINGS = replace(TINY, ema=0.999, flip=True, crop_padding=4, trivial_augment=1.0, images_per_class=0)


def test_operations_of_a_step_stay_below_their_bars(published: Path) -> None:
    """Each is about one kernel on a GPU, where 64 batches are augmented at once."""
    counted = benchmark.count_operations(replace(SETTINGS, label_smoothing=0.1, batch_size=128))
    assert 0 < counted["input"] <= 8
    assert 250 < counted["forward"] + counted["backward"] <= 290
    assert counted["optimizer"] > 0 and counted["ema"] > 0 and counted["optimizer"] + counted["ema"] <= 12
    assert counted["sums"] <= 7


def test_neither_warmup_nor_what_comes_after_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves on by a second whenever it is read."""
    monkeypatch.setattr(benchmark.time, "perf_counter", count().__next__)
    batches, steps = [(torch.zeros(4), torch.zeros(4))] * 3, []
    speed = benchmark.time_loop(batches, lambda *batch: steps.append(batch), torch.device("cpu"), seconds=10)
    assert len(steps) == 10 + 9 and speed == 9 * 4 / 11


def test_the_programs_last_epoch_is_timed(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, read = [], benchmark.read_log
    monkeypatch.setattr(benchmark, "read_log", lambda path: rows.extend(read(path)) or rows)
    assert benchmark.time_program(tiny, torch.device("cpu")) == rows[1]["images_per_second"]


@pytest.mark.slow
def test_the_plain_loop_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DataLoader's worker processes, on a few images."""
    few = synthetic(6, seed=0)
    monkeypatch.setattr(benchmark.data, "load_training", lambda *_: (few, few))
    monkeypatch.setattr(benchmark.time_loop, "__defaults__", (0.1,))  # seconds
    speeds = benchmark.time_plain(SETTINGS, torch.device("cpu"))
    assert speeds["plain"] > 0 and speeds["plain_input"] > 0


def test_json_is_one_object_on_the_last_line(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In this process, with made-up speeds, on generated images; without onnxruntime its latency is left out."""
    torch.save(model.state_dict(), path := tmp_path / "any.pth")
    monkeypatch.setattr(evaluate, "load_test", lambda *_: synthetic(2, seed=0))
    monkeypatch.setattr(benchmark, "time_program", lambda *_: None)
    monkeypatch.setattr(benchmark, "count_operations", lambda config: {"input": 3.5})
    monkeypatch.setattr(benchmark, "default_checkpoint", lambda: path)
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "in_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmark, "time_plain", lambda *_: {"plain": 100.0, "plain_input": 200.0})
    monkeypatch.setattr(benchmark, "time_ours", lambda *_: {"ours": 250.0, "our_input": 3000.0})
    assert benchmark.main(["--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["train_cpu_ratio"], found["pipeline_ratio"]) == (2.5, 15)
    assert all(found[name] > 0 for name in ("grade_seconds", "peak_rss_mb", "latency_ms"))
    assert found["input_operations"] == 3.5 and found["plain_images_per_second_128"] == 100
    assert "onnx_latency_ms" not in found and found["torch"] == torch.__version__
