"""The network below the head: tokens, padding and documents as transformers says them, to last hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from griffin.integrations.transformers.cache import GriffinCache
from griffin.integrations.transformers.config import architecture, quantization
from griffin.integrations.transformers.modules import layers, network
from griffin.integrations.transformers.padding import Rows
from griffin.model import Griffin
from griffin.span import advance_, span_of
from griffin.state import State

# What collators of packed rows add to position_ids, and what says nothing beside them.
_SAID_BY_POSITIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class Backbone(nn.Module):
    """Embedding, blocks and final norm: `model.base_model`, which trainers with a head of their own call.

    Attributes:
        embed_tokens, layers, final_norm: as `griffin.model.Layers` has them.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, shape = config, architecture(config)
        made = layers(shape, quantization(config), dtype, device)
        self.embed_tokens: nn.Module = made.embed_tokens
        self.layers, self.final_norm = made.layers, made.final_norm
        self._griffin = (Griffin(shape, device="meta"),)  # (in a tuple, so that its modules are not this one's too)

    def griffin(self, head: nn.Module | None = None) -> Griffin:
        """Give the Griffin that runs these modules as they are now, with an output matrix; None: the embedding's."""
        kind = self._griffin[0]
        if (now := network(kind, self, head, self.activation_dtype)) is not kind:
            self._griffin = (now,)
        return now

    def reshape_(self) -> None:
        """Take another size of the vocabulary from the config."""
        self._griffin = (Griffin(architecture(self.config), device="meta"),)

    @property
    def activation_dtype(self) -> torch.dtype:
        """The parameters', or autocast's within it: which is what mixed-precision training asks for."""
        weight = self.final_norm.weight  # (a quantised embedding's numbers are in no dtype of activations)
        if weight.device.type != "meta" and torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GriffinCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        head: nn.Module | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Run the network; arguments and errors are those of `GriffinForCausalLM.forward`.

        `head` is the output matrix of the Griffin that runs; it changes nothing here.
        """
        check_others(others, position_ids)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        B, T = given.shape[:2]
        griffin, cache = self.griffin(head), self.cache(past_key_values, use_cache)
        state = None if cache is None else cache.begin(griffin, B)
        rows = rows_of(attention_mask, B, T, 0 if cache is None else cache.columns)
        positions = positions_of(position_ids, rows, B, T, cache)
        plain = rows is None and positions is None and inputs_embeds is None
        if cache is not None and cache.unread is not None:
            if not plain or input_ids is None:
                raise ValueError("after crop, the next call takes tokens alone: no padding, packing or inputs_embeds")
            input_ids = torch.cat([cache.unread, input_ids], dim=1)
        before = None if cache is None else cache.before(input_ids if plain else None)
        earlier = None if rows is None or cache is None else _earlier(rows, cache)
        hidden, states = _run(griffin, input_ids, inputs_embeds, state, positions, rows, output_hidden_states)
        hidden = hidden[:, -T:] if rows is None else rows.back(hidden, earlier)
        if states is not None:
            states = tuple(x[:, -T:] if rows is None else rows.back(x) for x in states)
        if cache is not None:
            cache.after(T, input_ids if plain else None, before, hidden[:, -1].detach())
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=states)

    def cache(self, past: Any, use_cache: bool | None) -> GriffinCache | None:
        """Give the cache to go on from or to fill; None for neither."""
        if past is not None and not isinstance(past, GriffinCache):
            raise ValueError(
                f"past_key_values is a {type(past).__name__}, which cannot hold a recurrent state; "
                "leave it out, or pass griffin.integrations.transformers.GriffinCache()"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return GriffinCache() if past is None and use_cache else past


def _run(
    griffin: Griffin,
    tokens: Tensor | None,
    embeddings: Tensor | None,
    state: State | None,
    positions: Tensor | None,
    rows: Rows | None,
    with_states: bool | None,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Run the network over tokens moved to the left: the last hidden states, and what entered each block."""
    if rows is not None:
        tokens, embeddings = (None if x is None else rows.left(x) for x in (tokens, embeddings))
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for block in (griffin.blocks if with_states else ())
    ]
    try:
        lengths = None if rows is None else rows.lengths
        if tokens is not None:
            hidden = griffin(tokens, state, positions=positions, lengths=lengths)
        else:
            assert embeddings is not None
            ids = torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
            span = span_of(griffin.config, ids, state, positions, lengths, None, griffin.activation_dtype)
            hidden = griffin.run(embeddings, state, span)
            if state is not None:
                advance_(state, span)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, (*seen, hidden) if with_states else None


def rows_of(mask: Tensor | None, B: int, T: int, columns: int) -> Rows | None:
    """Read the mask of this call's T columns; None where there is no padding among them."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] not in (T, columns + T):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask is {found}; it must be ({B}, {T}) or ({B}, {columns + T}): which columns are padding. "
            "Documents packed into a row are said by position_ids"
        )
    present = mask[:, -T:].bool()
    return None if present.all() else Rows.of(present)


def positions_of(
    position_ids: Tensor | None, rows: Rows | None, B: int, T: int, cache: GriffinCache | None
) -> Tensor | None:
    """Give offsets as our model takes them; None where each row goes on, which is the quicker way."""
    if position_ids is None:
        return None
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != T:
        raise ValueError(f"position_ids is {tuple(position_ids.shape)}; it must be ({B}, {T}) or (1, {T})")
    positions = position_ids.expand(B, T).to(torch.int64)
    if rows is not None:
        positions = rows.left(positions)
    if torch.compiler.is_compiling():
        return positions
    start = positions.new_zeros(B) if cache is None or cache.state is None else cache.state.position
    if cache is not None and cache.unread is not None:
        start = start + cache.unread.shape[1]
    going_on = start[:, None] + torch.arange(T, dtype=torch.int64, device=positions.device)
    same = positions == going_on
    if rows is not None:
        same |= torch.arange(T, dtype=torch.int64, device=positions.device) >= rows.lengths[:, None]
    return None if same.all() else positions


def _earlier(rows: Rows, cache: GriffinCache) -> Tensor | None:
    """What columns of padding before this call's first token stand for: the latest token of earlier calls."""
    if cache.columns and cache.last is None and bool((rows.latest[:, -1] < 0).any()):
        raise ValueError("a row has nothing but padding here, and its latest token was decoded: give it no padding")
    return cache.last


def check_others(others: dict[str, Any], position_ids: Tensor | None) -> None:
    said = {name for name, value in others.items() if value is not None}
    if position_ids is None and (boundaries := said & _SAID_BY_POSITIONS):
        raise ValueError(f"{', '.join(sorted(boundaries))} without position_ids: documents are told by position_ids")
    if unknown := said - _SAID_BY_POSITIONS:
        raise TypeError(f"GriffinForCausalLM takes no {', '.join(sorted(unknown))}")
