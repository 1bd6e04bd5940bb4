"""Train with several seeds in turn and print the spread: python -m tools.seeds N [flags of train.py]."""

import argparse
import os
import statistics
import sys
from dataclasses import replace

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or OpenMP's idle threads take the cores from other processes

import torch

import train
from checkpoint import load
from config import Config, OneLineParser, parse_command_line
from utils import keep_freed_memory, program, stop_on_signals

MAX_SEEDS = 100  # seeds


def configs(argv: list[str] | None = None) -> list[Config]:
    """The settings of each run, from the command line; the first has the seed that --seed gives."""
    parser = OneLineParser(prog="python -m tools.seeds", description=__doc__, allow_abbrev=False)
    parser.add_argument("count", type=int, metavar="N", help=f"seeds, 1 to {MAX_SEEDS}")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="flags of train.py, but not --resume")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.count <= MAX_SEEDS:
        parser.error(f"N must be between 1 and {MAX_SEEDS}, not {arguments.count}")
    run = parse_command_line(arguments.flags)
    if torch.distributed.is_torchelastic_launched():
        parser.error("seeds are trained one after the other: start it without torchrun")
    if run.resume:
        parser.error("--resume goes on with one run: python train.py --resume RUN")
    if not run.config.validation_per_class:
        parser.error("seeds are compared by validation accuracy: validation_per_class must be above 0")
    try:
        return [replace(run.config, seed=run.config.seed + i) for i in range(arguments.count)]
    except ValueError as error:
        parser.error(str(error))


def train_seeds(runs: list[Config]) -> list[float]:
    """Train each run; their best validation accuracies in percent. Raises UserError."""
    best = []
    for config in runs:
        try:
            folder = train.train(config)
        except KeyboardInterrupt:
            print(f"Seeds {config.seed} to {runs[-1].seed} are not finished: no mean and no standard deviation")
            raise
        print(train.summary(folder, config), flush=True)
        best.append(load(folder / "best.pth")["metrics"]["validation_accuracy"])
    return best


def spread(accuracies: list[float]) -> str:
    """Mean and standard deviation, in one line."""
    if len(accuracies) == 1:
        return f"Best validation accuracy of 1 seed: {accuracies[0]:.2f} %"
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    return f"Best validation accuracy of {len(accuracies)} seeds: {mean:.2f} % ± {std:.2f} (standard deviation)"


@program("tools.seeds")
def main(argv: list[str] | None = None) -> int:
    runs = configs(argv)
    stop_on_signals()
    keep_freed_memory()
    print(spread(train_seeds(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
