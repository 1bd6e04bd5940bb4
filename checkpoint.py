"""Checkpoints of plain types: written whole or not at all, opened without running code, checked by a digest."""

import hashlib
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

FORMAT = 1
BEST = Path("checkpoints/best.pth")
PUBLISHED = Path("checkpoints/published.pth")
LARGEST = 256 * 2**20  # bytes unpacked; ours have 4 to 16 MB


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or another program's; the message names the file and the cure."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts, with format number and digest."""
    content = {"format": FORMAT, **content}
    content["digest"] = digest(content)
    write_whole(path, lambda file: torch.save(content, file))


def load(path: Path) -> dict[str, Any]:
    """Open a checkpoint on the CPU without running any code in it; raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} is not there. Train one (python train.py) or give another with --checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST:
                raise ValueError(f"it unpacks to more than {LARGEST // 2**20} MiB")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "digest" not in content:
            raise ValueError("it was not written by this program")
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}, this program reads {FORMAT}")
        if content.pop("digest") != digest(content):
            raise ValueError("its digest does not match its content")
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError, MemoryError,
            NotImplementedError, OverflowError, pickle.UnpicklingError, zipfile.BadZipFile) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be used: {reason}. Delete it, or take an undamaged copy") from error
    return content


def digest(content: dict[str, Any]) -> str:
    """SHA-256 over the names, types, shapes and bytes of everything in a nested dict, in its order."""
    sha = hashlib.sha256()
    for name, value in leaves(content):
        if isinstance(value, Tensor):
            sha.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            sha.update(f"{name}:{value!r};".encode())
    return sha.hexdigest()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The (path, value) of everything in nested dicts and lists that is neither."""
    if isinstance(value, dict | list | tuple) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key!r}")
    else:
        yield name, value


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file, sync it to the disk and give it its name: never a half-written file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
