"""A shortened MobileNetV3-Large (Howard et al., "Searching for MobileNetV3", 2019) for 32x32 images and 100 classes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class BlockConfig(NamedTuple):
    """One inverted residual: channels in and out, depthwise kernel and stride, expanded channels."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    hidden: int
    squeeze_excitation: bool
    activation: type[nn.Module]


BLOCKS = (
    BlockConfig(16, 16, 3, 1, 16, False, nn.ReLU),  # 16 x 32 x 32
    BlockConfig(16, 24, 3, 2, 64, False, nn.ReLU),  # 24 x 16 x 16
    BlockConfig(24, 24, 3, 1, 72, False, nn.ReLU),  # 24 x 16 x 16
    BlockConfig(24, 40, 5, 2, 72, True, nn.Hardswish),  # 40 x 8 x 8
    BlockConfig(40, 40, 5, 1, 120, True, nn.Hardswish),  # 40 x 8 x 8
    BlockConfig(40, 80, 3, 2, 240, False, nn.Hardswish),  # 80 x 4 x 4
    BlockConfig(80, 112, 3, 1, 480, True, nn.Hardswish),  # 112 x 4 x 4
    BlockConfig(112, 160, 5, 2, 672, True, nn.Hardswish),  # 160 x 2 x 2
)
STEM, HEAD, CLASSES = BLOCKS[0].inputs, 960, 100


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the feature map's size (over the stride), without bias, and its batch normalisation."""
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

    def __init__(self, block: BlockConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = nn.Sequential(*conv_bn(block.inputs, block.hidden, 1), block.activation(inplace=True))
        self.depthwise = nn.Sequential(
            *conv_bn(block.hidden, block.hidden, block.kernel, block.stride, groups=block.hidden),
            block.activation(inplace=True),
        )
        self.excite = SqueezeExcitation(block.hidden) if block.squeeze_excitation else nn.Identity()
        self.project = nn.Sequential(*conv_bn(block.hidden, block.outputs, 1), nn.Dropout(dropout))
        self.residual = block.stride == 1 and block.inputs == block.outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """The network of the report: normalised float (N, 3, 32, 32) in, logits (N, 100) out."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, STEM, 3), nn.Hardswish(inplace=True))  # 16 x 32 x 32
        self.blocks = nn.Sequential(*(InvertedResidual(block, dropout) for block in BLOCKS))  # 160 x 2 x 2
        self.head = nn.Sequential(*conv_bn(BLOCKS[-1].outputs, HEAD, 1), nn.Hardswish(inplace=True))  # 960 x 2 x 2
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout))  # 960 x 1 x 1
        self.classifier = nn.Linear(HEAD, CLASSES)  # 100

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))


class Enlarge(nn.Upsample):
    """Enlarge images: networks made for ImageNet expect more than 32 pixels. thop would count a plain Upsample."""


def build_model(
    name: str, dropout: float = 0.0, image_size: int = 32, pretrained: bool = False, smallest: int = 32
) -> nn.Module:
    """The network of the report ("mobilenetv3"), or timm's model of that name with its ImageNet weights or random ones.

    It takes normalised float (N, 3, H, W) of at least `smallest` pixels a side, enlarges them to `image_size` unless
    that is 32, and returns logits (N, 100). Raises ValueError where timm is not installed, does not know the name,
    cannot fetch the weights, or its model cannot take such images.
    """
    model: nn.Module
    if name == "mobilenetv3":
        model = MobileNetV3(dropout)
    else:
        side = smallest if image_size == 32 else image_size
        try:
            import timm  # optional

            model = timm.create_model(name, pretrained=pretrained, num_classes=CLASSES, drop_rate=dropout)
            with torch.no_grad():  # some take one size of image only, or none so small
                model.eval()(torch.zeros(1, 3, side, side))
            model.train()
        except ImportError as error:
            raise ValueError(f"model {name} needs timm. Run: pip install -r requirements-tools.txt") from error
        except Exception as error:  # nearly anything, as while it fetches weights
            reason = " ".join(str(error).split())
            raise ValueError(
                f"timm cannot make model {name} for {side} pixels: {reason}. Its names: timm.list_models(). Where "
                "images are too small, give --image_size 64 or --small_fraction 0; offline --no-pretrained"
            ) from error
    return model if image_size == 32 else nn.Sequential(Enlarge(image_size, mode="bicubic"), model)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> tuple[int, int]:
    """Start a model from a state dict. Returns how many tensors were taken, and how many the model has.

    Tensors are matched by name, or, where no name fits, by their order. All of the model's must be there with their
    shapes, but one of 100 rows, as the classifier's, may differ or be missing and then keeps its random weights, and
    counters of batches may be missing. Raises ValueError.
    """
    own = (model[1] if isinstance(model, nn.Sequential) else model).state_dict()
    if not own.keys() & weights.keys():
        if len(own) != len(weights):
            raise ValueError(f"there are {len(weights)} tensors, and the model has {len(own)}")
        weights = dict(zip(own, weights.values(), strict=True))
    taken = 0
    for name, tensor in own.items():
        if name in weights and weights[name].shape == tensor.shape:
            tensor.copy_(weights[name])
            taken += 1
        elif tensor.ndim and tensor.shape[:1] != (CLASSES,):
            found = f"is {(*weights[name].shape,)}" if name in weights else "is missing"
            raise ValueError(f"{name} {found}, and the model's is {(*tensor.shape,)}")
    return taken, len(own)
