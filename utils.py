"""Small helpers that every program needs: one-line errors, whole files, locks, the device, the loss curves."""

import ctypes
import errno
import functools
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

History = list[dict[str, Any]]  # a dict an epoch with the columns of log.csv; None where nothing was measured

# Colours that colour-blind readers can tell apart (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^Dvp*"


class UserError(Exception):
    """Something that the user can fix. The message is one line: what is wrong, and what to do."""


def program(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a `main` that returns an exit code: UserError and OSError print one line on stderr and return 1.

    Without a traceback too: Ctrl-C (code 130), other signals (128 + number), a pipe whose reader has ended (141).
    """

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            try:
                code = main(argv)
                sys.stdout.flush()  # or a reader that has ended shows only after this
                return code
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
                return 141
            except (UserError, OSError) as error:
                print(f"{name}: error: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt as interrupt:
                return 128 + (interrupt.args or [signal.SIGINT])[0]

        return run

    return decorate


def stop_on_signals() -> None:
    """Let SIGTERM raise KeyboardInterrupt as Ctrl-C does, each with its number."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


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
        reason = error.strerror or one_line(error)
        raise UserError(
            f"{path} cannot be written: {reason}. Stopped; the files before it are whole. Make room or repair the "
            "folder, then run again (a training run with --resume)"
        ) from error


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process alone. Where another process holds it, wait, or raise UserError.

    The system frees the lock when the process ends, however it ends. Without flock (Windows, some network
    disks) nothing is locked.
    """
    handle = None
    with suppress(ImportError):
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(handle)
                raise UserError(f"{folder} is in use by another process: wait for it, or stop it first") from None
    try:
        yield
    finally:
        if handle is not None:
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


@functools.cache
def provenance(device: str) -> dict[str, str | None]:
    """What a figure depends on beside its settings: torch's version, the code's commit, and the machine.

    The commit is None outside of a git checkout, and ends in -dirty where files were changed. The machine is the GPU,
    or the CPU with the number of its threads that torch uses.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if choose_device(device).type == "cuda":
        machine = torch.cuda.get_device_name(choose_device(device))
    else:
        cpus = Path("/proc/cpuinfo")  # of Linux
        names = re.findall(r"^model name\s*: (.+)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else []
        threads = torch.get_num_threads()
        machine = f"{[*names, platform.machine()][0]}, {threads} thread{'s' * (threads > 1)}"
    return {"torch": str(torch.__version__), "commit": commit, "machine": machine}


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


def open_tensorboard(folder: Path, epoch: int) -> Any:
    """A torch.utils.tensorboard.SummaryWriter that goes on with `epoch`. Raises UserError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs tensorboard. Run: pip install -r requirements-tools.txt") from error
    return SummaryWriter(str(folder), purge_step=epoch, flush_secs=10)


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


class Meter:
    """Mean loss and accuracy of an epoch. The sums stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums, self.count = torch.zeros(2, device=device), 0

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch; of mixed targets (N, 100) the larger part counts as the label."""
        labels = labels if labels.ndim == 1 else labels.argmax(1)
        self.sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        self.count += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent; waits for the device."""
        loss, accuracy = (self.sums / self.count).tolist()
        return loss, 100 * accuracy


def progress_bar(loader: Any, meter: Meter) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches, under a bar with loss, accuracy and the time left; on a terminal only."""
    total = len(loader) * loader.batch_size
    with tqdm(total=total, unit=" images", disable=None, leave=False, mininterval=0.5) as bar:
        for images, labels in loader:
            yield images, labels
            if bar.update(len(labels)):  # the bar was drawn: twice a second, as reading waits for the device
                loss, accuracy = meter.read()
                bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}%", refresh=False)
