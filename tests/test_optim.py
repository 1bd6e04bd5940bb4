"""Optimizers, schedules, the criterion and the EMA weights, against torch's own and against their formulas."""

import functools
from dataclasses import replace

import pytest
import torch

import optim
from config import PRESETS, Config, preset
from model import MobileNetV3
from tests.helpers import TINY

TORCHS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("result")])
def test_learning_rate_at_the_decays(name: str) -> None:
    """The rate after epoch e, as it is printed, is lr * gamma ** (e // step)."""
    config = Config(**preset(name))
    optimizer = sgd(config.lr)
    scheduler = optim.build_scheduler(config, optimizer)
    for epoch in range(1, config.epochs + 1):
        optimizer.step()
        scheduler.step()
        expected = config.lr * config.lr_gamma ** (epoch // config.lr_step)
        assert scheduler.get_last_lr()[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_default_step_scales_with_the_run_and_warm_up_multiplies() -> None:
    for epochs, step in ((130, 38), (26, 8), (2, 1)):
        config = replace(TINY, epochs=epochs, schedule="step", lr_step=0, warmup_epochs=0)
        assert optim.build_scheduler(config, sgd()).step_size == step
    rates, config = [], replace(TINY, epochs=10, warmup_epochs=2, schedule="cosine", lr_step=0)
    scheduler = optim.build_scheduler(config, sgd())
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    cosine = [(1 + torch.tensor(t * torch.pi / 10).cos().item()) / 2 for t in range(10)]
    warm = [1 / 3, 2 / 3] + [1.0] * 8
    assert rates == pytest.approx([c * w for c, w in zip(cosine, warm, strict=True)], abs=1e-6)
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_warm_up_takes_at_most_a_quarter_of_the_run() -> None:
    for epochs, warm in ((3, 0), (8, 2), (100, 5)):
        config = replace(TINY, epochs=epochs, warmup_epochs=5, schedule="step", lr_step=100)
        scheduler, rates = optim.build_scheduler(config, sgd()), []
        for _ in range(epochs):
            rates.append(scheduler.get_last_lr()[0])
            scheduler.step()
        expected = [(t + 1) / (warm + 1) for t in range(warm)] + [1.0] * (epochs - warm)
        assert rates == pytest.approx(expected, rel=1e-9)


def test_no_decay_on_norms_and_biases_where_set() -> None:
    for decay_norms in (True, False):
        model = MobileNetV3()
        config = replace(TINY, weight_decay=0.05, decay_norms=decay_norms)
        decayed, plain = optim.build_optimizer(config, model).param_groups
        assert {p.ndim for p in decayed["params"]} == {2, 4}
        assert {p.ndim for p in plain["params"]} == {1}
        assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
        assert decayed["weight_decay"] == 0.05
        assert plain["weight_decay"] == (0.05 if decay_norms else 0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimizer_updates_as_torchs_own(name: str) -> None:
    """Bit for bit what torch's gives as it is made by hand, with a state saved and loaded after each step."""
    results = []
    for ours in (True, False):
        generator = torch.Generator().manual_seed(0)
        model = torch.nn.Linear(5, 3, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.randn(3, 5, generator=generator))
        if ours:
            config = replace(TINY, optimizer=name, lr=0.1, weight_decay=0.01, decay_norms=True)
            make = functools.partial(optim.build_optimizer, config, model)
        else:
            momentum = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
            options = {"lr": 0.1, "weight_decay": 0.01, "fused": True} | momentum
            make = functools.partial(TORCHS[name], [model.weight], **options)
        optimizer = make()
        assert type(optimizer) is TORCHS[name]
        for _ in range(3):
            optimizer.zero_grad()
            assert model.weight.grad is None
            (model.weight * torch.randn(3, 5, generator=generator)).sum().backward()
            optimizer.step()
            state, optimizer = optimizer.state_dict(), make()
            optimizer.load_state_dict(state)
        results.append(model.weight)
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))


def test_the_scaler_can_skip_the_first_step() -> None:
    """In float16 the first gradients often overflow; torch's fused SGD alone then goes on with unset memory."""
    results = []
    for skipped in (1, 0):
        torch.manual_seed(0)
        model = MobileNetV3()
        optimizer, scaler = optim.build_optimizer(TINY, model), torch.amp.GradScaler("cpu", init_scale=1.0)
        torch.full((1_000_000,), 1e17)  # what freed memory may hold
        for step in range(1 - skipped, 3):
            for p in model.parameters():
                p.grad = torch.full_like(p, torch.inf if step == 0 else 0.01)
            scaler.scale(torch.zeros(1))
            scaler.step(optimizer)
            scaler.update(1.0)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_criterion_is_cross_entropy_with_smoothed_labels() -> None:
    """Against its formula, for labels and for mixed targets; it is given the images, and does not read them."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 100, generator=generator), torch.randint(100, (8,), generator=generator)
    hard = torch.nn.functional.one_hot(labels, 100).float()
    mixed = 0.3 * hard + 0.7 * hard.roll(1, 0)
    for smoothing in (0.0, 0.2):
        criterion = optim.build_criterion(replace(TINY, label_smoothing=smoothing))
        for given, targets in ((labels, hard), (mixed, mixed)):
            spread = (1 - smoothing) * targets + smoothing / 100
            expected = -(spread * logits.log_softmax(1)).sum(1).mean()
            assert criterion(None, logits, given).item() == pytest.approx(expected.item(), rel=1e-5)


def test_ema_follows_its_formula() -> None:
    def watched(model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([model.classifier.bias.detach(), model.stem[1].running_var])

    model = MobileNetV3()
    ema, expected = optim.EMA(model, 0.3), watched(model)
    for t in range(6):
        with torch.no_grad():
            model.classifier.bias.normal_()
            model.stem[1].running_var.uniform_()
        ema.update()
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * watched(model)
    assert torch.allclose(watched(ema.model), expected)


def test_ema_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model = MobileNetV3()
    ema, other = optim.EMA(model, 0.9), optim.EMA(MobileNetV3(), 0.9)
    with torch.no_grad():
        model.classifier.bias.normal_()
    for _ in range(3):
        ema.update()
    other.load_state_dict(ema.state_dict())
    other.current = ema.current
    for average in (ema, other):
        average.update()
    assert torch.equal(ema.model.classifier.bias, other.model.classifier.bias)
