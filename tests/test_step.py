"""A training step: what each setting changes in it, precision, compiling, no waiting for the device."""

import copy
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

import train
from config import Config
from model import BLOCKS, InvertedResidual
from optim import Teacher, build_criterion
from tests.helpers import TINY, needs_compiler, started, train_epochs

# One step an epoch on 100 images, the first epoch of 8 on 24x24 pixels.
ONE_STEP = replace(TINY, images_per_class=4, epochs=8, small_fraction=0.125)
STEPLR = {"schedule": "step", "lr_step": 2}
OTHER = {  # another value of each setting that changes what is trained, and what else it takes to see that
    "epochs": (16, {}), "batch_size": (32, {}), "optimizer": ("adamw", {}), "lr": (0.1, {}),
    "weight_decay": (0.05, {}), "decay_norms": (True, {}), "schedule": ("step", {}), "lr_step": (1, STEPLR),
    "lr_gamma": (0.1, STEPLR | {"lr_step": 1}), "warmup_epochs": (1, {}), "label_smoothing": (0.0, {}),
    "dropout": (0.1, {}), "ema": (0.05, {}), "flip": (False, {}), "crop_padding": (2, {}), "crop_reflect": (False, {}),
    "trivial_augment": (0.3, {}), "cutout": (8, {}), "mixup": (0.2, {}), "cutmix": (1.0, {}),
    "mix_prob": (0.0, {"mixup": 0.2}), "small_fraction": (0.25, {}), "validation_per_class": (2, {}),
    "images_per_class": (5, {}), "seed": (1, {}),
}  # fmt: skip
TEACHERS = {  # in test_networks.py and test_distill.py: other networks, and what a teacher adds
    "model", "image_size", "pretrained", "weights", "teacher", "distill_loss", "distill_temperature", "label_weight",
    "teacher_views",
}  # fmt: skip


def weights_after_two_epochs(config: Config) -> dict[str, Tensor]:
    """The weights that are validated."""
    state, loader = started(config)
    train_epochs(state, loader, 2)
    return state.eval_model.state_dict()


def test_each_setting_changes_what_is_trained() -> None:
    recipe = {f.name for f in fields(Config) if f.metadata["recipe"]}
    missing = recipe - TEACHERS - OTHER.keys()
    assert not missing, f"add another value of {', '.join(missing)} to OTHER, to test that it does something"
    base, again = weights_after_two_epochs(ONE_STEP), weights_after_two_epochs(ONE_STEP)
    assert all(torch.equal(weights, base[name]) for name, weights in again.items())
    for setting, (value, needed) in OTHER.items():
        start = weights_after_two_epochs(replace(ONE_STEP, **needed)) if needed else base
        other = weights_after_two_epochs(replace(ONE_STEP, **needed | {setting: value}))
        assert any(not torch.equal(weights, start[name]) for name, weights in other.items()), setting


def test_loss_and_accuracy_are_those_before_the_step() -> None:
    config = replace(ONE_STEP, ema=0.0)
    state, loader = started(config)
    (images, labels), *rest = loader
    assert not rest
    before = copy.deepcopy(state.model).train()
    torch.manual_seed(config.seed)
    logits = before(loader.resize(images))
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing).item()
    state.model.eval()  # as a validation leaves it
    meter = train.train_one_epoch(state, loader, build_criterion(config))
    accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert meter.count == len(labels) == 64
    assert meter.compute() == pytest.approx((loss, accuracy), rel=1e-4)
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), state.model.parameters(), strict=True))


def test_the_ema_takes_in_each_step() -> None:
    state, loader = started(replace(ONE_STEP, batch_size=32))
    train_epochs(state, loader, 2)
    assert state.ema.updates == 2 * len(loader) == 6


def test_meter_weighs_batches_by_their_size() -> None:
    """Two batches by hand; of a mixed target the larger part counts."""
    meter = train.Meter(torch.device("cpu"))
    logits = torch.eye(100)[[3, 4, 5]]
    meter.update(torch.tensor(2.0), logits, torch.tensor([3, 4, 0]))
    mixed = 0.6 * torch.eye(100)[[5]] + 0.4 * torch.eye(100)[[7]]
    meter.update(torch.tensor(6.0), logits[2:], mixed)
    assert meter.compute() == pytest.approx(((3 * 2 + 6) / 4, 75.0))


def test_autocast_trains_to_nearly_the_same_loss() -> None:
    """The path that a GPU takes, in bfloat16 on the CPU."""
    losses = []
    for enabled in (False, True):
        state, loader = started(replace(ONE_STEP, batch_size=32, small_fraction=0.0))
        assert len(loader) == 3
        state.autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)
        losses.append(train_epochs(state, loader, 1)[0].compute()[0])
        assert all(p.dtype == torch.float32 for p in state.model.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_cpu_trains_in_float32_without_a_scaler() -> None:
    state, _ = started(ONE_STEP)
    assert not state.autocast._enabled
    assert not state.scaler.is_enabled()


@needs_compiler
def test_compiled_and_eager_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients of a block with squeeze-and-excitation; the whole model takes a minute to compile."""
    torch.manual_seed(0)
    block, x = InvertedResidual(BLOCKS[4]), torch.randn(16, 40, 8, 8)
    monkeypatch.setattr(train, "build_model", lambda *arguments: copy.deepcopy(block))
    state = train.TrainState(replace(TINY, compile=True, ema=0.0), torch.device("cpu"))
    assert state.wrapped_model is not state.model
    assert not torch._dynamo.config.suppress_errors, "falling back in silence would compare eager with eager"
    kernels, results = torch._inductor.metrics.generated_kernel_count, []
    for forward, model in ((block, block), (state.wrapped_model, state.model)):
        y = forward(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    assert torch._inductor.metrics.generated_kernel_count > kernels
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-3)
    assert state.parts()["network"].state_dict().keys() == block.state_dict().keys(), "names of the plain model"


@needs_compiler
def test_a_compiled_teacher_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block with batch norm, in float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    torch.manual_seed(0)
    block, x = InvertedResidual(BLOCKS[4]), torch.randn(16, 40, 8, 8)
    block(x)  # or the running statistics would be 0 and 1
    block.eval()
    kernels, logits = torch._inductor.metrics.generated_kernel_count, []
    for compiled in (False, True):
        teacher = Teacher(copy.deepcopy(block), torch.device("cpu"), torch.bfloat16, compiled)
        logits.append(teacher(x))
    assert torch._inductor.metrics.generated_kernel_count > kernels
    assert torch.allclose(*logits, atol=2e-3)  # stored as float16
    assert logits[0].std() > 0.1


def test_a_step_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these would wait for the device."""
    state, loader = started(replace(TINY, epochs=2, small_fraction=0.5))
    criterion, counts = build_criterion(state.config), Counter()
    for name in ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: object, name: str = name, original: object = original) -> object:
            counts[name] += 1
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        meter = train.train_one_epoch(state, loader, criterion)
    assert counts == {}
    assert meter.compute()[0] > 0
    assert counts == {"tolist": 1}, "the counter counts"
