"""What a step needs beside the model: optimizer, schedule, EMA, loss and teacher; `config` is a config.Config."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # (images, logits, labels) to the batch's mean loss
DEFAULT_STEP = 38 / 130  # of the run between two decays, as in the best of the report's experiments


def build_optimizer(config: Any, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9; without `decay_norms` norms and biases have no weight decay."""
    decay = config.weight_decay
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": decay if config.decay_norms else 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.lr, fused=True)
    optimizer = torch.optim.SGD(groups, config.lr, momentum=0.9, nesterov=True, fused=True)
    for p in model.parameters():  # torch leaves them uninitialised where GradScaler skips the first step
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def build_scheduler(config: Any, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """StepLR or cosine to 0, stepped once an epoch, times a linear warm-up of at most a quarter of the run."""
    if config.schedule == "cosine":
        decay = lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    else:
        step = config.lr_step or max(1, round(config.epochs * DEFAULT_STEP))
        decay = lr_scheduler.StepLR(optimizer, step, config.lr_gamma)
    warmup_epochs = min(config.warmup_epochs, config.epochs // 4)
    if not warmup_epochs:
        return decay
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup_epochs + 1), total_iters=warmup_epochs)
    return lr_scheduler.ChainedScheduler([warmup, decay])


class EMA:
    """Exponential moving average of a model's weights and batch-norm statistics (Tarvainen and Valpola, 2017).

    The decay rises as (1 + t) / (10 + t) to its setting, so that the first random weights do not linger. torch's
    AveragedModel synchronises with the device at each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = copy.deepcopy(model), decay, 0
        self.averaged = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        self.current = [value for value in model.state_dict().values() if value.is_floating_point()]

    def update(self) -> None:
        """Take in the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averaged, self.current, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["network"])
        self.updates = state["updates"]


def build_criterion(config: Any, teacher: Callable[[Tensor], Tensor] | None = None) -> Criterion:
    """Cross-entropy with label smoothing (Szegedy et al., 2016). With a teacher, from images to its logits: the
    distillation loss plus `label_weight` times the cross-entropy."""
    cross_entropy = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    distill = DISTILLATION[config.distill_loss]

    def criterion(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if teacher is None:
            return cross_entropy(logits, labels)
        loss = distill(logits.float(), teacher(images), config.distill_temperature)
        return loss + config.label_weight * cross_entropy(logits, labels) if config.label_weight else loss

    return criterion


def kl_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened probabilities, times temperature^2 (Hinton et al., 2015)."""
    student, teacher = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def standardised_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of logits with mean 0 and std 1 (logit standardisation: Sun et al., 2024)."""
    student, teacher = (
        (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp(min=0.01)  # a new head may give 0
        for logits in (student, teacher)
    )
    return kl_loss(student, teacher, temperature)


def mse_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean squared difference of the logits, each less its mean (Kim et al., 2021); has no temperature."""
    return F.mse_loss(student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True))


# The names stand in config.DISTILL_LOSSES too.
DISTILLATION = {"kl": kl_loss, "standardised": standardised_loss, "mse": mse_loss}


class Teacher:
    """A frozen model whose logits another one learns, in half precision where the device is faster in it.

    It sees the same view of each image as the student (consistent teaching: Beyer et al., 2022). `new_logits` has the
    logits of an epoch. Where the same views come again, `start_epoch` takes them back and the model is not run.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, compile: bool = False) -> None:
        self.model, self.device = model.to(device, memory_format=torch.channels_last), device
        if compile:
            self.model = torch.compile(self.model, dynamic=False)
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        self.autocast = torch.autocast(device.type, dtype, enabled=fast)
        self.start_epoch()

    def start_epoch(self, cached_logits: Tensor | None = None) -> None:
        """Begin an epoch; `cached_logits` are those of its batches, (batches, N, 100), where there are any."""
        self.cached_logits = None if cached_logits is None else iter(cached_logits.to(self.device))
        self.new_logits: list[Tensor] = []  # float16: 10 MB for 50,000 images

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (N, 100), float32, for the normalised images (N, 3, H, W) of the epoch's next batch.

        Cached logits are given in the order of the batches, without a look at the images.
        """
        if self.cached_logits is not None:
            return next(self.cached_logits).float()
        with torch.no_grad(), self.autocast:
            logits = self.model(images).half()
        self.new_logits.append(logits)
        return logits.float()
