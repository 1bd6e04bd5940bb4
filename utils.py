"""Small helpers that every program needs: one-line errors, whole files, locks, the device, the loss curves."""

import ctypes
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import IO, Any

import torch

History = list[dict[str, Any]]  # a dict an epoch with the columns of log.csv; None where nothing was measured

# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^Dvp*"


class UserError(Exception):
    """Something that the user can mend. The message is one line: what is wrong, and what to do."""


def program(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a `main` that returns an exit code: an error of the user's is one line on stderr and code 1.

    Ctrl-C ends it with code 130 and without a traceback, as does a reader that has gone (`| head`) with code 0.
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                return main(argv)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
                return 0
            except (UserError, OSError) as error:
                print(f"{name}: error: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                return 130

        return run

    return decorate


def one_line(error: Exception) -> str:
    """The error's text without line breaks, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file, sync it to the disk and rename it to `path`: a reader sees all or nothing.

    Raises UserError where the disk is full, or the folder read-only or gone; an older file then stays as it was.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error).split("\n")[0]
        raise UserError(
            f"{path} cannot be written: {reason}. Stopped; the files before it are whole. Make room or mend the "
            "folder, then run again (a training run with --resume)"
        ) from error


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process alone. Where another process holds it, wait, or raise UserError.

    The system frees the lock when the process ends, however it ends. Without flock (Windows) nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: wait for it, or stop it first") from None
    finally:
        os.close(handle)


def remove_partial(folder: Path, name: str = "") -> None:
    """Delete the temporary files that a killed process left; only for who holds the folder."""
    for path in folder.glob(f".{name}*.part"):
        path.unlink()


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is any, else the CPU. Raises UserError."""
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"{name} is not there: torch sees {torch.cuda.device_count()} CUDA devices. Try --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the system: on a CPU the page faults that follow cost a quarter of a
    training step, and most of the time of grading."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    # The parameters' numbers stand in glibc's malloc.h.
    m_mmap_max, m_trim_threshold, m_top_pad, m_arena_max = -4, -1, -2, -8
    mallopt(m_mmap_max, 0)  # no block is mapped by itself, however large
    mallopt(m_trim_threshold, 2**31 - 1)  # bytes
    mallopt(m_top_pad, 16 * 2**20)  # bytes
    mallopt(m_arena_max, 1)


def best_row(history: History) -> dict[str, Any]:
    """The first row of the best validation accuracy; the last row where nothing was validated."""
    if history[0]["validation_accuracy"] is None:
        return history[-1]
    return max(history, key=lambda row: row["validation_accuracy"])


def draw_curves(runs: dict[str, History], path: Path) -> None:
    """Write a PNG, 900 pixels wide: loss and accuracy over epochs, train dashed and validation solid.

    Each run has a colour, and a marker at its best epoch. Raises UserError where it cannot be written.
    """
    from matplotlib.figure import Figure  # here, as its import takes a second

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    if len(runs) > 1:
        figure.suptitle("train dashed, validation solid, its best epoch marked", fontsize=11)
    for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy", "%"), strict=True):
        axes.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.2)
        for (run, history), colour, marker in zip(runs.items(), cycle(COLOURS), cycle(MARKERS)):
            epochs, best = [row["epoch"] for row in history], best_row(history)
            dots = "." if len(history) == 1 else ""  # a line of one point cannot be seen
            validated = best["validation_accuracy"] is not None
            train, label = [row[f"train_{name}"] for row in history], f"{run}: train"
            hidden = validated and len(runs) > 1  # the heading says what is dashed
            axes.plot(epochs, train, f"{dots}--", color=colour, linewidth=1, label=None if hidden else label)
            if validated:
                validation = [row[f"validation_{name}"] for row in history]
                axes.plot(epochs, validation, color=colour, label=f"{run}: validation, best in epoch {best['epoch']}")
                axes.plot(best["epoch"], best[f"validation_{name}"], marker, color=colour)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=100))
