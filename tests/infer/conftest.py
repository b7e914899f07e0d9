from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from griffin import Griffin


@pytest.fixture
def make_lively(make_model: Callable[..., Griffin]) -> Callable[..., Griffin]:
    """Make a model whose blocks outweigh its embedding.

    With the usual initial weights, the likeliest next token is the one just read, and a greedy text repeats one token
    whatever the state holds: it would prove nothing.
    """

    def make(*args: object, **changes: object) -> Griffin:
        model = make_model(*args, **changes)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("linear_out.weight", "o_proj.weight", "down_proj.weight")):
                    parameter *= 30
        return model

    return make
