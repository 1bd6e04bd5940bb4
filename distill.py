"""Distillation: the loss of a model that learns a larger one's logits instead of the labels (Hinton et al., 2015)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import load_model


class DistillationLoss:
    """Mean squared difference between the logits of the model and of a frozen teacher, each centred per image (Kim et
    al., 2021).

    The teacher sees the same view of each image as the model (consistent teaching: Beyer et al., 2022), mixed images
    too; the labels are not used. The caller's autocast holds for the teacher too.
    """

    def __init__(self, teacher: Path, device: torch.device, compile: bool = False) -> None:
        model, _ = load_model(teacher)
        self.teacher: nn.Module = model.to(device, memory_format=torch.channels_last).requires_grad_(False)
        if compile:
            self.teacher = torch.compile(self.teacher, dynamic=False)

    def __call__(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (N, 100) for normalised images (N, 3, 32, 32)."""
        logits, target = logits.float(), self.teacher(images).float()
        return F.mse_loss(logits - logits.mean(1, keepdim=True), target - target.mean(1, keepdim=True))
