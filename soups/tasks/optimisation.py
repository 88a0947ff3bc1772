"""The optimiser and schedule that every kind of fine-tuning shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn


def optimizer_and_schedule(parameters: Iterable[nn.Parameter], settings: Mapping[str, Any], steps: float) -> Any:
    """Return the optimiser over what is trainable, and its schedule by step, as Lightning takes them.

    Args:
        parameters: of the model.
        settings: `name` ("adamw" or "sgd"), `lr`, `weight_decay` (matrices and kernels only: biases and normalisation have
            none), `momentum` (of SGD), `betas` (of AdamW), `warmup` (share of the steps with a linearly rising rate),
            `schedule` ("cosine" or "constant"), `floor` (share of the rate at the cosine's end; 0 when absent).
        steps: of the whole run.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": float(settings["weight_decay"])},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate = float(settings["lr"])
    if settings["name"] == "adamw":
        first, second = settings.get("betas", (0.9, 0.999))
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=rate, betas=(float(first), float(second)), fused=True
        )
    else:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=float(settings.get("momentum", 0.9)))
    total = max(1, int(steps))
    warmup, floor = round(float(settings["warmup"]) * total), float(settings.get("floor", 0.0))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if settings["schedule"] == "constant":
            return 1.0
        share = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return cast(Any, {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}})
