"""The linears and the embedding of a model, and putting others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from griffin.model import Embedding, Griffin, Linear

Replaceable = Linear | Embedding


def replaceable(model: Griffin) -> dict[str, Replaceable]:
    """Name every linear and the embedding that is still the model's own, as `named_modules` does."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Replaceable)}


def replace(model: Griffin, make: Callable[[Replaceable], nn.Module]) -> None:
    """Put make(module) in the place of each linear and of the embedding, one after the other.

    Nothing here holds on to an original: it may be freed before the next is made.

    Args:
        model: changed in place.
        make: gives the module that stands there from now on.
    """
    for owner, name in list(_places(model)):
        setattr(owner, name, make(getattr(owner, name)))


def _places(model: Griffin) -> Iterator[tuple[nn.Module, str]]:
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, Replaceable):
                yield owner, name
