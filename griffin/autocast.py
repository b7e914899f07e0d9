"""Autocast stays outside: every op here says its dtypes itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def own_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Turn torch.autocast off for `device` within a with statement, where it is on.

    It would round what is documented to be in fp32, the logits and the loss, and cast some inputs of an op but not
    others. `Griffin(..., activation_dtype=torch.bfloat16)` is the same wish, kept exactly.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
