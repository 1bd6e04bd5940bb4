"""Kill training runs and damage files at random: python -m tests.soak --kills 50, or --damage 200."""

import argparse
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import evaluate
import train
from config import Config, preset
from model import MobileNetV3
from tests.helpers import TINY, digest, log_rows, small_set, taken_for_official

# Runs are forked from a server that has imported torch once and has run nothing: autograd does not survive a fork.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "matplotlib.figure", "torchvision.transforms.v2"])


def outcome(folder: Path) -> str:
    """A digest of all that a run must end with: weights, optimizer, schedule and log."""
    last, best = checkpoint.load(folder / "last.pth"), checkpoint.load(folder / "best.pth")
    return digest({"state": last["state"], "best": best["weights"], "log": log_rows(folder)})


def run(config: Config, folder: Path | None) -> None:
    """One training process, silent; what it printed is in printed.txt beside the run folders."""
    with open(Path(config.runs_dir).parent / "printed.txt", "w", buffering=1) as file:
        sys.stdout = file
        tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves to the system
        train.train(config, folder)


def start(config: Config, folder: Path | None = None) -> Any:
    process = SERVER.Process(target=run, args=(config, folder))
    process.start()
    return process


def check_killed(folder: Path, printed: str) -> int:
    """Assert that a killed run's files are whole and that no finished epoch is lost; the epochs that it has kept."""
    for path in folder.glob("*.pth"):
        checkpoint.load(path)
    kept = checkpoint.load(folder / "last.pth")["epoch"] if (folder / "last.pth").exists() else 0
    assert kept >= printed.count("Learning Rate"), "an epoch was reported as finished, and is lost"
    if (folder / "log.csv").exists():
        assert len(log_rows(folder)) in (kept, kept - 1)
    if (folder / "curves.png").exists():
        assert (folder / "curves.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    return kept


def kill(count: int, seed: int, bound: float = 1500) -> tuple[int, int, int]:
    """Kill `count` runs at random moments and resume them.

    How many were killed, how many of them before there was a run, and how many were resumed and ended identical.
    """
    rng, killed, early, identical, begun = random.Random(seed), 0, 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary, "runs")
        changed = {"epochs": 3, "validation_per_class": 1, "batch_size": 40, "ema": 0.9, "mixup": 0.2, "dropout": 0.1}
        config = Config(
            **preset("scratch") | changed, dataset="synthetic", images_per_class=3, device="cpu", threads=1,
            runs_dir=str(runs), seed=seed % 1000,
        )  # fmt: skip
        start(config).join()
        (undisturbed,) = runs.iterdir()
        expected = outcome(undisturbed)
        began = time.monotonic()
        start(config).join()
        length = time.monotonic() - began
        while killed < count and time.monotonic() - begun < bound:
            before = set(runs.iterdir())
            process = start(config)
            time.sleep(rng.uniform(0, length))
            process.kill()
            process.join()
            killed += 1
            new = set(runs.iterdir()) - before
            if not new or not (next(iter(new)) / "config.json").exists():
                early += 1  # nothing is lost: the user starts it again
                continue
            (folder,) = new
            kept = check_killed(folder, Path(temporary, "printed.txt").read_text())
            again = train.resumed_config(folder, {})
            assert again == config
            start(again, folder).join()
            resumed = Path(temporary, "printed.txt").read_text()
            assert resumed.count("Train Loss") == config.epochs - kept, "more than the current epoch was repeated"
            names = {path.name for path in folder.iterdir()}
            assert names == {"config.json", "log.csv", "last.pth", "best.pth", "curves.png"}, names
            identical += outcome(folder) == expected
    return killed, early, identical


def damages(rng: random.Random) -> dict[str, Callable[[Path], Any]]:
    """Ways to damage a file."""

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    return {"truncated": truncate, "bit flipped": flip, "empty": lambda path: path.write_bytes(b""), "folder": folder}


def damage(count: int, seed: int) -> tuple[int, int, int]:
    """Damage a checkpoint and a data file `count` times in each way; how many were refused, harmless, accepted."""
    rng, tally = random.Random(seed), {"refused": 0, "harmless": 0, "accepted": 0}
    torch.manual_seed(seed)
    model, arrays = MobileNetV3(), small_set()
    with tempfile.TemporaryDirectory() as temporary, taken_for_official(arrays):
        pth, npz = Path(temporary, "some.pth"), Path(temporary, "cifar100.npz")
        content = {"config": asdict(TINY), "epoch": 1, "weights": model.state_dict()}
        checkpoint.save(pth, content)
        np.savez(npz, **arrays)
        wholes = {pth: pth.read_bytes(), npz: npz.read_bytes()}

        def read_checkpoint() -> Any:
            return evaluate.load_model(pth)[1]["weights"]

        readers = {pth: read_checkpoint, npz: lambda: {name: data.read(npz, name) for name in data.SHAPES}}
        expected = {path: digest(as_tensors(read())) for path, read in readers.items()}

        def judge(path: Path) -> None:
            try:
                found = digest(as_tensors(readers[path]()))
            except (checkpoint.CheckpointError, data.DataError) as error:
                assert str(path) in str(error) and "\n" not in str(error), error
                tally["refused"] += 1
            else:
                tally["harmless" if found == expected[path] else "accepted"] += 1

        for path, whole in wholes.items():
            for spoil in damages(rng).values():
                for _ in range(count):
                    path.write_bytes(whole)
                    spoil(path)
                    judge(path)
                    if path.is_dir():
                        path.rmdir()
        for _ in range(count):
            weights = dict(model.state_dict())
            name = rng.choice(sorted(weights))
            weights[name] = torch.zeros(7)  # another model's
            checkpoint.save(pth, content | {"weights": weights})
            judge(pth)
            with mock.patch.object(checkpoint, "FORMAT", rng.randrange(2, 1000)):
                checkpoint.save(pth, content)
            judge(pth)
    return tally["refused"], tally["harmless"], tally["accepted"]


def as_tensors(arrays: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(array) for name, array in sorted(arrays.items())}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="runs to kill")
    parser.add_argument("--damage", type=int, default=0, help="files to damage in each way")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wrong = False
    if arguments.damage:
        refused, harmless, accepted = damage(arguments.damage, arguments.seed)
        print(f"{refused} refused, {harmless} harmless (the same content), {accepted} accepted with other content")
        wrong |= accepted > 0
    if arguments.kills:
        killed, early, identical = kill(arguments.kills, arguments.seed)
        print(f"{killed} kills: {early} before there was a run to resume, {identical} resumed with an identical end")
        wrong |= early + identical < killed or killed < arguments.kills
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
