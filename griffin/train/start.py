"""State tuning: the state in which a model begins, trained. A soft prompt that costs nothing per token, ever."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from griffin.errors import GriffinError
from griffin.model import Griffin
from griffin.state import State


class Start(nn.Module):
    """One row of state as parameters: h and the convolution's inputs of each recurrent layer, the keys and values of
    `num_tokens` tokens in each layer of attention.

    Args:
        model: whose state it is; its weights are not looked at again.
        tokens: what the state has read to begin with; the window holds them all.

    Raises:
        GriffinError: there are no tokens, or more than the window holds; or attention is global: its state grows.
    """

    def __init__(self, model: Griffin, tokens: Sequence[int]) -> None:
        super().__init__()
        window = model.config.window
        if window is None and "attention" in model.config.block_types:
            raise GriffinError("the state of global attention grows with the text and is not tuned; use lora")
        if not tokens or (window is not None and len(tokens) > window):
            raise GriffinError(f"a state of {len(tokens)} tokens is tuned; give 1 .. {window}, what the window holds")
        self.model, self.num_tokens = (model,), len(tokens)  # in a tuple: it is no part of this module
        state = model.new_state(1)
        with torch.no_grad():
            model(torch.tensor([list(tokens)], dtype=torch.int64, device=model.device), state)
        self.names = list(_tensors(state))
        self.values = nn.ParameterList(
            nn.Parameter(self._held(name, tensor).float().clone()) for name, tensor in _tensors(state).items()
        )

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by the names of the state's tensors."""
        return dict(zip(self.names, self.values, strict=True))

    def rows(self, count: int) -> State:
        """The state of `count` rows that begin here; gradients flow through it to the parameters."""
        [model] = self.model
        state = model.new_state(count)
        state.reserve_(self.num_tokens)
        state.position.fill_(self.num_tokens)
        state.longest = self.num_tokens
        for (name, tensor), value in zip(_tensors(state).items(), self.values, strict=True):
            row = value.to(tensor.dtype).expand(count, *value.shape[1:])
            if _is_window(name):
                row = torch.cat([row, tensor[:, self.num_tokens :]], dim=1)
            _, layer, leaf = name.split(".")
            setattr(state.layers[int(layer)], leaf, row * 1)  # a result, not a parameter: the model writes over it
        return state

    @torch.no_grad()
    def state(self) -> State:
        """The state of one row that begins here, to be generated from or saved."""
        return self.rows(1).clone()

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[:, : self.num_tokens] if _is_window(name) else tensor


def _tensors(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.tensors().items() if name != "position"}


def _is_window(name: str) -> bool:
    return name.endswith(("keys", "values"))
