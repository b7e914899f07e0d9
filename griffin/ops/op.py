"""The two kinds of op, by whose gradient they have.

Opaque: one operation of PyTorch's (griffin::name) with a gradient of our own, whole to whatever traces, compiles,
exports or recomputes it. Its body asks `device.kernels`.

Transparent: PyTorch differentiates, fuses and shards the definition. Where a kernel serves in its place,
`differentiable` gives that its gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from griffin.ops import device

Body = TypeVar("Body", bound=Callable[..., Any])


def opaque(
    name: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[[Body], Body]:
    """Make a function of tensors the operation griffin::`name`.

    Where nothing records or traces, a call goes straight to the function: the dispatcher takes 10 us. Differentiating
    forward raises NotImplementedError; PyTorch would lose the tangent without a word.

    Args:
        name: of the operation.
        fake: the function for tensors without storage: gives empty results of the right shapes.
        backward, save: as `torch.library.register_autograd` takes them; None: it has no gradient.
    """

    def wrap(body: Body) -> Body:
        operation = torch.library.custom_op(f"griffin::{name}", body, mutates_args=())
        operation.register_fake(fake)
        if backward is not None:
            operation.register_autograd(backward, setup_context=save)

        @functools.wraps(body)
        def call(*args: Any) -> Any:
            if device.plain(*args):
                return body(*args)
            if device.has_tangent(*args):
                raise NotImplementedError(f"{name} has no derivative in forward mode; differentiate it backward")
            return operation(*args)

        return call  # type: ignore[return-value]

    return wrap


def differentiable(run: Callable[..., Any], gradient: Callable[..., tuple[Tensor | None, ...]], *args: Any) -> Tensor:
    """Compute run(*args)[0], by a kernel, as one step of autograd.

    Args:
        run: gives the result, and a tuple of what `gradient` needs.
        gradient: called with which of the arguments need a gradient, with that of the result, and with what `run` gave
            for it; gives the gradients of the first arguments.
        args: tensors, and what is not one.
    """
    if torch.is_grad_enabled():
        return _Differentiable.apply(run, gradient, *args)  # type: ignore[no-untyped-call]
    return run(*args)[0]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], gradient: Callable[..., Any], *args: Any) -> Tensor:
        result, kept = run(*args)
        ctx.gradient, ctx.numbers = gradient, [None if isinstance(value, Tensor) else value for value in kept]
        ctx.are_tensors = [isinstance(value, Tensor) for value in kept]
        ctx.save_for_backward(*(value for value in kept if isinstance(value, Tensor)))
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # It is computed without a graph. PyTorch's once_differentiable would not say so where dy has none.
            raise RuntimeError("a kernel's gradient has no derivative: call backward without create_graph=True")
        tensors = iter(ctx.saved_tensors)
        kept = [
            next(tensors) if is_one else number for is_one, number in zip(ctx.are_tensors, ctx.numbers, strict=True)
        ]
        needed = ctx.needs_input_grad[2:]
        grads = ctx.gradient(needed, dy, *kept)
        return None, None, *grads, *[None] * (len(needed) - len(grads))
