"""A teacher: the loss against its formula, and the same view for both."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import checkpoint
import train
from augment import Loader
from config import Config
from data import Images, load_training
from distill import DistillationLoss
from evaluate import evaluate
from tests.helpers import TINY, write_checkpoint
from utils import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def teacher(tiny: Config, model: nn.Module, tmp_path: Path) -> Path:
    """A checkpoint of the small network with random weights."""
    return write_checkpoint(tmp_path / "teacher.pth", model)


def test_the_loss_is_the_squared_difference_of_centred_logits(teacher: Path, model: nn.Module, images: Tensor) -> None:
    inputs, logits = images[:8].float() / 255, torch.randn(8, 100, requires_grad=True)
    student, target = (x.detach().numpy() - x.detach().numpy().mean(1, keepdims=True) for x in (logits, model(inputs)))
    criterion = train.build_criterion(replace(TINY, teacher=str(teacher), label_smoothing=0.1), CPU)
    loss = criterion(inputs, logits, torch.zeros(8, dtype=torch.int64))
    assert loss.item() == pytest.approx(np.mean((student - target) ** 2), rel=1e-5)
    loss.backward()
    assert np.allclose(logits.grad, 2 * (student - target) / student.size, atol=1e-6)


def test_the_teacher_sees_the_students_view_and_stays_as_it_is(teacher: Path, images: Tensor) -> None:
    """Also of mixed images; in eval mode, so that its statistics do not move."""
    config = replace(TINY, teacher=str(teacher), trivial_augment=0.5, flip=True, crop_padding=4, mixup=0.2)
    criterion, student, seen = DistillationLoss(teacher, CPU), checkpoint.load_model(teacher)[0], []
    before = {name: value.clone() for name, value in criterion.teacher.state_dict().items()}
    for network in (student, criterion.teacher):
        network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loader, optimizer = Loader(Images(images, torch.arange(100)), config), train.build_optimizer(student, config)
    train.train_one_epoch(student, loader, criterion, optimizer, train.EMA(student, 0.0), False)
    assert len(seen) == 2 * len(loader) > 0
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert all(torch.equal(before[name], value) for name, value in criterion.teacher.state_dict().items())
    assert all(p.grad is None for p in criterion.teacher.parameters())


def test_the_shipped_teacher_is_as_good_as_when_it_was_trained(cifar100: str) -> None:
    """On a tenth of the validation images, as it enlarges them."""
    pytest.importorskip("timm")
    model, content = checkpoint.load_model(ROOT / "checkpoints" / "teacher.pth")
    _, (images, labels) = load_training("cifar100", cifar100, 50)
    loss = evaluate(model, images[::10], labels[::10]).loss
    assert loss == pytest.approx(content["metrics"]["validation_loss"], rel=0.1)
