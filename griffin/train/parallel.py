"""What training does to a model's blocks from outside: recompute activations, compile."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from griffin.model import Griffin
from griffin.train.config import Recompute

# Their results are kept by "cheap": matrix products, the recurrence and attention. Norms, gates' nonlinearities, GeGLU,
# RoPE and the convolution are a few passes over memory each, and computed again.
_KEPT = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention"),
    *("griffin::linear", "griffin::rg_lru", "griffin::flash_attention"),
)


def prepare_blocks(model: Griffin, *, recompute: Recompute = "none", compiled: bool = False, **options: Any) -> None:
    """Change how the blocks of a model run where gradients are recorded; their results and gradients stay the same.

    Args:
        model: changed in place.
        recompute: which activations of a block its backward pass computes again: "none"; "all": its input alone is
            kept, for about a third more time; "cheap": what costs little and takes much memory.
        compiled: compile each block with torch.compile: one graph for each kind of block, whatever their number.
        options: of torch.compile; `fullgraph` is True unless given.
    """
    for block in model.blocks:
        if recompute != "none":
            block.forward = partial(_recomputed, type(block).forward, block, recompute)  # type: ignore[method-assign]
        if compiled:
            block.compile(**{"fullgraph": True, **options})


def _recomputed(forward: Any, block: nn.Module, recompute: Recompute, x: Tensor, state: Any, span: Any) -> Tensor:
    """forward(block, x, state, span), keeping for its backward pass what `recompute` says."""
    if state is not None or not torch.is_grad_enabled():  # with a state a second forward would write it twice
        return forward(block, x, state, span)
    options: dict[str, Any] = {} if recompute == "all" else {"context_fn": _contexts}
    result: Tensor = checkpoint(
        forward, block, x, state, span, use_reentrant=False, preserve_rng_state=False, **options
    )
    return result


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # By full name: variants that write into memory given to them (aten::mm.out) have no result of their own to keep.
    keep = isinstance(op, torch._ops.OpOverload) and op.name() in _KEPT
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = partial(create_selective_checkpoint_contexts, _policy)
