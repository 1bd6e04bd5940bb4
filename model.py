"""A cut MobileNetV3-Large (Howard et al., "Searching for MobileNetV3", 2019) for 32x32 images and 100 classes."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Row(NamedTuple):
    """One inverted residual: channels in and out, depthwise kernel and stride, expanded channels."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    hidden: int
    squeeze_excitation: bool
    activation: type[nn.Module]


ROWS = (
    Row(16, 16, 3, 1, 16, False, nn.ReLU),  # 16 x 32 x 32
    Row(16, 24, 3, 2, 64, False, nn.ReLU),  # 24 x 16 x 16
    Row(24, 24, 3, 1, 72, False, nn.ReLU),  # 24 x 16 x 16
    Row(24, 40, 5, 2, 72, True, nn.Hardswish),  # 40 x 8 x 8
    Row(40, 40, 5, 1, 120, True, nn.Hardswish),  # 40 x 8 x 8
    Row(40, 80, 3, 2, 240, False, nn.Hardswish),  # 80 x 4 x 4
    Row(80, 112, 3, 1, 480, True, nn.Hardswish),  # 112 x 4 x 4
    Row(112, 160, 5, 2, 672, True, nn.Hardswish),  # 160 x 2 x 2
)
STEM, HEAD, CLASSES = 16, 960, 100


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the plane's size (over the stride), without bias, and its batch normalisation."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from all channels' means (Hu et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(
            nn.Linear(channels, channels // 4), nn.ReLU(inplace=True), nn.Linear(channels // 4, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return x * self.gate(self.pool(x).flatten(1)).unflatten(1, (-1, 1, 1))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, excite, project without activation (Sandler et al., MobileNetV2, 2018)."""

    def __init__(self, row: Row, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = nn.Sequential(*convolution(row.inputs, row.hidden, 1), row.activation(inplace=True))
        self.depthwise = nn.Sequential(
            *convolution(row.hidden, row.hidden, row.kernel, row.stride, groups=row.hidden),
            row.activation(inplace=True),
        )
        self.excite = SqueezeExcitation(row.hidden) if row.squeeze_excitation else nn.Identity()
        self.project = nn.Sequential(*convolution(row.hidden, row.outputs, 1), *dropout_layers(dropout))
        self.residual = row.stride == 1 and row.inputs == row.outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """The graded network: normalised float (N, 3, 32, 32) in, logits (N, 100) out."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolution(3, STEM, 3), nn.Hardswish(inplace=True))  # 16 x 32 x 32
        self.blocks = nn.Sequential(*(InvertedResidual(row, dropout) for row in ROWS))  # 160 x 2 x 2
        self.head = nn.Sequential(*convolution(ROWS[-1].outputs, HEAD, 1), nn.Hardswish(inplace=True))  # 960 x 2 x 2
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *dropout_layers(dropout))  # 960 x 1 x 1
        self.classifier = nn.Linear(HEAD, CLASSES)  # 100

    def forward(self, x: Tensor) -> Tensor:
        """Normalised float (N, 3, 32, 32) to logits (N, 100)."""
        return self.classifier(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))


def dropout_layers(probability: float) -> list[nn.Module]:
    """No module at all at 0, so that the graded network does not depend on the setting."""
    return [nn.Dropout(probability)] if probability > 0 else []


class Average:
    """Exponential moving average of a network's weights and statistics (Tarvainen and Valpola, 2017).

    The decay rises as (1 + t) / (10 + t) to its setting, so that the first random weights do not linger. torch's
    AveragedModel would wait for the device at each update.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay, self.updates = copy.deepcopy(network), decay, 0
        pairs = zip(self.network.state_dict().values(), network.state_dict().values(), strict=True)
        self.averaged, self.current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)

    def update(self) -> None:
        """Take in the network's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averaged, self.current, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.updates = state["updates"]
