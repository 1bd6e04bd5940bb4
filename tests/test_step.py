"""A training step: what every setting changes in it, averaging, precision, compiling, no waiting for the device."""

import copy
import shutil
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from augment import Batches
from config import Config
from conftest import EVERYTHING, TINY
from model import ROWS, InvertedResidual


def test_average_follows_its_formula() -> None:
    network = train.MobileNetV3()
    average, expected = train.Average(network, 0.3), network.classifier.bias.detach().clone()
    for t in range(6):
        with torch.no_grad():
            network.classifier.bias.normal_()
            network.stem[1].running_var.uniform_()
        average.update()
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * network.classifier.bias.detach()
    assert torch.allclose(average.network.classifier.bias, expected)
    assert not torch.equal(average.network.stem[1].running_var, network.stem[1].running_var)


OTHER = {  # values of the settings that change a step, unlike TINY's
    "optimizer": "adamw", "lr": 0.1, "weight_decay": 0.05, "decay_norms": True, "label_smoothing": 0.0, "dropout": 0.1,
    "ema": 0.05, "flip": False, "crop_padding": 2, "crop_reflect": False, "trivial_augment": 0.3, "cutout": 8,
    "mixup": 0.2, "cutmix": 1.0, "seed": 1,
}  # fmt: skip


def weights_after_two_steps(config: Config) -> dict[str, Tensor]:
    """The graded weights, cloned."""
    run, batches = train.Training(config, torch.device("cpu")), Batches(config, train.data.load_training(config)[0])
    run.network.train()
    torch.manual_seed(0)
    generator, sums = torch.Generator().manual_seed(0), torch.zeros(2)
    for index in torch.arange(128).split(64):
        run.step(*batches(index, generator), sums)
    return {name: value.clone() for name, value in run.graded().state_dict().items()}


def test_each_setting_changes_what_is_trained() -> None:
    base = weights_after_two_steps(TINY)
    assert all(torch.equal(value, base[name]) for name, value in weights_after_two_steps(TINY).items())
    for name, value in OTHER.items():
        other = weights_after_two_steps(replace(TINY, **{name: value}))
        assert any(not torch.equal(weights, base[key]) for key, weights in other.items()), name


def test_loss_and_hits_are_summed_as_they_were_before_the_step(tiny: Config) -> None:
    run, batches = train.Training(tiny, torch.device("cpu")), Batches(tiny, train.data.load_training(tiny)[0])
    run.network.train()
    sums, inputs, labels = torch.tensor([5.0, 7.0]), *batches(torch.arange(64), torch.Generator().manual_seed(0))
    logits = copy.deepcopy(run.network)(inputs)
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=tiny.label_smoothing, reduction="sum")
    run.step(inputs, labels, sums)
    assert sums.tolist() == pytest.approx([5 + loss.item(), 7 + (logits.argmax(1) == labels).sum().item()], rel=1e-4)


def test_autocast_trains_to_nearly_the_same_loss(tiny: Config) -> None:
    """The path that a GPU takes, in bfloat16 on the CPU."""
    losses = []
    for enabled in (False, True):
        run, batches = train.Training(tiny, torch.device("cpu")), Batches(tiny, train.data.load_training(tiny)[0])
        run.autocast["enabled"], sums = enabled, torch.zeros(2)
        for index in torch.arange(96).split(32):
            run.step(*batches(index, torch.Generator().manual_seed(0)), sums)
        losses.append(sums[0].item() / 96)
        assert all(p.dtype == torch.float32 for p in run.network.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="it needs Python's headers")
def test_compiled_and_eager_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients of a block with squeeze-and-excitation; the whole network takes a minute to compile."""
    torch.manual_seed(0)
    block, x = InvertedResidual(ROWS[4]), torch.randn(16, 40, 8, 8)
    results, compiled = [], train.compiled(copy.deepcopy(block), torch.device("cpu"))
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)  # falling back would compare eager with eager
    kernels = torch._inductor.metrics.generated_kernel_count
    for forward in (block, compiled):
        y = forward(x)
        y.square().mean().backward()
        network = getattr(forward, "_orig_mod", forward)
        results.append([y.detach(), *(p.grad for p in network.parameters()), *network.buffers()])
    assert torch._inductor.metrics.generated_kernel_count > kernels
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-3)


def test_a_step_reads_nothing_back(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these would wait for the device."""
    run, batches = train.Training(tiny, torch.device("cpu")), Batches(tiny, train.data.load_training(tiny)[0])
    counts = Counter()
    for name in ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: object, name: str = name, original: object = original) -> object:
            counts[name] += 1
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    sums = torch.zeros(2)
    for index, small in zip(torch.arange(192).split(64), (False, True, False), strict=True):
        run.step(*batches(index, torch.Generator().manual_seed(0), small), sums)
    assert counts == {}
    assert sums.tolist()[0] > 0
    assert counts == {"tolist": 1}, "the counter counts"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cuda_step_never_synchronises(tiny: Config) -> None:
    config = replace(tiny, device="cuda", **EVERYTHING)
    device = torch.device("cuda")
    run, batches = train.Training(config, device), Batches(config, train.data.load_training(config)[0].to(device))
    generator, sums = torch.Generator(device).manual_seed(0), torch.zeros(2, device=device)
    parts = torch.arange(256, device=device).split(64)
    for small in (False, True):  # first use may set up
        run.step(*batches(parts[0], generator, small), sums)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index, small in zip(parts[1:], (False, True, False), strict=True):
            run.step(*batches(index, generator, small), sums)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all()
