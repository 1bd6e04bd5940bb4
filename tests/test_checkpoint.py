"""Checkpoints: what is written comes back, what is damaged or hostile does not."""

import random
import zipfile
from datetime import datetime
from pathlib import Path

import pytest
import torch

import checkpoint
import utils
from tests.helpers import Bomb, digest

CONTENT = {
    "weights": {"a": torch.arange(600.0).view(20, 30), "b": torch.tensor(3)},
    "history": [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": None}],
    "empty": {},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "some.pth", CONTENT)
    return tmp_path / "some.pth"


def test_load_gives_what_was_saved(path: Path) -> None:
    content = checkpoint.load(path)
    assert content.pop("format") == checkpoint.FORMAT
    assert digest(content) == digest(CONTENT)
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    """Each bit of the tensor's entry in the archive's directory, and some of all; those of dates do no harm."""
    path, small = tmp_path / "small.pth", {"weights": {"a": torch.arange(3.0)}, "epoch": 1}
    checkpoint.save(path, small)
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    entry = good.rindex(b"PK\1\2", 0, good.rindex(b"/data/0"))
    bits = [*range(8 * entry, 8 * entry + 8 * 46), *rng.sample(range(8 * len(good)), 500)]
    for bit in bits:
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            opened = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert digest(opened) == digest({"format": checkpoint.FORMAT, **small}), bit
    assert refused > len(bits) / 2


def test_a_truncated_file_is_refused(path: Path) -> None:
    good, rng = path.read_bytes(), random.Random(0)
    for size in [0, 1, len(good) - 1, *(rng.randrange(len(good)) for _ in range(20))]:
        path.write_bytes(good[:size])
        with pytest.raises(checkpoint.CheckpointError, match=r"some\.pth cannot be used"):
            checkpoint.load(path)


def test_code_in_a_checkpoint_does_not_run(path: Path) -> None:
    torch.save({"format": 1, "weights": Bomb()}, path)
    with pytest.raises(checkpoint.CheckpointError, match="more than plain data") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert not Bomb.exploded


def test_other_files_are_refused(path: Path) -> None:
    torch.save({"weights": {}}, path)
    with pytest.raises(checkpoint.CheckpointError, match="not written by this version"):
        checkpoint.load(path)
    checkpoint.save(path, {"format": 0})
    with pytest.raises(checkpoint.CheckpointError, match="not written by this version"):
        checkpoint.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    with pytest.raises(checkpoint.CheckpointError, match=r"archive/data\.pkl in it is compressed"):
        checkpoint.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="cannot be used"):
        checkpoint.load(path)


def test_runs_of_one_second_have_their_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another process makes the folder just before."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(checkpoint, "datetime", Clock)
    runs = tmp_path / "some" / "runs"
    first, second = (checkpoint.new_run(str(runs), "any") for _ in range(2))
    made, raced = Path.mkdir, []

    def another_was_first(path: Path, *arguments: object, **more: object) -> None:
        if not raced and path == second.with_name(f"{second.name}+"):
            raced.append(path)
            made(path)
        made(path, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", another_was_first)
    third = checkpoint.new_run(str(runs), "any")
    assert first.name == "20260102-030405-any"
    assert len({first, second, third, *raced}) == 4
    assert list(raced[0].iterdir()) == []


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    """The system refuses the file's 100th byte, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    good, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (99, limits[1]))
        with pytest.raises(utils.UserError, match=r"some.pth cannot be written: File too large. Stopped"):
            checkpoint.save(path, {"weights": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_best_row_is_the_first_of_the_best() -> None:
    history = [{"epoch": i, "validation_accuracy": value} for i, value in enumerate((1.0, 3.0, 3.0, 2.0))]
    assert checkpoint.best_row(history)["epoch"] == 1
    assert checkpoint.best_row([row | {"validation_accuracy": None} for row in history])["epoch"] == 3
