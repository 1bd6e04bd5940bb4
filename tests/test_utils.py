"""Errors in one line, whole files, the device, and what programs leave behind in a process: nothing."""

import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import utils


def process_settings() -> tuple:
    """What a program could leave behind in other people's code."""
    backends, deterministic = torch.backends, torch.are_deterministic_algorithms_enabled()
    precisions = [part.fp32_precision for part in (backends, backends.cudnn.conv, backends.cuda.matmul)]
    settings = torch.get_num_threads(), deterministic, backends.cudnn.benchmark
    return *settings, *precisions, signal.getsignal(signal.SIGTERM), sys.stdout.errors


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (utils.UserError("fix it"), 1, "name: error: fix it\n"),
        (PermissionError(13, "Permission denied", "file"), 1, "name: error: [Errno 13] Permission denied: 'file'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(error: BaseException, code: int, printed: str, capsys) -> None:
    @utils.program("name")
    def main(argv: list[str] | None = None) -> int:
        raise error

    assert main([]) == code
    assert capsys.readouterr() == ("", printed)


@pytest.mark.parametrize("stdout", [io.StringIO, lambda: None, lambda: io.TextIOWrapper(io.BytesIO(), "ascii")])
def test_a_program_prints_to_any_stdout_and_leaves_it_as_it_was(stdout: Any, monkeypatch) -> None:
    """A notebook's, none (`>&-`), and a terminal without ±, which is escaped."""
    given = stdout()
    monkeypatch.setattr(sys, "stdout", given)
    assert utils.program("name")(lambda argv: print("±") or 0)([]) == 0
    if isinstance(given, io.TextIOWrapper):
        given.flush()
        assert (given.errors, given.buffer.getvalue()) == ("strict", b"\\xb1\n")


def test_a_reader_sees_the_old_file_until_the_new_one_is_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    path, fsync, seen = tmp_path / "some.txt", os.fsync, []
    path.write_bytes(b"old")

    def sync(descriptor: int) -> None:
        seen.append((path.read_bytes(), os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    utils.atomic_write(path, lambda file: file.write(b"newer"))
    assert seen == [(b"old", 5)], "once, when all was written"
    assert path.read_bytes() == b"newer"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "as the user's umask says"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_write_that_fails_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(b"old")

    def fail(file: io.BufferedWriter) -> None:
        file.write(b"new")
        raise error

    with pytest.raises((KeyboardInterrupt, utils.UserError)) as caught:
        utils.atomic_write(path, fail)
    if isinstance(error, OSError):
        assert re.fullmatch(r".*some\.txt cannot be written: No space left on device\. .+", str(caught.value))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_a_device_that_cannot_compute_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(count: int, device: torch.device) -> None:
        raise RuntimeError(f"{device} error: no kernel image is available\nkernel errors might be reported")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, device in (("auto", "cuda"), ("cuda:1", "cuda:1"), ("mps", "mps")):
        with pytest.raises(utils.UserError, match=rf"^{device} cannot be used: .+ is available\. Try --device cpu$"):
            utils.choose_device(name)
