"""What a block keeps of its activations for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "cheap", "all"]

# Their results are kept by "cheap": matrix products, the recurrence and attention. Norms, gates' nonlinearities, GeGLU,
# RoPE and the convolution are a few passes over memory each, and computed again.
_KEPT = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention"),
    *("griffin::linear", "griffin::rg_lru", "griffin::flash_attention"),
)


def kept(block: Callable[..., Tensor], recompute: Recompute, *inputs: Any) -> Tensor:
    """Compute block(*inputs), keeping for its backward pass what `recompute` says; the gradients are the same.

    Args:
        block: a module, or any function of tensors.
        recompute: "none" keeps all activations; "all" keeps the inputs alone, and computes the block again: about a
            third more time; "cheap" computes again what costs little and takes much memory.
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    options: dict[str, Any] = {} if recompute == "all" else {"context_fn": _contexts}
    result: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
    return result


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # By full name: variants that write into memory given to them (aten::mm.out) have no result of their own to keep.
    keep = isinstance(op, torch._ops.OpOverload) and op.name() in _KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _policy)
