"""The linears and the embedding of a model, and putting others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from griffin.model import Embedding, Griffin, Linear

Replaceable = Linear | Embedding


def replaceable(model: Griffin) -> dict[str, Replaceable]:
    """Name every linear and the embedding that is still the model's own, as `named_modules` does."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Replaceable)}


def replace(model: Griffin, make: Callable[[Any], nn.Module], names: Iterable[str] | None = None) -> None:
    """Put make(module) in the place of modules, one after the other.

    Nothing here holds on to an original: it may be freed before the next is made.

    Args:
        model: changed in place.
        make: gives the module that stands there from now on.
        names: of the modules, as `named_modules` has them; None: each linear and the embedding.
    """
    for name in list(replaceable(model) if names is None else names):
        place, _, leaf = name.rpartition(".")
        owner = model.get_submodule(place)
        setattr(owner, leaf, make(getattr(owner, leaf)))
