"""Latency: what is timed is the checkpoint's model, the figures agree with each other, the floor counts right."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import evaluate
from data import SIDE, synthetic
from model import BLOCKS, CLASSES, HEAD, STEM, MobileNetV3
from tests.helpers import SCRATCH, TINY, made_up_latency
from tools import export, latency, quantize
from tools.benchmark import PARTS
from utils import UserError


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What is timed sets the threads and holds back log lines for its whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def fail(*_: Any) -> None:
    raise UserError("the reason, in one line")


def test_a_process_of_its_own_returns_and_raises() -> None:
    assert latency.in_process(os.getpid) not in (0, os.getpid())
    with pytest.raises(UserError, match=r"^the reason, in one line$"):
        latency.in_process(fail)
    with pytest.raises(UserError, match="_exit was killed"):
        latency.in_process(os._exit, 1)


def test_ms_and_images_per_second_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that an image moves on by 2 ms; the first call and every 10th take a second more."""
    clock, calls = [0.0], []

    def run(batch: torch.Tensor) -> torch.Tensor:
        clock[0] += 0.002 * len(batch) + (len(calls) % 10 == 0)
        calls.append(len(batch))
        return nn.functional.one_hot(torch.arange(len(batch)), CLASSES)

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(quantize, "read_onnx", lambda path: run)
    images, classes = np.zeros((16, SIDE, SIDE, 3), np.uint8), np.arange(16)
    figures = latency.time_file("float32", Path("any.onnx"), images, classes, threads=1, seconds=20)
    assert figures == pytest.approx({"ms": 2, "images_per_second": 500, "same_top1": 100})
    assert set(calls) == {1, 16}
    assert clock[0] == pytest.approx(2 * (20 + 5), abs=5)  # seconds of two figures, and their warm-up


def test_a_file_with_other_classes_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "read_onnx", lambda path: lambda batch: torch.eye(10, CLASSES))
    images, classes = np.zeros((10, SIDE, SIDE, 3), np.uint8), np.arange(10)
    classes[7] = 3
    for name, limit in (("float32", 100), ("int8", 90.1)):
        monkeypatch.setattr(quantize, "SAME", limit)
        with pytest.raises(UserError, match=r"any\.onnx gives the model's class on only 90\.0 % of 10 images"):
            latency.time_file(name, Path("any.onnx"), images, classes, 1, 0.01)
    monkeypatch.setattr(quantize, "SAME", 90)
    assert latency.time_file("int8", Path("any.onnx"), images, classes, 1, 0.01)["same_top1"] == 90


def test_torch_runs_the_checkpoints_model() -> None:
    """With trained weights, as random ones give nearly the same probabilities for all images."""
    planes, path = synthetic(1, seed=5)[0], SCRATCH
    expected = evaluate.predict_logits(evaluate.load_model(path)[0], planes).softmax(1)
    assert (expected[0] - expected[50]).abs().max() > 0.1
    given = latency.read_torch(path)(planes.permute(0, 2, 3, 1).contiguous())
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


def quick_export(path: Path, source: Path, data_dir: str, int8: bool) -> str:
    """tools/export.py's own float32 file; the int8 file is quantised from that one and not graded."""
    if not int8:
        return export.export(path, source, data_dir)
    content, calibrated = quantize.calibrated(path.with_name("float32.onnx"), "synthetic", data_dir)
    path.write_bytes(content)
    return calibrated


def test_all_files_give_the_models_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A whole measurement of trained weights, short and in this process."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    path, content = tmp_path / "any.pth", checkpoint.load(SCRATCH)
    checkpoint.save(path, content | {"config": content["config"] | {"dataset": "synthetic"}})
    monkeypatch.setattr(latency, "in_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(latency, "export", quick_export)
    monkeypatch.setattr(quantize, "CALIBRATION", 100)
    monkeypatch.setattr(latency, "time_processes", lambda count: {"one": 1.0, "several": float(count), "count": count})
    monkeypatch.setattr(latency, "MATRIX", 64)
    monkeypatch.setattr(latency, "COPY", 2**20)
    threads = torch.get_num_threads()
    result = latency.run(path, rounds=1, seconds=0.02)
    assert result["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (result["checkpoint"], result["run"], result["threads"]) == (str(path), content["run"], threads)
    files = result["files"]
    assert files["torch"]["bytes"] == path.stat().st_size > 3 * files["int8"]["bytes"] > 0
    for name, least in (("torch", 100), ("float32", 100), ("int8", 70)):  # int8 has never seen such images
        assert list(files[name]["threads"]) == [str(count) for count in sorted({1, threads})]
        for figures in files[name]["threads"].values():
            assert figures["same_top1"] >= least
            assert 0.01 < figures["ms"] < 10_000 and figures["images_per_second"] > 0
    assert result["floor"]["times_floor"] > 0
    printed = capsys.readouterr().out
    assert "| int8 .onnx, onnxruntime | 1.23 MB |" in printed and "times the floor" in printed


def test_processes_are_timed_on_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def succeed(*words: str, **environment: str) -> str:
        assert words[-4:] == ("-m", "tools.benchmark", "--part", latency.PART) and latency.PART in PARTS
        started = words[:5] == ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4")
        return json.dumps({"images": 1_000, "seconds": 2.0 if started else 4.0})

    monkeypatch.setattr(latency, "succeed", succeed)
    monkeypatch.setattr(latency, "LIKE", TINY)
    for threads in (4, 6):  # 6 processes cannot share a batch of 64
        assert latency.time_processes(threads) == {"one": 250, "several": 500, "count": 4}


def by_hand() -> tuple[int, int]:
    """Multiply-adds, and bytes that batch norms and activations move, for one image: from the table of blocks."""
    side, channels = SIDE, STEM
    multiply_adds, norms, activations = 9 * 3 * STEM * side**2, STEM * side**2, STEM * side**2
    for block in BLOCKS:
        before, side = side**2, side // block.stride
        multiply_adds += block.inputs * block.hidden * before
        multiply_adds += block.hidden * block.kernel**2 * side**2 + block.hidden * block.outputs * side**2
        norms += block.hidden * before + (block.hidden + block.outputs) * side**2
        activations += block.hidden * (before + side**2)
        if block.squeeze_excitation:
            multiply_adds += 2 * block.hidden * (block.hidden // 4)
            activations += block.hidden // 4
        channels = block.outputs
    multiply_adds += channels * HEAD * side**2 + HEAD * CLASSES
    norms, activations = norms + HEAD * side**2, activations + HEAD * side**2
    return multiply_adds, 4 * (8 * norms + 5 * activations)


def test_the_floor_counts_what_the_table_of_blocks_says() -> None:
    multiply_adds, moved = by_hand()
    assert round(multiply_adds / 1e6, 1) == 10.6
    assert latency.image_cost(MobileNetV3()) == (6 * multiply_adds, moved)


def test_the_floor_counts_three_times_what_torch_counts_forward() -> None:
    """torch's own counter leaves out the groups of a convolution backward, so it is not asked there."""
    model = MobileNetV3()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, SIDE, SIDE))
    assert latency.image_cost(model)[0] == 3 * counter.get_total_flops() / 2


def test_the_floor_is_the_sum_of_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "image_cost", lambda model: (1_000, 30))
    found = latency.floor({"operations_per_second": 64_000, "bytes_per_second": 3_840, "step_seconds": 6})
    assert (found["batch_size"], found["operations"], found["bytes"]) == (128, 128_000, 3_840)
    assert (found["floor_seconds"], found["times_floor"]) == (3, 2)


def test_the_timed_step_is_one_batch() -> None:
    loader, _ = latency.build_loader(latency.STEP, latency.CPU)
    ((images, labels),) = loader
    assert images.shape == (128, 3, SIDE, SIDE) and len(labels) == latency.STEP.batch_size == 128
    torch.manual_seed(0)
    assert latency.training_step()().count == 128


def test_the_program_prints_json_on_the_last_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(latency, "run", lambda source: made_up_latency("00") | {"checkpoint": str(source)})
    for words, source in (([], checkpoint.PUBLISHED), (["my.pth"], "my.pth")):
        assert latency.main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found == made_up_latency("00") | {"checkpoint": str(source)}
