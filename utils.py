"""Small helpers that every program needs: one-line errors, whole files, locks, the device, several processes."""

import ctypes
import functools
import io
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm


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
                print(end="", flush=True)  # or a reader that has ended shows only after this
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
    """Let SIGINT (Ctrl-C) and SIGTERM raise KeyboardInterrupt(signal number)."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def one_line(error: Exception) -> str:
    """The error's text without line breaks, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file, sync it to the disk and rename it to `path`: a reader sees all or nothing.

    Raises UserError where `path` is a folder, the disk full, or the folder read-only or gone; an older file then stays.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give the name of a file")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
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
        except (BlockingIOError, PermissionError):
            os.close(handle)
            raise UserError(f"{folder} is in use by another process: wait for it, or stop it first") from None
        except OSError:  # a disk without locks
            pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def remove_partial(folder: Path, name: str = "") -> None:
    """Delete the temporary files that a killed process left; only for who holds the folder."""
    for path in folder.glob(f".{name}*.part"):
        path.unlink()


def world_size() -> int:
    """How many processes train together: those that torchrun started, else 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among those that train together; 0 is the one that prints, draws and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast(value: Any) -> Any:
    """The first process's value, in all of them."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the other processes that torchrun started, where it did, each with a GPU of its own; only the first prints.

    Raises UserError where there are too few GPUs, and in the first process where the others cannot be reached.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if ":" in device:
        raise UserError(f"several processes cannot share {device}. Give --device cuda")
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and (gpu := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
        raise UserError(f"there is no GPU for process {gpu + 1}: torch sees {torch.cuda.device_count()}. Start fewer")
    try:
        if cuda:
            torch.cuda.set_device(gpu)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        with redirect_stdout(io.StringIO() if rank() else sys.stdout):
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        if dist.is_initialized() and rank():
            sys.exit(1)  # the first process says it
        reason = one_line(error).partition(". ")[0]
        raise UserError(f"the processes cannot go on together, one may have ended: {reason}. Try --resume") from error
    dist.destroy_process_group()  # not after an error: it would wait for processes that have ended


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is any, else the CPU. Raises UserError where it is not there,
    its driver is too old, another process holds it, or torch has no kernels for it."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    try:
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        what = f"{device} cannot be used: " + str(error).partition("\n")[0]
        raise UserError(f"{what}. Try --device cpu, or set CUDA_VISIBLE_DEVICES=''") from error
    return device


def setup_torch(device: str, threads: int, deterministic: bool) -> torch.device:
    """Set the number of CPU threads (0: torch's choice) and ask for deterministic kernels or not. Returns the device.

    Call it before any work of torch's: its threads take over what holds when they start.
    """
    torch.set_flush_denormal(True)  # else gradients near 0 slow a CPU down (docs/performance.md)
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matrix products
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic  # a run has two shapes: cuDNN times its algorithms for each
    return choose_device(device)


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
        machine = f"{[*names, platform.machine()][0]}, {threads} {'thread' if threads == 1 else 'threads'}"
    machine = f"{world_size()} x {machine}" if world_size() > 1 else machine
    return {"torch": str(torch.__version__), "commit": commit, "machine": machine}


def keep_freed_memory() -> None:
    """Stop glibc from returning freed memory to the system: on a CPU the page faults that follow slow down training
    and grading."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD (bytes), M_ARENA_MAX; their numbers stand in its malloc.h
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 16 * 2**20), (-8, 1)):
            mallopt(parameter, value)


def open_tensorboard(folder: Path, epoch: int) -> Any:
    """A torch.utils.tensorboard.SummaryWriter that goes on with `epoch`. Raises UserError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs tensorboard. Run: pip install -r requirements-tools.txt") from error
    return SummaryWriter(str(folder), purge_step=epoch, flush_secs=10)


def progress_bar(loader: Any, meter: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The loader's batches, under a bar with the meter's loss and accuracy: on a terminal, by the first process."""
    total, disable = len(loader) * loader.batch_size, True if rank() else None
    with tqdm(total=total, unit=" images", disable=disable, leave=False, mininterval=0.5) as bar:
        for images, labels in loader:
            yield images, labels
            if bar.update(loader.batch_size):  # the bar was drawn: twice a second, as reading waits for the device
                loss, accuracy = meter.compute()
                bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f}%", refresh=False)
