"""GriffinForCausalLM: a Griffin as transformers' PreTrainedModel, with its `generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from griffin.checkpoint.layout import some
from griffin.integrations.transformers.backbone import Backbone, positions_of, rows_of
from griffin.integrations.transformers.cache import GriffinCache
from griffin.integrations.transformers.config import RecurrentGemmaConfig, quantization
from griffin.integrations.transformers.modules import OutputLinear, is_plain
from griffin.integrations.transformers.padding import IGNORED, targets
from griffin.loss import NOT_COUNTED, cross_entropy
from griffin.model import Griffin, init_weights


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
        if type(config) is transformers.RecurrentGemmaConfig:  # as a program makes it, not register's
            config = RecurrentGemmaConfig.from_dict(config.to_dict())
        super().__init__(config)
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        self.model = Backbone(config, dtype, device)
        self.lm_head: nn.Module | None = None  # of a quantised model, the embedding
        if quantization(config) is None:
            V, D = cast(Tensor, self.model.embed_tokens.weight).shape
            self.lm_head = OutputLinear(D, V, bias=False, device=device, dtype=dtype)
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.skip_logits, self.gradient_checkpointing = skip_logits, False
        self.post_init()

    @property
    def griffin(self) -> Griffin:
        """The Griffin that runs this model's modules as they are now: for `griffin.generate` and the like."""
        return self.model.griffin(self.lm_head)

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
            output_hidden_states: give what enters each block, and the last block's result normed. None as config's.
            skip_logits: None as the model's.
            num_items_in_batch: what the sum of nats is divided by; None: the labels counted.

        Returns:
            CausalLMOutputWithPast: logits in fp32.

        Raises:
            ValueError: what cannot be right: a cache of another kind, masks of another shape, offsets that do not fit.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: the kernels never form attention weights")
        cache = self.model.cache(past_key_values, use_cache)
        wanted = labels is not None or output_hidden_states or inputs_embeds is not None or others
        if not wanted and (logits := self._step(input_ids, attention_mask, position_ids, cache)) is not None:
            output = CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        else:
            body = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                inputs_embeds=inputs_embeds,
                use_cache=False if cache is None else None,
                output_hidden_states=output_hidden_states,
                head=self.lm_head,
                **others,
            )
            hidden = body.last_hidden_state
            keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            if labels is None:
                loss, logits = None, self.griffin.logits(hidden[:, keep])
            else:
                B, T = labels.shape
                rows = rows_of(attention_mask, B, T, 0 if cache is None else cache.columns - T)
                starts = None if position_ids is None else (position_ids == 0).expand_as(labels)
                follows = targets(labels.to(hidden.device), rows, starts)
                skip = self.training and self.skip_logits if skip_logits is None else skip_logits
                loss, logits = self._loss(hidden, follows, num_items_in_batch, skip)
                logits = None if logits is None else logits[:, keep]
            output = CausalLMOutputWithPast(loss, logits, cache, body.hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _step(
        self, tokens: Tensor | None, mask: Tensor | None, position_ids: Tensor | None, cache: GriffinCache | None
    ) -> Tensor | None:
        """Give the logits of one more token of each row by the recorded step; None where that cannot be."""
        if cache is None or tokens is None or tokens.shape[1] != 1 or tokens.device.type != "cpu":
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or cache.unread is not None:
            return None
        B, griffin = len(tokens), self.griffin
        if not is_plain(griffin) or rows_of(mask, B, 1, cache.columns) is not None:
            return None
        cache.begin(griffin, B)
        if positions_of(position_ids, None, B, 1, cache) is not None:
            return None
        before = cache.before(tokens)
        logits = cache.step(griffin)(tokens[:, 0]).clone()  # the next step may write over it
        cache.after(1, tokens, before, None)
        return cast(Tensor, logits)[:, None]

    def _loss(
        self, hidden: Tensor, follows: Tensor, count: Tensor | int | None, skip: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Give the nats of what follows each column, over `count` or the mean, and all logits or, skipped, None."""
        griffin = self.griffin
        if skip and type(self.lm_head) is OutputLinear:
            counted = follows.masked_fill(follows == IGNORED, NOT_COUNTED)
            nats, found = cross_entropy(hidden, griffin.embedding, counted, soft_cap=griffin.config.logits_soft_cap)
            return nats / (found if count is None else count), None
        logits = griffin.logits(hidden)
        V = griffin.config.vocab_size
        loss = self.loss_function(logits, None, V, shift_labels=follows, num_items_in_batch=count)
        return loss, logits

    # What transformers asks of a model class.

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

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
        self.model.reshape_()
        return table

    def initialize_weights(self) -> None:
        """Fill all parameters where no checkpoint gave any: `griffin.model.init_weights`."""
        parameters = {name: p for name, p in self.named_parameters() if name != "lm_head.weight"}
        missing = [name for name, p in parameters.items() if not getattr(p, "_is_hf_initialized", False)]
        if missing and len(missing) < len(parameters):
            raise ValueError(f"the checkpoint lacks {some(missing)}; config.json is of another model")
        if missing:
            whole = copy.copy(self.griffin)
            whole._modules = {"model": self.model}  # parameters by their names in a checkpoint
            init_weights(whole)

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
        lacks, extra = loading_info.missing_keys - {"lm_head.weight"}, loading_info.unexpected_keys
        if not extra and len(lacks) == len(list(self.model.parameters())):
            return  # nothing was to be read: state_dict={} asks for new weights
        for what, names in (("lacks", lacks), ("has, which the model does not,", extra)):
            if names:
                raise ValueError(f"the checkpoint {what} {some(sorted(names))}; config.json is of another model")

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
        self.model.cache(cache, False)


def _recomputed(
    forward: Callable[..., Tensor], block: nn.Module, again: Callable[..., Any], x: Tensor, state: Any, span: Any
) -> Any:
    """forward(block, x, state, span), computed again in the backward pass."""
    if state is not None or not block.training or not torch.is_grad_enabled():
        return forward(block, x, state, span)  # with a state a second forward would write it twice
    return again(forward, block, x, state, span)
