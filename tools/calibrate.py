"""Temperature scaling: one number, fitted on validation images, that divides the logits before the softmax.

Source: Guo et al., "On Calibration of Modern Neural Networks", 2017. All logits of an image are divided by the same
positive number, so their order stays, and with it the top-1 class and the accuracy.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import evaluate
from checkpoint import CheckpointError
from config import Config, restore
from utils import UserError

# The NLL has no minimum where every prediction is right (towards 0) or the logits say nothing (towards infinity).
LOWEST, HIGHEST = 0.01, 100.0


class Scaled(nn.Module):
    """A model whose logits (N, C) are divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) for normalised images (N, 3, H, W)."""
        return self.model(images) / self.temperature


def fit(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the lowest mean NLL for logits (N, C) and labels (N,), kept from LOWEST to HIGHEST.

    The NLL is convex in 1 / temperature, so a minimum over log temperature is the only one. Raises UserError where a
    logit is not finite.
    """
    logits, labels = logits.double().cpu(), labels.cpu()
    if not logits.isfinite().all():
        raise UserError("no temperature can be fitted: the model's logits are not finite. Give another checkpoint")
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    settings = {"max_iter": 100, "tolerance_grad": 1e-10, "tolerance_change": 1e-12}
    optimizer = torch.optim.LBFGS([log_temperature], line_search_fn="strong_wolfe", **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * (-log_temperature).exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_temperature.exp().clamp(LOWEST, HIGHEST).item()


def fit_on_validation(model: nn.Module, config: Config, data_dir: str) -> float | None:
    """The temperature for the validation images that a run kept; None where it kept none.

    The model is in eval mode on any device. No test image is read. Raises UserError.
    """
    if not config.validation_per_class:
        return None
    _, validation = data.load_training(config.dataset, data_dir, config.validation_per_class, config.images_per_class)
    device = next(model.parameters()).device
    return fit(evaluate.predict_logits(model, validation.images.to(device)), validation.labels)


def stored(content: dict[str, Any], path: Path) -> float | None:
    """The temperature in a checkpoint's content; None where it has none. Raises CheckpointError where it is wrong."""
    value = content.get("temperature")
    if value is None:
        return None
    if type(value) not in (int, float) or not LOWEST <= value <= HIGHEST:  # false for NaN
        raise CheckpointError(
            f"{path} holds a temperature that is no number from {LOWEST:g} to {HIGHEST:g}. Give another checkpoint"
        )
    return float(value)


def find(model: nn.Module, content: dict[str, Any], path: Path, data_dir: str) -> tuple[float | None, str]:
    """The temperature of a checkpoint, stored or else fitted, and where it is from; or None, and why. Raises UserError.

    The model has the checkpoint's weights and is in eval mode.
    """
    if (temperature := stored(content, path)) is not None:
        return temperature, "stored in the checkpoint"
    config = restore(content["config"])
    temperature = fit_on_validation(model, config, data_dir)
    if temperature is None:
        return None, "the checkpoint stores none, and its run kept no validation images to fit one on"
    return temperature, f"fitted on the {config.validation_per_class * data.CLASSES} validation images of its run"
