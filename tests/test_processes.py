"""Several processes that train together, started by torchrun: real ones, two on the CPU."""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import checkpoint
import data
import train
import utils
from augment import Loader, build_loader
from tests.helpers import EVERYTHING, TINY, call_at, flags, log_rows
from utils import UserError

CPU = torch.device("cpu")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
# 700 images, 10 steps an epoch; AdamW would turn rounding into steps of full size where a gradient is nearly 0.
SHORT = {"images_per_class": 10, "batch_size": 64, "epochs": 2, "optimizer": "sgd", "lr": 0.02, "warmup_epochs": 0}


def command(runs_dir: Path, **settings: object) -> list[str]:
    """Flags of a short synthetic run; it starts from a preset, so that a default can be edited."""
    start = {"experiment": "scratch", "dataset": "synthetic", "device": "cpu", "threads": 1, "validation_per_class": 3}
    return flags(**start | SHORT | {"runs_dir": runs_dir} | settings)


def run(*words: str, code: int = 0) -> tuple[Path | None, subprocess.CompletedProcess]:
    """What a finished command printed, and the folder that it names."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    named = [line.removeprefix("Run folder: ") for line in done.stdout.splitlines() if line.startswith("Run folder: ")]
    return (Path(named[0]) if named else None), done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last.pth")["state"]["network"]


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight or of a batch norm's statistic."""
    return max((one[name] - other[name]).abs().max().item() for name in one if one[name].is_floating_point())


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """A network without batch norm, whose result does not depend on how a batch is divided."""
    pytest.importorskip("timm")
    network = {"model": "test_convnext", "image_size": 64}
    settings = network | {"ema": 0.9, "trivial_augment": 0.5, "mixup": 0.2, "lr": 0.05}
    one, _ = run(sys.executable, "train.py", *command(tmp_path / "one", **settings))
    two, done = run(*TORCHRUN, *command(tmp_path / "two", **settings))
    assert done.stdout.count("Epoch 2/2") == 1, "the first process prints, the other does not"
    assert len(list((tmp_path / "two").iterdir())) == 1
    start = train.TrainState(replace(TINY, **network), CPU).model.state_dict()
    assert differ(weights(one), weights(two)) < 1e-4 * differ(weights(one), start)
    for row, other in zip(log_rows(one), log_rows(two), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-5)
        assert float(row["train_accuracy"]) == pytest.approx(float(other["train_accuracy"]), abs=0.2)


def test_each_process_has_its_own_batch_norm_statistics(tmp_path: Path) -> None:
    """With batch norm the weights are those of a plain loop over both halves, each normalised by itself."""
    folder, _ = run(*TORCHRUN, *command(tmp_path, small_fraction=0.0, epochs=1))
    config = replace(TINY, **SHORT | {"epochs": 1, "small_fraction": 0.0})
    utils.setup_torch("cpu", 1, False)  # as in the processes; rounding grows from step to step
    state = train.TrainState(config, CPU)
    start = copy.deepcopy(state.model.state_dict())
    halves = [build_loader(config, CPU, rank, 2)[0] for rank in range(2)]
    for first, second in zip(*halves, strict=True):
        buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
        state.optimizer.zero_grad()
        for images, labels in (second, first):  # the first process's statistics are the ones that stay
            for name, buffer in state.model.named_buffers():
                buffer.copy_(buffers[name])
            (F.cross_entropy(state.model.train()(images), labels, label_smoothing=0.1) / 2).backward()
        state.optimizer.step()
    result = state.model.state_dict()
    assert differ(weights(folder), result) < 1e-3 * differ(start, result)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_process_ends_the_run_and_one_process_goes_on(tmp_path: Path) -> None:
    """torchrun reports which process was killed; the program itself says one line."""
    words = [*TORCHRUN, *command(tmp_path, epochs=6)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            if line.startswith("Epoch 3/"):
                break
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
        os.kill(int(children.split()[-1]), signal.SIGKILL)
        begun = time.monotonic()
        output, errors = running.communicate(timeout=60)
        assert running.returncode != 0 and time.monotonic() - begun < 30
    ours = [line for line in errors.splitlines() if line.startswith("train.py: error")]
    stopped = [line for line in output.splitlines() if line.startswith("Stopped. Go on with")]
    assert len(ours + stopped) == 1, (output, errors)
    (folder,) = tmp_path.iterdir()
    assert len(log_rows(folder)) == 2
    run(sys.executable, "train.py", "--resume", str(folder))
    assert [row["epoch"] for row in log_rows(folder)] == ["1", "2", "3", "4", "5", "6"]


def test_two_processes_go_on_with_a_run_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_at(monkeypatch, Loader, "set_epoch", 2, interrupt)
        train.train(replace(TINY, **SHORT | EVERYTHING, runs_dir=str(tmp_path)))
    (one,) = tmp_path.iterdir()
    before = weights(one)
    run(*TORCHRUN, "--resume", str(one))
    assert [row["epoch"] for row in log_rows(one)] == ["1", "2"]
    assert 0 < differ(weights(one), before) < 1


def test_parts_make_up_the_batches() -> None:
    config = replace(TINY, **SHORT | EVERYTHING)
    images, _ = data.load_training("synthetic", "", 3, 10)
    whole, parts = Loader(images, config), [Loader(images, config, slice(i, None, 4)) for i in range(4)]
    for (images, labels), *pieces in zip(*map(list, (whole, *parts)), strict=True):  # one epoch after the other
        assert torch.equal(torch.stack([piece[0] for piece in pieces], 1).flatten(0, 1), images)
        assert torch.equal(torch.stack([piece[1] for piece in pieces], 1).flatten(0, 1), labels)
    assert len({loader.cache_key for loader in (whole, *parts)}) == 5, "kept logits are of one part"


def test_processes_need_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for device, message in (("cuda:0", "cannot share cuda:0"), ("auto", "no GPU for process 3: torch sees 2")):
        with pytest.raises(UserError, match=message), utils.process_group(device):
            pass


def test_batches_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UserError, match="3 processes cannot share batches of 64"):
        build_loader(replace(TINY, **SHORT), CPU, 0, 3)
