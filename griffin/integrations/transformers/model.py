"""GriffinForCausalLM: a Griffin as transformers' PreTrainedModel, with its `generate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel, RecurrentGemmaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from griffin.checkpoint.layout import some
from griffin.integrations.transformers.cache import GriffinCache
from griffin.integrations.transformers.config import architecture, quantization
from griffin.integrations.transformers.modules import OutputLinear, is_plain, layers, network
from griffin.integrations.transformers.padding import IGNORED, Rows, targets
from griffin.loss import NOT_COUNTED, cross_entropy
from griffin.model import Griffin, init_weights
from griffin.span import advance_, span_of
from griffin.state import State

# What collators of packed rows add to position_ids, and what says nothing beside them.
_SAID_BY_POSITIONS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class GriffinForCausalLM(PreTrainedModel, GenerationMixin):
    """Griffin, Hawk and RecurrentGemma with transformers' interface; parameters have the names of released weights.

    What carries over between calls is the `past_key_values`, a GriffinCache, and nothing else.

    Args:
        config: a RecurrentGemmaConfig or OwnConfig.
        skip_logits: give no logits where there are labels in training, so that a vocabulary of 256,000 costs no
            (B, T, V): the loss is the same. Also an attribute, and an argument of a call.
    """

    config_class = RecurrentGemmaConfig  # of from_pretrained of this class itself; AutoModelForCausalLM knows both
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012, as in transformers
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = False  # a cache holds it all, and can be cropped

    def __init__(self, config: PreTrainedConfig, skip_logits: bool = False) -> None:
        super().__init__(config)
        shape, form = architecture(config), quantization(config)
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        self.model = layers(shape, form, dtype, device)
        self.lm_head: nn.Module | None = None  # of a quantised model, the embedding
        if form is None:
            self.lm_head = OutputLinear(shape.width, shape.vocab_size, bias=False, device=device, dtype=dtype)
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self._griffin = (Griffin(shape, device="meta"),)  # (in a tuple, so that its modules are not this one's too)
        self.skip_logits, self.gradient_checkpointing = skip_logits, False
        self.post_init()

    @property
    def griffin(self) -> Griffin:
        """The Griffin that runs this model's modules as they are now: for `griffin.generate` and the like."""
        dtype, kind = self._activation_dtype(), self._griffin[0]
        if (now := network(kind, self.model, self.lm_head, dtype)) is not kind:
            self._griffin = (now,)
        return now

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GriffinCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """Compute logits, and the loss where there are labels.

        Args:
            input_ids: (B, T) tokens.
            attention_mask: (B, T), or (B, columns of the cache + T): 0 is padding, on the left, on the right or in
                between. Padding does not exist: the others are computed as in a row without it, and a column of padding
                has the logits of the latest token before it.
            position_ids: (B, T) or (1, T), offset of each token in its document; a 0 starts a document. None: each row
                goes on.
            past_key_values: what came before; it is advanced. None: nothing.
            inputs_embeds: (B, T, D) rows as the embedding gives them, instead of input_ids.
            labels: (B, T), what each token is; -100 is not counted. Each predicts the next of its document.
            use_cache: whether to give past_key_values; None: if there are some, or config.use_cache and not training.
            logits_to_keep: of the last so many columns, or of these columns; 0: all.
            output_hidden_states: give what enters each block, and the last block's result normed.
            skip_logits: None as the model's.
            num_items_in_batch: what the sum of nats is divided by; None: the labels counted.

        Returns:
            CausalLMOutputWithPast: logits in fp32.

        Raises:
            ValueError: what cannot be right: a cache of another kind, masks of another shape, offsets that do not fit.
        """
        _check_others(others, position_ids, output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        B, T = given.shape[:2]
        griffin = self.griffin
        cache = self._cache(past_key_values, use_cache)
        state = None if cache is None else cache.begin(griffin, B)
        columns = 0 if cache is None else cache.columns
        rows = _rows(attention_mask, B, T, columns)
        positions = _positions(position_ids, rows, B, T, state, cache)

        plain = rows is None and positions is None and inputs_embeds is None
        unread = None if cache is None else cache.unread
        if unread is not None:
            if not plain or input_ids is None:
                raise ValueError("after crop, the next call takes tokens alone: no padding, packing or inputs_embeds")
            input_ids = torch.cat([unread, input_ids], dim=1)
        before = None if cache is None else cache.before(input_ids if plain else None)

        last = states = loss = logits = None
        if plain and not output_hidden_states and labels is None and self._may_step(griffin, cache, input_ids):
            assert cache is not None
            assert input_ids is not None
            logits = cache.step(griffin)(input_ids[:, 0]).clone()[:, None]
        else:
            earlier = None if rows is None or cache is None else _earlier(rows, cache)
            hidden, states = _run(griffin, input_ids, inputs_embeds, state, positions, rows, output_hidden_states)
            hidden = hidden[:, -T:] if rows is None else rows.back(hidden, earlier)
            if states is not None:
                states = tuple(x[:, -T:] if rows is None else rows.back(x) for x in states)
            last = hidden[:, -1].detach()
            loss, logits = self._heads(
                griffin, hidden, labels, position_ids, rows, logits_to_keep, skip_logits, num_items_in_batch
            )
        if cache is not None:
            cache.after(T, input_ids if plain else None, before, last)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _heads(
        self,
        griffin: Griffin,
        hidden: Tensor,
        labels: Tensor | None,
        position_ids: Tensor | None,
        rows: Rows | None,
        logits_to_keep: int | Tensor,
        skip_logits: bool | None,
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Give the loss and the logits, each None where it is not wanted."""
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = hidden[:, keep if isinstance(logits_to_keep, int) else logits_to_keep]
        if labels is None:
            return None, griffin.logits(kept)
        starts = None if position_ids is None else (position_ids == 0).expand_as(labels)
        wanted = targets(labels.to(hidden.device), rows, starts)
        skip = self.training and self.skip_logits if skip_logits is None else skip_logits
        if skip and isinstance(self.lm_head, OutputLinear):
            counted = wanted.masked_fill(wanted == IGNORED, NOT_COUNTED)
            nats, count = cross_entropy(hidden, griffin.embedding, counted, soft_cap=griffin.config.logits_soft_cap)
            return nats / (count if num_items_in_batch is None else num_items_in_batch), None
        logits = griffin.logits(hidden)
        loss = self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=wanted,
            vocab_size=griffin.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
        return loss, logits[:, keep if isinstance(logits_to_keep, int) else logits_to_keep]

    def _activation_dtype(self) -> torch.dtype:
        """The parameters', or autocast's within it: which is what mixed-precision training asks for."""
        parameter = cast(Tensor, self.model.final_norm.weight if self.lm_head is None else self.lm_head.weight)
        kind = parameter.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return parameter.dtype

    def _cache(self, past: Any, use_cache: bool | None) -> GriffinCache | None:
        if past is not None and not isinstance(past, GriffinCache):
            raise ValueError(
                f"past_key_values is a {type(past).__name__}, which cannot hold a recurrent state; "
                "leave it out, or pass griffin.integrations.transformers.GriffinCache()"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return GriffinCache() if past is None and use_cache else past

    def _may_step(self, griffin: Griffin, cache: GriffinCache | None, tokens: Tensor | None) -> bool:
        """Whether this call is the recorded step: one token of every row, where nothing else is asked or set."""
        if cache is None or tokens is None or tokens.shape[1] != 1 or tokens.device.type != "cpu":
            return False
        return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and is_plain(griffin)

    # What transformers asks of a model class.

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self.model, "embed_tokens", value)  # noqa: B010, any table; mypy knows it as ours

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        table = super().resize_token_embeddings(*args, **kwargs)
        V, D = table.weight.shape
        head = OutputLinear(D, V, bias=False, device="meta", dtype=table.weight.dtype)
        head.weight = table.weight
        self.lm_head = head
        self._griffin = (Griffin(architecture(self.config), device="meta"),)
        return table

    def initialize_weights(self) -> None:
        """Fill what no checkpoint gave, all at once: `griffin.model.init_weights`."""
        parameters = dict(self.named_parameters())
        missing = [name for name, p in parameters.items() if not getattr(p, "_is_hf_initialized", False)]
        if missing and len(missing) < len(parameters):
            raise ValueError(f"the checkpoint lacks {some(missing)}; config.json is of another model")
        if missing:
            init_weights(network(self._griffin[0], self.model, None, self._activation_dtype()))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the table that `resize_token_embeddings` makes, before it copies what there was."""
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, module.embedding_dim**-0.5)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        super().tie_weights(missing_keys, recompute_mapping)
        read = missing_keys is not None  # a checkpoint has been
        if read and self.lm_head is not None and self.lm_head.weight is not self.model.embed_tokens.weight:
            raise ValueError("lm_head.weight differs from the embedding; untied models are not supported")

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Refuse what `griffin.load` refuses; transformers would warn, and make up or drop weights."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        lacks, extra = sorted(loading_info.missing_keys - {"lm_head.weight"}), sorted(loading_info.unexpected_keys)
        for what, names in (("lacks", lacks), ("has, which the model does not,", extra)):
            if names:
                raise ValueError(f"the checkpoint {what} {some(names)}; config.json is of another model")

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        self.gradient_checkpointing = enable
        for index, block in enumerate(self.model.layers):
            block.__dict__.pop("forward", None)
            if enable and index % every_n_layers == 0:
                block.forward = partial(_recomputed, type(block).forward, block, gradient_checkpointing_func)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> None:
        """None, so that each row goes on: what transformers would count goes wrong after padding on the right."""

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r} is of keys and values of every token; a GriffinCache is a state of "
                "fixed size: leave it out, or say 'static'"
            )
        if (cache := model_kwargs.get("past_key_values")) is None and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = GriffinCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()
        self._cache(cache, False)


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
            span = span_of(griffin.config, ids, state, positions, lengths, griffin.activation_dtype)
            hidden = griffin.run(embeddings, state, span)
            if state is not None:
                advance_(state, span)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, (*seen, hidden) if with_states else None


def _rows(mask: Tensor | None, B: int, T: int, columns: int) -> Rows | None:
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


def _positions(
    position_ids: Tensor | None, rows: Rows | None, B: int, T: int, state: State | None, cache: GriffinCache | None
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
    start = positions.new_zeros(B) if state is None else state.position
    if cache is not None and cache.unread is not None:
        start = start + cache.unread.shape[1]
    going_on = start[:, None] + torch.arange(T, device=positions.device)
    same = positions == going_on
    if rows is not None:
        same |= torch.arange(T, device=positions.device) >= rows.lengths[:, None]
    return None if same.all() else positions


def _earlier(rows: Rows, cache: GriffinCache) -> Tensor | None:
    """What columns of padding before this call's first token stand for: the latest token of earlier calls."""
    if cache.columns and cache.last is None and bool((rows.latest[:, -1] < 0).any()):
        raise ValueError("a row has nothing but padding here, and its latest token was decoded: give it no padding")
    return cache.last


def _recomputed(
    forward: Callable[..., Tensor], block: nn.Module, again: Callable[..., Any], x: Tensor, state: Any, span: Any
) -> Any:
    """forward(block, x, state, span), computed again in the backward pass."""
    if state is not None or not block.training or not torch.is_grad_enabled():
        return forward(block, x, state, span)  # with a state a second forward would write it twice
    return again(forward, block, x, state, span)


def _check_others(others: dict[str, Any], position_ids: Tensor | None, output_attentions: bool | None) -> None:
    if output_attentions:
        raise ValueError("output_attentions: the kernels never form attention weights")
    said = {name for name, value in others.items() if value is not None}
    if position_ids is None and (boundaries := said & _SAID_BY_POSITIONS):
        raise ValueError(f"{', '.join(sorted(boundaries))} without position_ids: documents are told by position_ids")
    if unknown := said - _SAID_BY_POSITIONS:
        raise TypeError(f"GriffinForCausalLM takes no {', '.join(sorted(unknown))}")
