"""Small helpers that every program needs: one-line errors, whole files, the device, several processes."""

import ctypes
import functools
import io
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent  # of the repository


class UserError(Exception):
    """Something that the user can fix. The message is one line: what is wrong and, mostly, what to do."""


def program(name: str) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Decorate a `main`, so that it returns an exit code: a UserError, an OSError or a missing package prints one
    line on stderr and returns 1, KeyboardInterrupt returns 130. It also keeps freed memory."""

    def decorate(main: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            keep_freed_memory()
            try:
                return main(argv) or 0
            except (UserError, OSError, ModuleNotFoundError) as error:
                missing = isinstance(error, ModuleNotFoundError)
                cure = ". Run: pip install -r requirements.txt -r requirements-tools.txt" if missing else ""
                print(f"{name}: error: {error}{cure}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                return 130

        return run

    return decorate


def one_line(error: Exception) -> str:
    """The error's text without line breaks, or its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(path: Path) -> Path:
    """A path as it is typed in the current folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file, sync it to the disk and rename it to `path`: a reader sees all or nothing.

    Raises UserError if `path` is a folder, the disk is full, or the folder is read-only or gone. An older file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{path} cannot be written: {reason}. Make room or repair the folder and try again") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def world_size() -> int:
    """How many processes train together: those that torchrun started, otherwise 1."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among those that train together; process 0 prints, draws and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process do something alone, such as a download, before the others do it."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the other processes if torchrun started this one, each with a GPU of its own; only the first one prints.

    Raises UserError if there are too few GPUs.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if ":" in device:
        raise UserError(f"several processes cannot share {device}. Give --device cuda")
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda and (gpu := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
        raise UserError(f"there is no GPU for process {gpu + 1}: torch sees {torch.cuda.device_count()}. Start fewer")
    if cuda:
        torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    with redirect_stdout(io.StringIO() if rank() else sys.stdout):
        yield
        dist.barrier()  # otherwise a process that ends early can abort the others
    dist.destroy_process_group()  # not after an error: it would wait for processes that have ended


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is any, otherwise the CPU. Raises UserError if torch cannot use
    it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"{name} cannot be used: {reason}. Try --device cpu") from error


def set_up(threads: int, deterministic: bool) -> None:
    """Set this process's CPU threads (0 = torch's choice), denormals, cuDNN and deterministic kernels."""
    torch.set_flush_denormal(True)  # otherwise gradients near 0 slow a CPU down (docs/notes.md)
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.backends.cudnn.benchmark = not deterministic  # shapes hardly change: cuDNN times its algorithms for each
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matrix products
    torch.use_deterministic_algorithms(deterministic)


def provenance(device: torch.device) -> dict[str, str | None]:
    """What a figure depends on apart from its settings: torch's version, the code's commit, and the machine.

    The commit is None outside of a git checkout, and ends in -dirty if files were changed. The machine is the GPU, or
    the CPU with the number of its threads that torch uses.
    """
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
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
