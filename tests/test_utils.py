"""Errors in one line, whole files, locks, memory."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (utils.UserError("fix it"), 1, "name: error: fix it\n"),
        (PermissionError(13, "Permission denied", "file"), 1, "name: error: [Errno 13] Permission denied: 'file'\n"),
        (KeyboardInterrupt(), 130, ""),
        (KeyboardInterrupt(2), 130, ""),
        (KeyboardInterrupt(15), 143, ""),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture
) -> None:
    @utils.program("name")
    def main(argv: list[str] | None = None) -> int:
        raise error

    assert main([]) == code
    assert capsys.readouterr() == ("", printed)


def test_a_mistake_in_the_program_keeps_its_traceback() -> None:
    @utils.program("name")
    def main(argv: list[str] | None = None) -> int:
        raise ValueError(argv)

    with pytest.raises(ValueError, match="some"):
        main(["some"])


def test_a_program_that_was_started_without_an_output_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by `>&-`."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert utils.program("name")(lambda argv: 0)([]) == 0


def test_a_program_ends_quietly_with_code_141_when_its_reader_ends() -> None:
    """As `| head` does."""
    code = """if True:
        import sys, utils
        @utils.program("name")
        def main(argv=None):
            for i in range(100_000):
                print(i, flush=True)
            return 0
        sys.exit(main())
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, "")
    process.stderr.close()


def test_a_reader_that_ended_is_noticed_in_buffered_output_too() -> None:
    code = """if True:
        import sys, utils
        @utils.program("name")
        def main(argv=None):
            sys.stdin.readline()  # until the reader has ended
            print("some")
            return 0
        sys.exit(main())
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **pipes)
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert (process.wait(60), process.stderr.read()) == (141, "")
    process.stderr.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt(2), ValueError("wrong"), OSError(28, "No space left on device")])
def test_an_atomic_write_that_fails_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    utils.atomic_write(path, lambda file: file.write(b"old"))
    plain = tmp_path.parent / "plain.txt"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode, "as the user's umask says"

    def fail(file: object) -> None:
        file.write(b"new")
        raise error

    expected = utils.UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        utils.atomic_write(path, fail)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(b"old")

    def write(file: object) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    utils.atomic_write(path, write)
    assert path.read_bytes() == b"new"


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = "import pathlib, sys, utils\nwith utils.locked(pathlib.Path(sys.argv[1])):\n    print('held'); input()"
    command = [sys.executable, "-u", "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(utils.UserError, match="in use by another process"), utils.locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    with utils.locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EAGAIN, errno.EACCES])
def test_only_a_held_lock_refuses_a_folder(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGAIN and EACCES say that it is held; with the others the file system has no locks, and work goes on."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    held = []
    if number in (errno.EAGAIN, errno.EACCES):
        with pytest.raises(utils.UserError, match="in use by another process"), utils.locked(tmp_path):
            held.append(1)
        assert held == []
    else:
        with utils.locked(tmp_path), utils.locked(tmp_path):
            held.append(1)
        assert held == [1]


def test_an_errors_text_has_no_line_breaks() -> None:
    assert utils.one_line(ValueError("two\n  lines")) == "two lines"
    assert utils.one_line(MemoryError()) == "MemoryError"


def test_choosing_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(torch, "ones", lambda count, device: tried.append(device.type))
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert utils.choose_device("auto").type == tried[-1] == expected


def test_a_gpu_that_cannot_compute_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise torch.AcceleratorError("CUDA error: no kernel image is available\nCUDA kernel errors might be reported")

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(utils.UserError, match=r"^cuda cannot be used: CUDA error: no kernel image is available\. Try"):
        utils.choose_device("cuda")


def test_all_threads_flush_denormals() -> None:
    """In a process of its own, as the threads of this one have started."""
    code = "import torch, utils\nutils.setup_torch('cpu', 2, False)\nprint((torch.full([10**6], 1e-30) * 1e-10).sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "tensor(0.)\n", done.stderr


def test_provenance_names_commit_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **more: object) -> None:
        raise FileNotFoundError("git")

    threads = torch.get_num_threads()
    found = utils.provenance.__wrapped__("cpu")
    assert found["torch"] == torch.__version__
    assert found["machine"].endswith(f", {threads} thread{'s' * (threads > 1)}")
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", found["commit"])
    monkeypatch.setattr(subprocess, "run", missing)
    assert utils.provenance.__wrapped__("cpu") == found | {"commit": None}
