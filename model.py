"""A shortened MobileNetV3-Large (Howard et al., "Searching for MobileNetV3", 2019) for 32x32 images and 100 classes."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import CLASSES
from utils import UserError, one_line

ReLU = partial(nn.ReLU, inplace=True)
Hardswish = nn.Hardswish  # in place it would first copy its input, which its gradient needs


class BlockConfig(NamedTuple):
    """One inverted residual: channels that it gives, depthwise kernel and stride, expanded channels."""

    outputs: int
    kernel: int
    stride: int
    hidden: int
    squeeze_excitation: bool
    activation: Callable[[], nn.Module]


BLOCKS = (
    BlockConfig(16, 3, 1, 16, False, ReLU),  # 16 x 32 x 32
    BlockConfig(24, 3, 2, 64, False, ReLU),  # 24 x 16 x 16
    BlockConfig(24, 3, 1, 72, False, ReLU),  # 24 x 16 x 16
    BlockConfig(40, 5, 2, 72, True, Hardswish),  # 40 x 8 x 8
    BlockConfig(40, 5, 1, 120, True, Hardswish),  # 40 x 8 x 8
    BlockConfig(80, 3, 2, 240, False, Hardswish),  # 80 x 4 x 4
    BlockConfig(112, 3, 1, 480, True, Hardswish),  # 112 x 4 x 4
    BlockConfig(160, 5, 2, 672, True, Hardswish),  # 160 x 2 x 2
)
STEM, HEAD = 16, 960  # channels


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias that divides the feature map's size by the stride, and its batch normalisation."""
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

    def __init__(self, inputs: int, block: BlockConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = nn.Sequential(*conv_bn(inputs, block.hidden, 1), block.activation())
        self.depthwise = nn.Sequential(
            *conv_bn(block.hidden, block.hidden, block.kernel, block.stride, groups=block.hidden),
            block.activation(),
        )
        self.excite = SqueezeExcitation(block.hidden) if block.squeeze_excitation else nn.Identity()
        self.project = nn.Sequential(*conv_bn(block.hidden, block.outputs, 1), nn.Dropout(dropout))
        self.residual = block.stride == 1 and inputs == block.outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """The network of the student's report: normalised float (N, 3, 32, 32) in, logits (N, 100) out."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, STEM, 3), Hardswish())  # 16 x 32 x 32
        widths = [STEM, *(block.outputs for block in BLOCKS)]
        blocks = [InvertedResidual(inputs, block, dropout) for inputs, block in zip(widths, BLOCKS, strict=False)]
        self.blocks = nn.Sequential(*blocks)  # 160 x 2 x 2
        self.head = nn.Sequential(*conv_bn(widths[-1], HEAD, 1), Hardswish())  # 960 x 2 x 2
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout))  # 960 x 1 x 1
        self.classifier = nn.Linear(HEAD, CLASSES)  # 100

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))


class Enlarge(nn.Upsample):
    """Enlarge images: networks made for ImageNet expect more than 32 pixels. thop would count a plain Upsample."""


def build_model(name: str, dropout: float = 0.0, image_size: int = 32, pretrained: bool = False) -> nn.Module:
    """Our network ("mobilenetv3"), or timm's model of that name with its ImageNet weights or random ones.

    It takes normalised float (N, 3, 32, 32), enlarges it to `image_size` pixels unless that is 32, and returns logits
    (N, 100). Raises UserError if timm does not know the name, cannot fetch the weights, or its model cannot take such
    images; ModuleNotFoundError without timm.
    """
    if name == "mobilenetv3":
        model: nn.Module = MobileNetV3(dropout)
    else:
        import timm  # optional

        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=CLASSES, drop_rate=dropout)
            with torch.no_grad():  # some take one size of image only, or none so small
                model.eval()(torch.zeros(1, 3, image_size, image_size))
        except Exception as error:  # nearly anything, such as a failed download
            raise UserError(
                f"timm cannot make model {name} for {image_size} pixels: {one_line(error)}. Its names: "
                "timm.list_models(). If images are too small: --image_size 64. If offline: --no-pretrained"
            ) from error
        model.train()
    return model if image_size == 32 else nn.Sequential(Enlarge(image_size, mode="bicubic"), model)
