"""int8 and int4 models: what is quantised, folders that hold them, the numbers they give and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import griffin
from griffin import Griffin, GriffinError, State
from griffin.fingerprint import of as fingerprint_of
from griffin.loss import cross_entropy
from griffin.quantize import KEY as QUANTIZATION
from griffin.quantize import Quantization, quantization, quantize, quantized_names

MakeModel = Callable[..., Griffin]
FORMS = [Quantization(8), *(Quantization(4, group) for group in (32, 64, 128))]


def tokens(model: Griffin, B: int, T: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (B, T))


def widened(model: Griffin) -> Griffin:
    """The floating-point model that a quantised one stands for."""
    twin = Griffin(model.config, activation_dtype=model.activation_dtype)
    values = dict(model.named_parameters())
    for name in quantized_names(twin):
        values[name] = model.get_submodule(name.removesuffix(".weight")).weight  # type: ignore[assignment]
    twin.load_state_dict({name: values[name] for name, _ in twin.named_parameters()})
    return twin.eval()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_model_is_its_widened_twin(make_model: MakeModel, form: Quantization, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    fp = make_model(dtype=dtype)
    assert quantize(model, form) is model
    twin = widened(model)
    ids = tokens(model, 2, 24)
    with torch.no_grad():
        expected, logits = twin.logits(twin(ids)), model.logits(model(ids))
        spread = expected.std()
        assert (logits - expected).abs().max() < (1e-3 if dtype == torch.float32 else 0.1) * spread
        assert (logits - fp.logits(fp(ids))).abs().mean() < (0.05 if form.bits == 8 else 0.5) * spread
        state, steps = model.new_state(2), []
        for t in range(ids.shape[1]):  # one token at a time: the kernels for few rows
            steps.append(model.logits(model(ids[:, t : t + 1], state)))
        assert (torch.cat(steps, dim=1) - expected).abs().max() < (1e-3 if dtype == torch.float32 else 0.1) * spread


def test_only_the_linears_and_the_embedding_are_quantised(make_model: MakeModel) -> None:
    model, before = make_model(), make_model().state_dict()
    names = quantized_names(model)
    quantize(model, "int4", group=32)
    after = model.state_dict()
    kept = {name for name in before if name not in names}
    assert {name for name in after if not name.endswith(("_q", "_scale"))} == kept
    assert {f"{name}{end}" for name in names for end in ("_q", "_scale")} == set(after) - kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert any("input_gate_weight" in name for name in kept)
    assert any("conv_1d" in name for name in kept)
    assert "model.embed_tokens.weight" in names
    assert not any(p.requires_grad for p in model.parameters())
    assert fingerprint_of(model) != fingerprint_of(make_model())
    changed = dict(model.named_parameters())["model.embed_tokens.weight_q"]
    before_change = fingerprint_of(model)
    changed[0, 0] ^= 1
    assert fingerprint_of(model) != before_change


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_loaded_and_quantised_while_loading_are_one(
    tmp_path: Path, make_model: MakeModel, form: Quantization, preset: str, dtype: torch.dtype
) -> None:
    model = make_model(preset, dtype=dtype)
    griffin.save(model, tmp_path / "original")
    griffin.save(quantize(model, form), tmp_path / "quantised")
    for found in (griffin.load(tmp_path / "quantised"), griffin.load(tmp_path / "original", quantize=form)):
        assert quantization(found) == form
        assert found.activation_dtype == dtype
        assert not found.training
        assert fingerprint_of(found) == fingerprint_of(model)
        assert found.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == found.state_dict()[name].dtype
            assert torch.equal(tensor, found.state_dict()[name]), name
    narrow = griffin.load(tmp_path / "quantised", dtype=torch.bfloat16)
    assert narrow.activation_dtype == torch.bfloat16
    scale = "model.embed_tokens.weight_scale"
    assert torch.equal(narrow.state_dict()[scale], model.state_dict()[scale])
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    assert config["model_type"] == "griffin"  # transformers must not read it as its own
    assert config[QUANTIZATION] == form.to_json()


def test_small_slabs_give_the_same(tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    griffin.save(model, tmp_path / "model")
    whole = griffin.load(tmp_path / "model", quantize="int4").state_dict()
    monkeypatch.setattr("griffin.checkpoint.read._SLAB_BYTES", 1000)
    monkeypatch.setattr("griffin.quantize._ROWS_BYTES", 700)
    seen: list[tuple[int, int]] = []
    slabs = griffin.load(tmp_path / "model", quantize="int4", progress=lambda *of: seen.append(of)).state_dict()
    assert all(torch.equal(whole[name], slabs[name]) for name in whole)
    assert seen[-1][0] == seen[-1][1] == sum(p.nbytes for p in model.parameters())


def test_states_and_losses_go_on_working(tmp_path: Path, make_model: MakeModel) -> None:
    model = quantize(make_model(), "int8")
    ids = tokens(model, 1, 12)
    with torch.no_grad():
        state = model.new_state(1)
        model(ids[:, :7], state)
        state.save(tmp_path / "state", model)
        again = State.load(tmp_path / "state", model)
        assert torch.equal(model(ids[:, 7:], again), model(ids[:, 7:], state))
        hidden = model(ids)
        nats, count = cross_entropy(hidden[:, :-1], model.embedding, ids[:, 1:], soft_cap=model.config.logits_soft_cap)
        log_p = model.logits(hidden[:, :-1]).log_softmax(-1)
        assert torch.allclose(nats, -log_p.gather(2, ids[:, 1:, None]).sum(), rtol=1e-4)
        assert count == 11


def test_moving_a_model_keeps_its_format(make_model: MakeModel) -> None:
    model = quantize(make_model(), "int8")
    scales = {name: p.clone() for name, p in model.named_parameters() if name.endswith("_scale")}
    model.to(torch.bfloat16)
    assert all(torch.equal(dict(model.named_parameters())[name], scale) for name, scale in scales.items())


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_gradients_are_those_of_the_widened_model(make_model: MakeModel, to: str) -> None:
    """What a quantised model is trained through: norms and biases here, adapters in tests/test_lora.py."""
    model = quantize(make_model(), to)
    wide = make_model()
    numbers = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            owner, _, leaf = name.rpartition(".")
            parameter.copy_(getattr(numbers[owner], leaf))
    ids = tokens(model, 2, 40)
    gradients = []
    for each in (model, wide):
        names = [name for name, _ in model.named_parameters() if name.endswith("bias") or "norm" in name]
        parameters = [each.get_parameter(name).requires_grad_(True) for name in names]
        hidden = each(ids)
        gradients.append(torch.autograd.grad((hidden**2).sum(), parameters))
    for found, wanted in zip(*gradients, strict=True):
        assert (found - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: quantize(m, "int3"), "quantize='int3' is not one of int8, int4"),
        (lambda m: quantize(m, "int8", group=64), "bits=8 with group=64 is not read"),
        (lambda m: quantize(m, "int4", group=48), "bits=4 with group=48 is not read; .*group 32, 64, 128"),
        (lambda m: quantize(quantize(m, "int8"), "int4"), "the model is int8 already; quantise the original"),
    ],
)
def test_wrong_formats(make_model: MakeModel, call: Callable[[Griffin], object], message: str) -> None:
    with pytest.raises(GriffinError, match=message):
        call(make_model())


def test_wrong_folders(tmp_path: Path, make_model: MakeModel) -> None:
    folder, name = tmp_path / "model", "model.final_norm.weight"
    griffin.save(quantize(make_model(), "int4", group=32), folder)
    with pytest.raises(GriffinError, match="is int4 already; quantise the original"):
        griffin.load(folder, quantize="int8")
    config, weights = (folder / "config.json").read_text(), load_file(folder / "model.safetensors")

    def refused(message: str, tensors: dict[str, Tensor] = weights, **keys: object) -> None:
        (folder / "config.json").write_text(json.dumps(json.loads(config) | keys))
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(GriffinError, match=message) as caught:
            griffin.load(folder)
        assert "\n" not in str(caught.value)

    refused("must be like", **{QUANTIZATION: "int4"})
    refused("must be like", **{QUANTIZATION: {"bits": 4, "group": 32, "zero": 1}})
    refused("bits=4 with group=7 is not read", **{QUANTIZATION: {"bits": 4, "group": 7}})
    refused(
        r"weight_q is \(259, 32\), but config.json says \(259, 32\)|weight_scale|_q is", **{QUANTIZATION: {"bits": 8}}
    )
    refused(f"{name} is int8; it must be one of F32, BF16, F16", weights | {name: weights[name].to(torch.int8)})
    q = "model.embed_tokens.weight_q"
    refused(f"{q} is int8; it must be uint8", weights | {q: weights[q].view(torch.int8)})
    refused(f"lacks {q}", {key: value for key, value in weights.items() if key != q})
    plain = json.loads(config)
    del plain[QUANTIZATION]
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(GriffinError, match="lacks"):
        griffin.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantising_while_loading_takes_the_quantised_size(tmp_path: Path, name: str) -> None:
    """A 286M-parameter bf16 folder (572 MB): the peak above the imports is the quantised model and 250 MB of slabs."""
    model = Griffin(griffin.PRESETS["griffin-100m"], dtype=torch.bfloat16)
    griffin.save(model, tmp_path / "model")
    size = sum(p.nbytes for p in quantize(model, name).parameters())
    code = (
        "import re, sys, griffin, torch\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\n"
        "model = griffin.load(sys.argv[1], quantize=sys.argv[2])\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), name]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 1.1 * size + 250e6


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_weight_that_is_not_finite_is_named(make_model: Callable[..., Griffin], form: str) -> None:
    model = make_model()
    model.model.layers[1].mlp_block.up_proj.weight.data[0, 0] = torch.inf
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(GriffinError, match=r"layers\.1\.mlp_block\.up_proj\.weight holds NaN or infinity"):
        quantize(model, form)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
