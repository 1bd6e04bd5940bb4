"""Errors in one line, whole files, locks, memory."""

import subprocess
import sys
from pathlib import Path

import pytest

import utils


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (utils.UserError("mend it"), 1, "name: error: mend it\n"),
        (PermissionError(13, "Permission denied", "file"), 1, "name: error: [Errno 13] Permission denied: 'file'\n"),
        (KeyboardInterrupt(2), 130, ""),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(
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


def test_a_reader_that_has_gone_ends_a_program_quietly() -> None:
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
    assert (process.wait(60), process.stderr.read()) == (0, "")
    process.stderr.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt(2), ValueError("wrong"), OSError(28, "No space left on device")])
def test_an_atomic_write_that_fails_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    utils.atomic_write(path, lambda file: file.write(b"old"))
    assert path.stat().st_mode & 0o777 == 0o644

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


def test_best_row_is_the_first_of_the_best() -> None:
    history = [{"epoch": i, "validation_accuracy": value} for i, value in enumerate((1.0, 3.0, 3.0, 2.0))]
    assert utils.best_row(history)["epoch"] == 1
    assert utils.best_row([row | {"validation_accuracy": None} for row in history])["epoch"] == 3


def test_an_errors_text_has_no_line_breaks() -> None:
    assert utils.one_line(ValueError("two\n  lines")) == "two lines"
    assert utils.one_line(MemoryError()) == "MemoryError"


def test_choosing_a_device() -> None:
    assert utils.choose_device("cpu").type == "cpu"
    with pytest.raises(utils.UserError, match=r"cuda:99 is not there: .* Try --device cpu"):
        utils.choose_device("cuda:99")
    assert utils.choose_device("auto").type in ("cpu", "cuda")
