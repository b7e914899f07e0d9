"""GriffinConfig <-> the config.json of a Hugging Face folder, in every spelling found in released folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as brief  # what a file holds can be of any length, a message cannot
from typing import Any

from griffin.config import MOST_LAYERS, MOST_SIZE, GriffinConfig
from griffin.errors import GriffinError
from griffin.quantize import KEY as QUANTIZATION

# Architectures that transformers' RecurrentGemmaForCausalLM computes exactly get its model type; every other gets ours,
# which transformers refuses instead of computing something else.
HF_MODEL_TYPE, OWN_MODEL_TYPE = "recurrent_gemma", "griffin"

# How the weights are stored, {"bits": 8} or {"bits": 4, "group": 128}; griffin/quantize.py reads it.

# Keys whose one value is built in, or is the one that changes nothing: any other would be another model, or text of
# other tokens than we would choose.
_FIXED: Mapping[str, object] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "cross_attention_hidden_size": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "rope_scaling": None,
    "suppress_tokens": None,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
}
# Keys that change no weight's shape and no logit of ours: special tokens (the tokenizer has them), initialisation of
# another program, file provenance, transformers' own switches and, in dumps of its version 4, the settings of its
# generate(), which ours takes as arguments.
_WITHOUT_EFFECT = frozenset(
    """_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    auto_map bos_token_id cache_implementation chunk_size_feed_forward decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    final_w_init_variance_scale
    finetuning_task gradient_checkpointing id2label initializer_range is_decoder label2id length_penalty max_length
    max_position_embeddings min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache w_init_variance_scale""".split()  # noqa: SIM905
)
_ROPE_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor"}


def config_from_json(data: Mapping[str, Any], where: str) -> GriffinConfig:
    """Read a config.json that transformers, Google's converter or this project wrote.

    Args:
        data: the parsed JSON object.
        where: its file, for messages.

    Raises:
        GriffinError: another architecture, a missing, contradictory or unknown key, or a value that does not fit.
    """
    left = dict(data)

    def take(key: str, *default: Any) -> Any:
        if key not in left and not default:
            raise GriffinError(f"{where} has no {key!r}; it is not the config of a RecurrentGemma or Griffin model")
        return left.pop(key, *default)

    model_type = take("model_type", None)
    if model_type not in (HF_MODEL_TYPE, OWN_MODEL_TYPE):
        raise GriffinError(
            f"{where} is of model type {brief(model_type)}; griffin reads {HF_MODEL_TYPE!r} and {OWN_MODEL_TYPE!r}"
        )
    if (method := left.get("quantization_config")) is not None:
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise GriffinError(
            f"{where}: weights quantised by {brief(method)} are not read; use the bf16 original of this model"
        )
    for key, value in _FIXED.items():
        if (found := left.pop(key, value)) != value:
            raise GriffinError(f"{where}: {key}={brief(found)} is not supported; only {value!r} is")
    for key in (*_WITHOUT_EFFECT, QUANTIZATION):
        left.pop(key, None)

    heads, layers = take("num_attention_heads"), take("num_hidden_layers")
    width, wide, head_dim = take("hidden_size"), take("intermediate_size"), take("head_dim", None)
    named = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
    for key, value in (named | ({} if head_dim is None else {"head_dim": head_dim})).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GriffinError(f"{where}: {key}={brief(value)} must be a positive whole number")
        if value > (most := MOST_LAYERS if key == "num_hidden_layers" else MOST_SIZE):
            raise GriffinError(f"{where}: {key}={brief(value)} is more than {most}")
    if isinstance(wide, bool) or not isinstance(wide, int) or wide < 2 or wide % 2:
        raise GriffinError(
            f"{where}: intermediate_size={brief(wide)} must be even: it is twice the width of one MLP branch"
        )
    if head_dim is not None and head_dim * heads != width:
        raise GriffinError(f"{where}: head_dim={head_dim} times num_attention_heads={heads} is not hidden_size={width}")

    rope = {} if (found := take("rope_parameters", None)) is None else found
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or rope.keys() - _ROPE_KEYS:
        raise GriffinError(
            f"{where}: rope_parameters={brief(rope)} is not supported; only rope_type 'default' with rope_theta and "
            "partial_rotary_factor is"
        )
    for key in rope.keys() & {"rope_theta", "partial_rotary_factor"}:
        if left.get(key, rope[key]) != rope[key]:
            raise GriffinError(f"{where}: {key}={brief(left[key])} and {brief(rope[key])} in rope_parameters disagree")
    if not isinstance(by_sqrt := take("embeddings_scale_by_sqrt_dim", True), bool):
        raise GriffinError(f"{where}: embeddings_scale_by_sqrt_dim={brief(by_sqrt)} must be true or false")
    own_scale = take("embedding_scale", scale := "bf16" if by_sqrt else "none")
    if (own_scale == "none") != (scale == "none") and "embeddings_scale_by_sqrt_dim" in data:
        raise GriffinError(f"{where}: embedding_scale={brief(own_scale)} contradicts embeddings_scale_by_sqrt_dim")
    cap = take("logits_soft_cap", 30.0)
    fields = {
        "vocab_size": take("vocab_size"),
        "width": width,
        "mlp_width": wide // 2,
        "lru_width": width if (lru_width := take("lru_width", None)) is None else lru_width,
        "num_heads": heads,
        # Missing means 1, as released; null is transformers' own default, one per query head.
        "num_kv_heads": heads if (kv := take("num_key_value_heads", 1)) is None else kv,
        "num_gate_blocks": take("num_gate_blocks", heads),
        "block_types": _block_types(where, left, layers),
        "window": _one(where, left, {"attention_window_size": None, "sliding_window": None}, 2048),
        "conv_width": take("conv1d_width", 4),
        "rms_norm_eps": take("rms_norm_eps", 1e-6),
        "rope_base": take("rope_theta", rope.get("rope_theta", 10_000.0)),
        "rope_fraction": take("partial_rotary_factor", rope.get("partial_rotary_factor", 0.5)),
        "embedding_scale": own_scale,
        "logits_soft_cap": None if cap == 0 and cap is not False else cap,  # 0 is Google's word for none
        "max_sqrt_gradient": take("max_sqrt_gradient", 1000.0),
        "unscaled_first_token": take("unscaled_first_token", True),
        "complex_recurrence": take("complex_recurrence", False),
        "init": take("init", "recurrentgemma"),
    }
    if left:
        raise GriffinError(
            f"{where} has keys this version does not understand: {_some(sorted(left))}; "
            "remove them if they change nothing, or use the version of griffin that wrote them"
        )
    try:
        return GriffinConfig(**fields)
    except ValueError as error:
        raise GriffinError(f"{where}: {error}") from error


def config_to_json(
    config: GriffinConfig,
    *,
    dtype: str,
    special_ids: Mapping[str, int | None],
    quantization: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Write the config in transformers' keys, with ours beside them for what its config cannot say.

    Args:
        config: the architecture.
        dtype: of the weights, as "bfloat16".
        special_ids: bos_token_id, eos_token_id and pad_token_id.
        quantization: of the weights; transformers does not know it and must not open them.
    """
    standard = is_standard(config) and quantization is None
    stored = {} if quantization is None else {QUANTIZATION: dict(quantization)}
    return {
        "architectures": ["RecurrentGemmaForCausalLM" if standard else "Griffin"],
        "model_type": HF_MODEL_TYPE if standard else OWN_MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_window_size": config.window,
        "block_types": list(config.block_types),
        "conv1d_width": config.conv_width,
        "dtype": dtype,
        "embedding_scale": config.embedding_scale,
        "embeddings_scale_by_sqrt_dim": config.embedding_scale != "none",
        "final_w_init_variance_scale": 2.0 / config.num_layers,
        "head_dim": config.head_width,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": config.width,
        "init": config.init,
        "intermediate_size": 2 * config.mlp_width,
        "logits_soft_cap": config.logits_soft_cap,
        "lru_width": config.lru_width,
        "max_sqrt_gradient": config.max_sqrt_gradient,
        "num_attention_heads": config.num_heads,
        "num_gate_blocks": config.num_gate_blocks,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {
            "partial_rotary_factor": config.rope_fraction,
            "rope_theta": config.rope_base,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "unscaled_first_token": config.unscaled_first_token,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "w_init_variance_scale": 0.01,
        **({"complex_recurrence": True} if config.complex_recurrence else {}),
        **stored,
        **special_ids,
    }


def is_standard(config: GriffinConfig) -> bool:
    """Whether transformers' RecurrentGemmaForCausalLM computes this architecture (but for its window, one shorter)."""
    return (
        config.window is not None
        and config.num_gate_blocks == config.num_heads
        and config.embedding_scale == "bf16"
        and config.logits_soft_cap is not None
        and config.unscaled_first_token
        and not config.complex_recurrence
    )


def _block_types(where: str, left: dict[str, Any], num_layers: int) -> tuple[str, ...]:
    """Write out the repeating pattern, from whichever of its keys are there."""
    kinds = {"linear_attention": "recurrent", "sliding_attention": "attention"}  # transformers 5's layer types

    def written_out(pattern: Any) -> tuple[str, ...]:
        if not isinstance(pattern, list) or not pattern or not all(isinstance(kind, str) for kind in pattern):
            raise GriffinError(f"{where}: block_types={brief(pattern)} must be a list of 'recurrent' and 'attention'")
        pattern = [kinds.get(kind, kind) for kind in pattern]
        return tuple(pattern[index % len(pattern)] for index in range(num_layers))

    keys = ("block_types", "_block_types", "layers_block_type", "layer_types")
    found = _one(where, left, dict.fromkeys(keys, written_out), None)
    if found is None:
        raise GriffinError(f"{where} has neither 'block_types' nor '_block_types': which layers are recurrent?")
    return found


def _one(where: str, left: dict[str, Any], spellings: Mapping[str, Callable[[Any], Any] | None], default: Any) -> Any:
    """Take all spellings of one thing; they must agree."""
    found = {key: (read or (lambda value: value))(left.pop(key)) for key, read in spellings.items() if key in left}
    if len({repr(value) for value in found.values()}) > 1:
        raise GriffinError(f"{where}: {' and '.join(f'{key}={brief(value)}' for key, value in found.items())} disagree")
    return next(iter(found.values()), default)


def _some(names: list[str]) -> str:
    return ", ".join(name[:60] for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
