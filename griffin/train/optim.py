"""AdamW, what it decays, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from griffin.train.config import TrainConfig


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: on the matrices of linear layers, and on nothing else.

    Not on the RG-LRU: its decay a is what the layer remembers, and its gates start small. Not on biases and norms,
    whose rest value is no better than another. Not on the embedding, where rare rows would fade between their uses. Not
    on the convolution: four taps per channel, a scale like a norm's, which linear_x's decay bounds already.
    """
    *owners, leaf = name.split(".")
    owner = owners[-1] if owners else ""
    return leaf == "weight" and (owner.endswith("_proj") or owner in ("linear_x", "linear_y", "linear_out"))


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `named_parameters()` in two groups, with and without weight decay; frozen parameters are left out."""
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in parameters:
        if parameter.requires_grad:
            groups[decays(name)].append((name, parameter))
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "weight_decay": config.weight_decay if decayed else 0.0}
            for decayed, group in groups.items()
            if group
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    optimizer.register_step_post_hook(_count_writes)
    return optimizer


def _count_writes(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Tell PyTorch that the parameters were written: a fused step does not, and Griffin.fingerprint asks."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


def learning_rate(step: int, config: TrainConfig) -> float:
    """Give the rate of a step, counted from 0: a straight line up to the peak, then as config.schedule says.

    Step `config.warmup` has the peak; the last step has min_learning_rate times it. "cosine": half a cosine in between.
    "wsd" (warm-up, stable, decay): the peak, and a straight line down over the last `config.decay` steps; with none of
    those it stays at the peak, whatever `steps` are, so that a run can go on without end.

    Source: wsd, MiniCPM, arXiv:2404.06395, section 4.
    """
    peak, warmup = config.learning_rate, config.warmup
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    low = config.min_learning_rate
    if config.schedule == "wsd":
        left = max(0, config.steps - 1 - step)  # steps behind this one
        return peak if left >= config.decay else peak * (low + (1 - low) * left / config.decay)
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def falling_from(config: TrainConfig) -> int | None:
    """The step from which on a wsd schedule falls: where a longer run branches off. None: it does not fall."""
    return config.steps - config.decay if config.schedule == "wsd" and config.decay else None


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
