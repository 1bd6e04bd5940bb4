"""Errors in one line, and the device."""

import pytest
import torch

import utils


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


def test_a_device_that_cannot_compute_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(utils.UserError, match=r"^gpu cannot be used: .+\. Try --device cpu$"):
        utils.choose_device("gpu")

    def fail(count: int, device: str) -> None:
        raise RuntimeError(f"{device} error: no kernel image is available\nkernel errors might be reported")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, device in (("auto", "cuda"), ("cuda:1", "cuda:1"), ("mps", "mps")):
        with pytest.raises(utils.UserError, match=rf"^{device} cannot be used: .+ is available\. Try --device cpu$"):
            utils.choose_device(name)
