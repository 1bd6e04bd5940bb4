"""Schedules and optimizers: the learning rate at each epoch, and what torch's own would do."""

import functools
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
from config import EXPERIMENTS, Config
from conftest import TINY


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("result")])
def test_learning_rate_at_the_decays(name: str) -> None:
    """The rate after epoch e, as it is printed, is lr * gamma ** (e // step)."""
    config = Config(**EXPERIMENTS[name])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    scheduler = train.make_scheduler(config, optimizer)
    for epoch in range(1, config.epochs + 1):
        optimizer.step()
        scheduler.step()
        expected = config.lr * config.lr_gamma ** (epoch // config.lr_step)
        assert scheduler.get_last_lr()[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_default_step_scales_with_the_run_and_warm_up_multiplies() -> None:
    for epochs, step in ((130, 38), (26, 8), (2, 1)):
        config = Config(epochs=epochs, schedule="step", lr_step=0, warmup_epochs=0)
        assert train.make_scheduler(config, sgd()).step_size == step
    rates = []
    scheduler = train.make_scheduler(Config(epochs=10, warmup_epochs=2, schedule="cosine", lr_step=0, lr=1.0), sgd())
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    cosine = [(1 + torch.tensor(t * torch.pi / 10).cos().item()) / 2 for t in range(10)]
    warm = [1 / 3, 2 / 3] + [1.0] * 8
    assert rates == pytest.approx([c * w for c, w in zip(cosine, warm, strict=True)], abs=1e-6)


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def test_no_decay_on_norms_and_biases_where_set() -> None:
    for decay_norms in (True, False):
        optimizer = train.make_optimizer(Config(weight_decay=0.05, decay_norms=decay_norms), train.MobileNetV3())
        decayed, plain = optimizer.param_groups
        assert {p.ndim for p in decayed["params"]} == {2, 4}
        assert {p.ndim for p in plain["params"]} == {1}
        assert plain["weight_decay"] == (0.05 if decay_norms else 0)


def test_sgd_has_nesterov_momentum() -> None:
    for group in train.make_optimizer(TINY, train.MobileNetV3()).param_groups:
        assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, True, TINY.lr)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_optimizers_do_what_torchs_do(name: str) -> None:
    """Bit for bit, a saved and loaded state included."""
    results = []
    for library in (torch.optim, train):
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(5, 3, generator=generator).requires_grad_()
        make = functools.partial(getattr(library, name), lr=0.1, weight_decay=0.01, fused=True)
        make = functools.partial(make, momentum=0.9, nesterov=True) if name == "SGD" else make
        optimizer = make([weights])
        for _ in range(3):
            optimizer.zero_grad()
            assert weights.grad is None
            (weights * torch.randn(5, 3, generator=generator)).sum().backward()
            optimizer.step()
            state, optimizer = optimizer.state_dict(), make([weights])
            optimizer.load_state_dict(state)
        results.append(weights)
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))


def test_a_first_step_that_the_scaler_skips_leaves_no_trace() -> None:
    """In float16 the first gradients often overflow; torch's fused SGD then goes on with unset memory."""
    results = []
    for skipped in (1, 0):
        torch.manual_seed(0)
        network = train.MobileNetV3()
        optimizer, scaler = train.make_optimizer(TINY, network), torch.amp.GradScaler("cpu", init_scale=1.0)
        torch.full((1_000_000,), 1e17)  # what freed memory may hold
        for step in range(1 - skipped, 3):
            for p in network.parameters():
                p.grad = torch.full_like(p, torch.inf if step == 0 else 0.01)
            scaler.scale(torch.zeros(1))
            scaler.step(optimizer)
            scaler.update(1.0)
        results.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(*results)


def test_training_does_not_import_the_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes 150 MB and 1.5 s; a run without --compile needs none of it, a resumed one included."""
    code = """if True:
        import sys, train
        for optimizer in ("adamw", "sgd"):
            config = train.Config(**eval(sys.argv[1]) | {"optimizer": optimizer})
            folder = train.train(config)
            train.train(config, folder)
        sys.exit("torch._dynamo" in sys.modules)
    """
    settings = asdict(TINY) | {"images_per_class": 4, "epochs": 1, "runs_dir": str(tmp_path)}
    command = [sys.executable, "-c", code, repr(settings)]
    subprocess.run(command, check=True)
