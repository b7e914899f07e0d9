"""Presets, exact parameter counts, and what a config refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from griffin import PRESETS, Griffin, GriffinConfig
from griffin.checkpoint.config_json import config_from_json, config_to_json

# Parameters without the embedding: (Transformer, Hawk, Griffin). Their rounded values are those of the paper's Table 2
# shapes with 16 gate blocks and the released code's biases.
NON_EMBEDDING = {
    "100m": (80_308_992, 93_801_216, 89_303_808),
    "200m": (141_681_664, 173_716_480, 163_038_208),
    "400m": (316_331_520, 374_773_248, 355_292_672),
    "1.3b": (1_120_372_736, 1_304_225_792, 1_242_941_440),
    "3b": (2_511_031_296, 2_996_456_448, 2_834_648_064),
    "7b": (5_940_449_280, 7_176_425_472, 6_790_182_912),
    "14b": (None, None, 13_763_941_376),
}


def count(name: str) -> int:
    return sum(parameter.numel() for parameter in Griffin(PRESETS[name], device="meta").parameters())


@pytest.mark.parametrize("size", NON_EMBEDDING)
def test_paper_sizes_have_the_exact_number_of_parameters(size: str) -> None:
    for family, expected in zip(("transformer", "hawk", "griffin"), NON_EMBEDDING[size], strict=True):
        if expected is not None:
            config = PRESETS[f"{family}-{size}"]
            assert count(f"{family}-{size}") - config.vocab_size * config.width == expected


@pytest.mark.parametrize(
    ("name", "total"), [("recurrentgemma-2b", 2_682_862_080), ("recurrentgemma-9b", 8_579_977_216)]
)
def test_released_sizes_have_the_exact_number_of_parameters(name: str, total: int) -> None:
    assert count(name) == total


@pytest.mark.parametrize("name", PRESETS)
def test_num_parameters_is_the_sum_over_the_model(name: str) -> None:
    assert PRESETS[name].num_parameters() == count(name)


def test_families_have_the_paper_s_layers() -> None:
    assert PRESETS["griffin-7b"].block_types.count("recurrent") == 22  # 32 layers: ten times R R A, then R R
    assert PRESETS["griffin-7b"].block_types[-1] == "recurrent"
    assert set(PRESETS["hawk-7b"].block_types) == {"recurrent"}
    assert set(PRESETS["transformer-7b"].block_types) == {"attention"}
    assert PRESETS["transformer-7b"].window is None
    assert [i for i, kind in enumerate(PRESETS["recurrentgemma-2b"].block_types) if kind == "attention"] == list(
        range(2, 24, 3)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 33}, "width=33 is not a multiple of num_heads=4"),
        ({"lru_width": 50}, "lru_width=50 is not a multiple of num_gate_blocks=4"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"window": 0}, "window=0 must be a positive whole number"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"block_types": ()}, "block_types is empty"),
        ({"block_types": ("recurrent", "mamba")}, "block_types\\[1\\]='mamba'"),
        ({"rope_fraction": 0.3}, "rotates"),
        ({"rope_fraction": 2.0}, "not in \\[0, 1\\]"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0 must be positive"),
        ({"init": "xavier"}, "init='xavier'"),
        ({"embedding_scale": "fp8"}, "embedding_scale='fp8'"),
        ({"vocab_size": 2**62}, "vocab_size=4611686018427387904 is more than 2147483647"),
        ({"window": 2**64}, "window=18446744073709551616 is more than 2147483647"),
        ({"vocab_size": 2**31 - 1, "width": 2**24}, "4e\\+16 parameters, more than 1e\\+15"),
        ({"block_types": 10_001 * ("recurrent",)}, "10001 layers are more than 10000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be positive and within float32"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be positive and within float32"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps=1000+\.\.\.0+ must be positive and within float32"),
        ({"rope_base": float("inf")}, "rope_base=inf must be positive and within float32"),
        ({"rope_base": True}, "rope_base=True must be a number"),
        ({"rope_fraction": float("nan")}, "not in \\[0, 1\\]"),
        ({"rope_fraction": "half"}, "rope_fraction='half'"),
        ({"logits_soft_cap": 10**400}, r"logits_soft_cap=1000+\.\.\.0+ must be positive"),
        ({"logits_soft_cap": []}, r"logits_soft_cap=\[\] must be a number, or None"),
        ({"max_sqrt_gradient": float("inf")}, "max_sqrt_gradient=inf must be positive"),
        ({"unscaled_first_token": "no"}, "unscaled_first_token='no' must be true or false"),
    ],
)
def test_a_wrong_config_names_the_field_and_the_numbers(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["griffin-tiny"], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    data = config_to_json(PRESETS[name], dtype="bfloat16", special_ids={"bos_token_id": 2})
    assert config_from_json(data, "config.json") == PRESETS[name]


# The config.json of google/recurrentgemma-2b and -9b as published, and a re-save by transformers 5.
RELEASED_2B = {
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_window_size": 2048,
    "bos_token_id": 2,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "eos_token_id": 1,
    "final_w_init_variance_scale": 0.07692307692307693,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 15360,
    "logits_soft_cap": 30.0,
    "lru_width": 2560,
    "model_type": "recurrent_gemma",
    "num_attention_heads": 10,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
    "w_init_variance_scale": 0.01,
}


def spelling(**changes: object) -> dict[str, object]:
    return {key: value for key, value in (RELEASED_2B | changes).items() if value is not ...}


@pytest.mark.parametrize(
    "data",
    [
        spelling(),
        spelling(block_types=["recurrent", "recurrent", "attention"]),  # derived saves have both
        spelling(
            _block_types=..., block_types=["recurrent", "recurrent", "attention"], embeddings_scale_by_sqrt_dim=...
        ),
        spelling(
            rope_theta=...,
            partial_rotary_factor=...,
            rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
            torch_dtype=...,
            dtype="bfloat16",
        ),
        spelling(lru_width=None, num_key_value_heads=..., attention_window_size=..., sliding_window=2048),
    ],
)
def test_every_released_spelling_is_the_2b_preset(data: dict[str, object]) -> None:
    assert config_from_json(data, "config.json") == PRESETS["recurrentgemma-2b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (spelling(model_type="llama"), "model type 'llama'"),
        (spelling(hidden_size=...), "no 'hidden_size'"),
        (spelling(hidden_size="2560"), "hidden_size='2560' must be a positive whole number"),
        (spelling(frobnicate=1, zap=2), "does not understand: frobnicate, zap"),
        (spelling(quantization_config={"quant_method": "bitsandbytes"}), "quantised by 'bitsandbytes'"),
        (spelling(hidden_activation="relu"), "hidden_activation='relu' is not supported"),
        (spelling(attention_bias=True), "attention_bias=True"),
        (spelling(tie_word_embeddings=False), "tie_word_embeddings=False"),
        (spelling(block_types=["attention"]), "disagree"),
        (spelling(_block_types=...), "block_types"),
        (spelling(_block_types=["mamba"]), "mamba"),
        (spelling(head_dim=128), "head_dim=128"),
        (spelling(intermediate_size=7681), "intermediate_size=7681 must be even"),
        (spelling(embedding_scale="none"), "contradicts"),
        (spelling(rope_theta="x"), "must be a number"),
        (spelling(num_attention_heads=7), "num_attention_heads=7"),
        (spelling(logits_soft_cap=[]), r"logits_soft_cap=\[\] must be a number"),
        (spelling(logits_soft_cap=""), "logits_soft_cap='' must be a number"),
        (spelling(logits_soft_cap=False), "logits_soft_cap=False must be a number"),
        (spelling(rms_norm_eps=float("inf")), "rms_norm_eps=inf"),
        (spelling(head_dim={}), r"head_dim=\{\} must be a positive whole number"),
        (spelling(head_dim=256.0), r"head_dim=256\.0 must be a positive whole number"),
        (spelling(num_hidden_layers=10**9), "num_hidden_layers=1000000000 is more than 10000"),
        (spelling(vocab_size=10**400), "vocab_size=1000"),
        (spelling(intermediate_size=True), "intermediate_size=True"),
        (spelling(unscaled_first_token=[]), r"unscaled_first_token=\[\]"),
        (spelling(embeddings_scale_by_sqrt_dim="no"), "embeddings_scale_by_sqrt_dim='no' must be true or false"),
        (spelling(rope_parameters=[]), r"rope_parameters=\[\] is not supported"),
        (spelling(rope_parameters={"rope_theta": 10000.0, "factor": 8.0}), "rope_parameters=.* is not supported"),
        (
            spelling(rope_parameters={"rope_theta": 500000.0}),
            r"rope_theta=10000\.0 and 500000\.0 in rope_par.* disagree",
        ),
        (spelling(pruned_heads={"0": [1]}), "pruned_heads="),
        (spelling(suppress_tokens=[5]), r"suppress_tokens=\[5\] is not supported"),
        (spelling(bad_words_ids=[[5]]), "bad_words_ids="),
        (spelling(quantization_config={}), "quantised by None"),
        (spelling(**{f"key{number}" * 30: 0 for number in range(5000)}), "and 4992 more; remove them"),
        (spelling(hidden_activation="relu" * 5000), "hidden_activation='relu"),
    ],
)
def test_a_config_json_that_does_not_fit_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config_from_json(data, "config.json")
    assert len(str(caught.value)) < 800


# What transformers 4 adds to config.json when it dumps the whole of it: every field of its PretrainedConfig.
WHOLE_DUMP = {
    "_attn_implementation_autoset": False,
    "_commit_hash": "1234abcd",
    "_name_or_path": "google/recurrentgemma-2b",
    "add_cross_attention": False,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "cache_implementation": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "quantization_config": None,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}


def test_keys_that_change_nothing_are_passed_over() -> None:
    """A whole dump of transformers 4.46, each key of it alone, and one of the version that is installed."""
    assert config_from_json(spelling(**WHOLE_DUMP), "config.json") == PRESETS["recurrentgemma-2b"]
    for key, value in WHOLE_DUMP.items():
        assert config_from_json(spelling(**{key: value}), "config.json") == PRESETS["recurrentgemma-2b"]
    changed = spelling(do_sample=True, max_length=200, cache_implementation="static", tokenizer_class="GemmaTokenizer")
    assert config_from_json(changed, "config.json") == PRESETS["recurrentgemma-2b"]
    transformers = pytest.importorskip("transformers")
    dumped = transformers.RecurrentGemmaConfig(num_key_value_heads=1, intermediate_size=15360).to_dict()
    assert config_from_json(dumped, "config.json") == PRESETS["recurrentgemma-2b"]


def test_a_config_is_frozen_and_knows_no_hardware() -> None:
    names = set(GriffinConfig.__dataclass_fields__)
    assert not names & {"dtype", "device", "backend", "kernel", "compile", "quantize"}
    with pytest.raises(AttributeError):
        PRESETS["griffin-tiny"].width = 3  # type: ignore[misc]
