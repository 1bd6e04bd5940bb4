"""A teacher: the losses against formulas, the same view for both, kept logits, bad input."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import checkpoint
import data
import evaluate
import optim
import train
from augment import build_loader
from config import Config
from tests.helpers import EVERYTHING, TINY, end_state, log_rows, write_checkpoint
from utils import UserError

CPU = torch.device("cpu")
TIMM = "tf_efficientnet_lite0"


@pytest.fixture
def teacher(model: nn.Module, tmp_path: Path) -> Path:
    """A checkpoint of our network with random weights."""
    return write_checkpoint(tmp_path / "teacher.pth", model)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Mean over the rows of KL(p, q)."""
    return float((p * np.log(p / q)).sum(1).mean())


def standardised(logits: np.ndarray) -> np.ndarray:
    return (logits - logits.mean(1, keepdims=True)) / logits.std(1, ddof=1, keepdims=True)


def centred(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("name", optim.DISTILLATION)
def test_a_head_that_starts_at_zero_learns(name: str) -> None:
    """As those of some timm networks: the logits of an image are equal in the first step."""
    logits = torch.zeros(6, 10, requires_grad=True)
    optim.DISTILLATION[name](logits, torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), 2.0).backward()
    assert 0 < logits.grad.abs().max() < 100


@pytest.mark.parametrize("name", optim.DISTILLATION)
def test_distillation_losses_are_their_formulas(name: str) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, 6, 10))
    expected = {
        "kl": lambda: 4 * kl(softmax(teacher / 2), softmax(student / 2)),
        "standardised": lambda: 4 * kl(softmax(standardised(teacher) / 2), softmax(standardised(student) / 2)),
        "mse": lambda: ((centred(student) - centred(teacher)) ** 2).mean(),
    }[name]()
    loss = optim.DISTILLATION[name](*map(torch.from_numpy, (student, teacher)), 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    logits = torch.from_numpy(student).requires_grad_()
    optim.DISTILLATION[name](logits, torch.from_numpy(student), 2.0).backward()
    assert logits.grad.abs().max() < 1e-9, "nothing is left to learn from an equal"


def test_label_weight_adds_the_labels_loss() -> None:
    logits, outputs = torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(0))
    labels, images = torch.arange(6), torch.zeros(6, 3, 32, 32)
    config = replace(TINY, distill_loss="kl", distill_temperature=3.0, label_weight=0.25)
    loss = optim.build_criterion(config, lambda images: outputs)(images, logits, labels)
    plain = optim.build_criterion(config)(images, logits, labels)
    alone = optim.build_criterion(replace(config, label_weight=0.0), lambda images: outputs)(images, logits, labels)
    assert loss.item() == pytest.approx((alone + 0.25 * plain).item())
    assert alone.item() == pytest.approx(optim.kl_loss(logits, outputs, 3.0).item())


def test_the_teacher_sees_the_students_view(tiny: Config, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of mixed images. In the small epochs the student sees them at 24x24, the teacher as they are."""
    config = replace(tiny, teacher=str(teacher), mixup=0.2, small_fraction=1.0)
    state = train.TrainState(config, CPU)
    seen = []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    state.teacher = load_teacher(teacher)
    monkeypatch.setattr(state.teacher.model, "forward", lambda x: seen.append(x) or torch.zeros(len(x), 100))
    state.wrapped_model = lambda x: seen.append(x) or state.model(x)
    train.train_one_epoch(state, build_loader(config, CPU)[0], train.build_criterion(config, state.teacher))
    loader = build_loader(config, CPU)[0]
    assert len(seen) == 14 and seen[0].shape[-1] == 24
    assert all(torch.equal(a, loader.resize(b)) for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_a_teacher_gives_the_logits_of_its_model(
    model: nn.Module, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(8, 3, 32, 32)
    expected = model.eval()(images).detach()
    for fast, tolerance in ((False, 1e-2), (True, 0.3)):  # of half precision, and of bfloat16
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        outputs = load_teacher(teacher)(images)
        assert outputs.dtype == torch.float32 and not outputs.requires_grad
        assert (outputs - expected).abs().max() < tolerance * expected.std()


def load_teacher(path: Path) -> optim.Teacher:
    return optim.Teacher(evaluate.load_model(path)[0], CPU, torch.bfloat16)


@pytest.mark.parametrize("views", [0, 2])
def test_resume_with_a_teacher_is_bit_exact(
    tiny: Config, teacher: Path, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the third epoch, whose logits are kept ones with two views."""
    settings = EVERYTHING | {"epochs": 4, "images_per_class": 4, "teacher": str(teacher), "teacher_views": views}
    config = replace(tiny, **settings | ({"dropout": 0.0} if views else {}))
    whole = train.train(config)
    evaluated, calls = train.evaluate, []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt(2)
        return evaluated(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate", interrupted)
        train.train(config)
    (folder,) = set(Path(config.runs_dir).iterdir()) - {whole}
    assert len(log_rows(folder)) == 2
    train.train(train.resumed_config(folder, {}), folder)
    assert end_state(folder) == end_state(whole)
    assert log_rows(folder) == log_rows(whole)


def test_kept_logits_give_the_same_weights_without_computing(
    tiny: Config, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two views: the teacher computes two epochs of four; a damaged file is made again."""
    config = replace(tiny, epochs=4, images_per_class=4, small_fraction=0.0, teacher=str(teacher), teacher_views=2)
    forwards = []
    forward = optim.Teacher.__call__

    def counted(self: optim.Teacher, images: Tensor) -> Tensor:
        forwards.append(self.cached_logits is None)
        return forward(self, images)

    monkeypatch.setattr(optim.Teacher, "__call__", counted)
    folder = train.train(config)
    steps = len(forwards) // 4
    assert forwards == [True] * 2 * steps + [False] * 2 * steps
    first = end_state(folder)
    monkeypatch.setattr(checkpoint, "load_logits", lambda path: None)  # nothing is kept: all is computed
    forwards.clear()
    assert end_state(train.train(config)) == first
    assert all(forwards)
    monkeypatch.undo()
    (folder / "logits-0-cpu.pth").write_bytes(b"damaged")
    (folder / "last.pth").unlink()
    train.train(config, folder)
    assert end_state(folder) == first
    assert len(checkpoint.load(folder / "logits-0-cpu.pth")["logits"]) == steps


def test_a_run_keeps_its_teacher(tiny: Config, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's file may change while the run is stopped."""
    config = replace(tiny, epochs=2, images_per_class=4, teacher=str(teacher))
    whole = train.train(config)
    save_epoch = checkpoint.save_epoch

    def stop_after_first(*arguments: object) -> None:
        save_epoch(*arguments)
        raise KeyboardInterrupt(2)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save_epoch", stop_after_first)
        train.train(config)
    (folder,) = (path for path in Path(tiny.runs_dir).iterdir() if path != whole)
    teacher.write_text("another file")
    train.train(config, folder)
    assert end_state(folder) == end_state(whole)
    (folder / "last.pth").unlink()  # as in a run that was killed in its first epoch
    train.train(config, folder)
    assert end_state(folder) == end_state(whole)


def test_views_repeat_only_where_asked(tiny: Config) -> None:
    """All of an epoch's images, mixed ones too, of a small epoch and of one that is not."""
    mixed = replace(tiny, epochs=4, small_fraction=0.5, mixup=1.0, cutmix=1.0, mix_prob=0.5, teacher="any.pth")
    for views, same in ((0, False), (2, True)):
        loader, _ = build_loader(replace(mixed, teacher_views=views), CPU)
        images, names, sides = [], [], []
        for epoch in (1, 3):
            loader.set_epoch(epoch)
            images.append(torch.cat([batch for batch, _ in loader]))
            sides.append(loader.resize(images[-1]).shape[-1])
            names.append(loader.cache_key)
        assert torch.equal(*images) == (names[0] == names[1]) == same
        assert sides == [24, 32]


def test_bad_input_is_one_line(tiny: Config, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("no weights")
    torch.save({"a": torch.zeros(3)}, tmp_path / "short.pth")
    content = checkpoint.load(teacher)
    content["weights"]["classifier.bias"] = torch.zeros(10)
    checkpoint.save(tmp_path / "ten.pth", content)
    wrong = {
        ("teacher", str(tmp_path / "none.pth")): "is not there",
        ("teacher", str(tmp_path / "text")): "cannot be used",
        ("teacher", str(tmp_path / "ten.pth")): "holds no weights of its model",
        ("weights", str(tmp_path / "none.pth")): "cannot be used",
        ("weights", str(tmp_path / "text")): "cannot be used",
        ("weights", str(tmp_path / "short.pth")): "there are 1 tensors",
    }
    for (name, value), message in wrong.items():
        with pytest.raises(UserError, match=message) as caught:
            train.train(replace(tiny, **{name: value}))
        assert "\n" not in str(caught.value)
    assert not Path(tiny.runs_dir).exists(), "before training starts"
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm. Run: pip install -r requirements-tools.txt"):
        train.train(replace(tiny, model=TIMM))


def test_the_shipped_teacher_is_the_recorded_one(cifar100: dict[str, np.ndarray]) -> None:
    """It has not seen the validation images; 300 of them tell 81 % from a damaged network."""
    pytest.importorskip("timm")
    path = Path("checkpoints/teacher.pth")
    teacher, content = evaluate.load_model(path)
    record = json.loads(Path("docs/results/teacher.json").read_text())
    assert (content["run"], content["test"]["accuracy"]) == (record["run"], record["test"]["accuracy"])
    images, labels = data.load_training("cifar100", Config.data_dir, content["config"]["validation_per_class"])[1]
    shown = slice(0, None, len(labels) // 300)
    scores = evaluate.evaluate(teacher, images[shown], labels[shown])
    assert scores.top1 == pytest.approx(record["validation"]["accuracy"], abs=6)
