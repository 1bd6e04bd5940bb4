"""The model: its exact figures, and its wiring against an independent computation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluate
from model import MobileNetV3


def size(model: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1024


def test_exact_figures() -> None:
    model = MobileNetV3()
    names = list(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == 966_412
    assert size(model) == evaluate.model_bytes(model) / 1024 == 3813.875
    assert evaluate.count_cost(model) == (11_776_320, 3814.390625)
    assert size(model) == 3813.875, "counting must leave no counters on the caller's model"
    assert list(model.state_dict()) == names


def normed(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Batch normalisation in eval mode, by its formula."""
    mean, var, scale, shift = (
        weights[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def hardswish(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


TABLE = (  # of the specification: in, out, kernel, stride, hidden, squeeze-and-excitation, activation
    (16, 16, 3, 1, 16, False, torch.relu),
    (16, 24, 3, 2, 64, False, torch.relu),
    (24, 24, 3, 1, 72, False, torch.relu),
    (24, 40, 5, 2, 72, True, hardswish),
    (40, 40, 5, 1, 120, True, hardswish),
    (40, 80, 3, 2, 240, False, hardswish),
    (80, 112, 3, 1, 480, True, hardswish),
    (112, 160, 5, 2, 672, True, hardswish),
)


def test_forward_equals_an_independent_computation(model: nn.Module) -> None:
    """From the state_dict alone, in float64, without any module of model.py."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    x = hardswish(normed(F.conv2d(images, weights["stem.0.weight"], padding=1), weights, "stem.1"))
    for block, (inputs, outputs, kernel, stride, hidden, excites, act) in enumerate(TABLE):
        name = f"blocks.{block}"
        assert weights[f"{name}.expand.0.weight"].shape == (hidden, inputs, 1, 1)
        y = act(normed(F.conv2d(x, weights[f"{name}.expand.0.weight"]), weights, f"{name}.expand.1"))
        depthwise = weights[f"{name}.depthwise.0.weight"]
        assert depthwise.shape == (hidden, 1, kernel, kernel)
        y = F.conv2d(y, depthwise, stride=stride, padding=kernel // 2, groups=hidden)
        y = act(normed(y, weights, f"{name}.depthwise.1"))
        if excites:
            w1, b1, w2, b2 = (
                weights[f"{name}.excite.gate.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")
            )
            assert w1.shape == (hidden // 4, hidden)
            gate = torch.sigmoid(torch.relu(y.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
            y = y * gate[:, :, None, None]
        y = normed(F.conv2d(y, weights[f"{name}.project.0.weight"]), weights, f"{name}.project.1")
        x = x + y if stride == 1 and inputs == outputs else y
        assert x.shape[1] == outputs
    x = hardswish(normed(F.conv2d(x, weights["head.0.weight"]), weights, "head.1"))
    expected = x.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert torch.allclose(model.double()(images), expected, rtol=1e-10, atol=1e-10)


def test_output_shapes() -> None:
    """Every stage's output, as the table of the specification has it."""
    shapes = [(16, 32), (24, 16), (24, 16), (40, 8), (40, 8), (80, 4), (112, 4), (160, 2)]
    model = MobileNetV3().eval()
    x = model.stem(torch.zeros(2, 3, 32, 32))
    assert x.shape == (2, 16, 32, 32)
    for block, (channels, side) in zip(model.blocks, shapes, strict=True):
        x = block(x)
        assert x.shape == (2, channels, side, side)
    assert model.head(x).shape == (2, 960, 2, 2)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_dropout_after_each_projection_and_before_the_classifier() -> None:
    model = MobileNetV3(0.1)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.1] * 9
    assert model.state_dict().keys() == MobileNetV3().state_dict().keys(), "the weights fit our model"
