"""TrainConfig: its checks, its JSON, and changing fields from the command line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from griffin import PRESETS, Griffin
from griffin.errors import GriffinError
from griffin.train.config import TrainConfig, config_from_json, override
from griffin.train.optim import decays, learning_rate, make_optimizer

CONFIG = TrainConfig(model=PRESETS["griffin-tiny"], train_data="a.txt", tokenizer="bytes", steps=100, warmup_steps=10)


def test_json_round_trip() -> None:
    for config in (CONFIG, replace(CONFIG, model=None, init_from="m", threads=2, dtype="bf16", tensorboard=True)):
        assert config_from_json(config.to_json(), "run/config.json") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"run/config\.json is not JSON"),
        ("[]", r"run/config\.json is not the config of a training run"),
        ('{"model": null, "steps": 3}', "train_data"),
        (CONFIG.to_json().replace('"steps"', '"stops"'), "stops"),
        (CONFIG.to_json().replace('"steps": 100', '"steps": 0'), "steps=0 must be at least 1"),
    ],
)
def test_json_that_is_no_config_is_refused(text: str, message: str) -> None:
    with pytest.raises(GriffinError, match=message):
        config_from_json(text, "run/config.json")


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (["steps=500"], {"steps": 500}),
        (["learning_rate=1e-3", "threads=2"], {"learning_rate": 1e-3, "threads": 2}),
        (["threads=none", "validation_data=b.txt"], {"threads": None, "validation_data": "b.txt"}),
        (["betas=0.8, 0.9"], {"betas": (0.8, 0.9)}),
        (["tensorboard=true", "dtype=bf16"], {"tensorboard": True, "dtype": "bf16"}),
        (["sample_prompt=a=b"], {"sample_prompt": "a=b"}),
        (["steps=5", "warmup_steps=1"], {"steps": 5, "warmup_steps": 1}),  # steps=5 alone would be refused
        (["steps=5", "warmup_steps=none"], {"steps": 5, "warmup_steps": None}),
    ],
)
def test_override(settings: list[str], changes: dict[str, object]) -> None:
    assert override(CONFIG, settings) == replace(CONFIG, **changes)  # type: ignore[arg-type]


def test_override_of_the_model() -> None:
    settings = ["model.width=44", "model.num_heads=11", "model.rope_fraction=0.5", "model.block_types=attention"]
    settings += ["model.window=none"]
    model = override(CONFIG, settings).model
    assert model is not None
    assert (model.width, model.num_heads, model.block_types, model.window) == (44, 11, ("attention",), None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "write NAME=VALUE"),
        ("stesp=3", "TrainConfig has no field 'stesp'; did you mean steps"),
        ("model.widht=3", "GriffinConfig has no field 'widht'; did you mean width"),
        ("zzz=3", "there are model, train_data"),
        ("steps=3.5", "'3.5' is not a whole number"),
        ("learning_rate=fast", "'fast' is not a number"),
        ("tensorboard=yes", "neither true nor false"),
        ("dtype=fp8", "not one of fp32, bf16"),
        ("steps.x=3", "steps has no fields here"),
        ("model=tiny", "set its fields one by one"),
        ("steps=-1", "steps=-1 must be at least 1"),
        ("steps=10", "warmup_steps=10 must be below steps=10: set it lower, or to none"),
        ("seed=99999999999999999999999", "seed=99999999999999999999999 must be below 2\\^63"),
        ("steps=9223372036854775808", "must be below 2\\^63"),
        ("threads=9223372036854775808", "must be below 2\\^63"),
        ("steps=" + "9" * 5000, "is not a whole number"),
        ("learning_rate=1e999", "learning_rate=inf must be positive"),
        ("model.num_heads=5", "width=32 is not a multiple of num_heads=5"),
        ("learning_rate=nan", "learning_rate=nan must be positive"),
        ("betas=0.9", "two numbers"),
        ("min_learning_rate=2", "a fraction of learning_rate"),
        ("tokenizer=none", "only with init_from"),
    ],
)
def test_a_bad_setting_is_refused_with_its_reason(setting: str, message: str) -> None:
    with pytest.raises(GriffinError, match=message):
        override(CONFIG, [setting])


def test_schedule() -> None:
    config = replace(CONFIG, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(10 + 89 // 2, config) == pytest.approx(0.55, abs=0.01)  # half way down
    assert learning_rate(0, replace(config, warmup_steps=0)) == 1.0


# The whole truth, by name: what a layer has besides its norms. The rest does not decay.
DECAYS = {
    "temporal_block.linear_x.weight",
    "temporal_block.linear_y.weight",
    "temporal_block.linear_out.weight",
    "temporal_block.q_proj.weight",
    "temporal_block.k_proj.weight",
    "temporal_block.v_proj.weight",
    "temporal_block.o_proj.weight",
    "mlp_block.gate_proj.weight",
    "mlp_block.up_proj.weight",
    "mlp_block.down_proj.weight",
}
DOES_NOT = {
    "temporal_pre_norm.weight",
    "channel_pre_norm.weight",
    "temporal_block.linear_x.bias",
    "temporal_block.linear_y.bias",
    "temporal_block.linear_out.bias",
    "temporal_block.conv_1d.weight",
    "temporal_block.conv_1d.bias",
    "temporal_block.rg_lru.recurrent_param",
    "temporal_block.rg_lru.input_gate_weight",
    "temporal_block.rg_lru.input_gate_bias",
    "temporal_block.rg_lru.recurrent_gate_weight",
    "temporal_block.rg_lru.recurrent_gate_bias",
    "temporal_block.o_proj.bias",
    "mlp_block.gate_proj.bias",
    "mlp_block.up_proj.bias",
    "mlp_block.down_proj.bias",
}


def test_weight_decay_by_name() -> None:
    model = Griffin(PRESETS["griffin-tiny"], device="meta")
    names = [name for name, _ in model.named_parameters()]
    in_layers = {name.split(".", 3)[3]: name for name in names if ".layers." in name}
    assert in_layers.keys() == DECAYS | DOES_NOT
    assert {suffix for suffix, name in in_layers.items() if decays(name)} == DECAYS
    assert {name for name in names if ".layers." not in name and decays(name)} == set()

    model.model.embed_tokens.weight.requires_grad = False
    optimizer = make_optimizer(model.named_parameters(), CONFIG)
    by_parameter = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert by_parameter == {
        parameter: 0.1 if decays(name) else 0.0
        for name, parameter in model.named_parameters()
        if "embed_tokens" not in name
    }


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (12, 6), (99, 49), (100, 50), (1200, 50)])
def test_a_warm_up_that_nobody_set_follows_the_steps(steps: int, warmup: int) -> None:
    config = replace(CONFIG, steps=steps, warmup_steps=None)
    assert config.warmup == warmup
    assert replace(config, steps=1000).warmup == 50  # it was not fixed at birth
    rates = [learning_rate(step, config) for step in range(steps)]
    assert rates.index(max(rates)) == warmup
    assert rates[warmup] == config.learning_rate
