"""The network: its wiring against an independent computation, whatever its table holds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as models
from utils import UserError


def normed(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Batch normalisation in eval mode."""
    return F.batch_norm(x, *(weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))


def test_forward_equals_an_independent_computation(model: nn.Module) -> None:
    """From the table and the state_dict alone, in float64, without any module of model.py."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    x = models.Hardswish()(normed(F.conv2d(images, weights["stem.0.weight"], padding=1), weights, "stem.1"))
    for i, (outputs, kernel, stride, hidden, excites, activation) in enumerate(models.BLOCKS):
        name = f"blocks.{i}"
        y = activation()(normed(F.conv2d(x, weights[f"{name}.expand.0.weight"]), weights, f"{name}.expand.1"))
        depthwise = weights[f"{name}.depthwise.0.weight"]
        assert y.shape[1] == hidden and depthwise.shape == (hidden, 1, kernel, kernel)
        y = F.conv2d(y, depthwise, stride=stride, padding=kernel // 2, groups=hidden)
        y = activation()(normed(y, weights, f"{name}.depthwise.1"))
        if excites:
            keys = ("0.weight", "0.bias", "2.weight", "2.bias")
            w1, b1, w2, b2 = (weights[f"{name}.excite.gate.{key}"] for key in keys)
            assert w1.shape == (hidden // 4, hidden)
            gate = torch.sigmoid(torch.relu(y.mean((2, 3)) @ w1.T + b1) @ w2.T + b2)
            y = y * gate[:, :, None, None]
        y = normed(F.conv2d(y, weights[f"{name}.project.0.weight"]), weights, f"{name}.project.1")
        x = x + y if stride == 1 and x.shape[1] == outputs else y
        assert x.shape[1] == outputs
    x = models.Hardswish()(normed(F.conv2d(x, weights["head.0.weight"]), weights, "head.1"))
    expected = x.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert expected.shape == (4, 100)
    assert torch.allclose(model.double()(images), expected, rtol=1e-10, atol=1e-10)


def test_dropout_is_after_each_projection_and_before_the_classifier() -> None:
    model = models.MobileNetV3(0.1)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.1] * (len(models.BLOCKS) + 1)
    assert isinstance(model.pool[-1], nn.Dropout)
    assert all(isinstance(block.project[-1], nn.Dropout) for block in model.blocks)


def test_a_timm_model_that_cannot_be_made_is_one_line() -> None:
    pytest.importorskip("timm")
    for name in ("nosuch", "vit_tiny_patch16_224"):  # which takes 224 pixels only
        with pytest.raises(UserError, match=rf"timm cannot make model {name} for 32 pixels") as caught:
            models.build_model(name)
        assert "\n" not in str(caught.value)
