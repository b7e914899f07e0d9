"""Adapters: what they change, over which weights, and PEFT's files both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import griffin
from griffin import Griffin, lora
from griffin.errors import GriffinError
from griffin.lora import LoRA
from griffin.quantize import quantize
from griffin.train.objective import LanguageModel
from griffin.train.step import take_step
from tests.test_transformers import SHAPES, twins
from tests.train.batch import batch_of

MakeModel = Callable[..., Griffin]
KINDS = {
    "plain": LoRA(rank=4, alpha=8),
    "rslora": LoRA(rank=4, alpha=3, rslora=True),
    "some": LoRA(rank=2, alpha=8, targets=("linear_x", "0.mlp_block.up_proj", "q_proj")),
    "gates": LoRA(rank=3, alpha=9, gates=True),
    "only gates": LoRA(rank=3, alpha=9, targets=(), gates=True),
}


def moved(model: Griffin, seed: int = 1, size: float = 0.3) -> None:
    """Give adapters numbers that change the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.adapters(model).values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def ids(model: Griffin, B: int = 2, T: int = 30) -> Tensor:
    return torch.randint(1, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Griffin, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged_and_off_is_the_model(make_model: MakeModel, kind: str) -> None:
    model = make_model()
    tokens = ids(model)
    before = logits(model, tokens)
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    coverage = lora.add(model, KINDS[kind])
    assert torch.equal(logits(model, tokens), before)  # B is zero
    assert coverage.parameters == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert coverage.of_parameters == sum(each.numel() for each in own.values())
    moved(model)
    changed = logits(model, tokens)
    assert (changed - before).abs().max() > 0.1
    with lora.off(model):
        assert torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), changed)
    state = model.new_state(2)
    with torch.no_grad():
        parts = [model.logits(model(piece, state)) for piece in tokens.split([11, 1, 18], dim=1)]
    assert_close(torch.cat(parts, dim=1), changed, rtol=1e-4, atol=1e-4)
    lora.merge(model)
    assert lora.adapted(model) is None
    assert dict(model.named_parameters()).keys() == own.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (logits(model, tokens) - changed).abs().max() <= 1e-5 * changed.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_merging_in_fp64_rounds_nothing(make_model: MakeModel, kind: str) -> None:
    model = make_model(dtype=torch.float64)
    tokens = ids(model)
    lora.add(model, KINDS[kind])
    moved(model)
    changed = logits(model, tokens)
    assert_close(logits(lora.merge(model), tokens), changed, rtol=1e-10, atol=1e-10)


def test_the_scale_and_the_change_are_as_written(make_model: MakeModel) -> None:
    for how, scale in ((KINDS["plain"], 2.0), (KINDS["rslora"], 1.5)):
        model = make_model(dtype=torch.float64)
        lora.add(model, how)
        moved(model)
        module = model.blocks[0].mlp_block.up_proj
        x = torch.randn(3, module.base.weight.shape[1], dtype=torch.float64)
        a, b = module.lora_a.double(), module.lora_b.double()
        wanted = x @ module.base.weight.T + module.base.bias + scale * (x @ a.T) @ b.T
        assert_close(module(x), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "gates"])
@pytest.mark.parametrize("base", ["fp32", "int8", "int4"])
def test_only_adapters_are_trained(make_model: MakeModel, kind: str, base: str) -> None:
    model = make_model()
    if base != "fp32":
        quantize(model, base)
    lora.add(model, KINDS[kind])
    names = lora.adapters(model).keys()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=1e-2, weight_decay=0.1
    )
    losses = [take_step(model, LanguageModel(), optimizer, [batch_of(model)], 1.0).loss for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in names), name


@pytest.mark.parametrize("base", ["int8", "int4"])
def test_gradients_over_a_quantised_base_are_those_over_the_widened_one(make_model: MakeModel, base: str) -> None:
    model = quantize(make_model(), base)
    wide = make_model()
    with torch.no_grad():
        numbers = dict(model.named_modules())
        for name, parameter in wide.named_parameters():
            owner, _, leaf = name.rpartition(".")
            parameter.copy_(getattr(numbers[owner], leaf))
    gradients = []
    for each in (model, wide):
        lora.add(each, KINDS["gates"])
        moved(each, size=0.1)  # as training leaves them; larger ones magnify the rounding of x that ops.quantized tells
        names = list(lora.adapters(each))
        loss = LanguageModel().loss(each, batch_of(each))
        gradients.append(torch.autograd.grad(loss, list(lora.adapters(each).values())))
    for name, found, wanted in zip(names, *gradients, strict=True):
        assert (found - wanted).norm() <= 1e-3 * wanted.norm(), name


def test_bf16_weights_below(make_model: MakeModel) -> None:
    """The base in bf16 with fp32 adapters and activations: the gradient is the widened base's."""
    narrow, wide = make_model().bfloat16(), make_model().bfloat16().float()
    narrow.activation_dtype = torch.float32
    gradients = []
    for each in (narrow, wide):
        lora.add(each, KINDS["plain"])
        moved(each)
        loss = LanguageModel().loss(each, batch_of(each))
        gradients.append(torch.autograd.grad(loss, list(lora.adapters(each).values())))
        assert all(parameter.dtype == torch.float32 for parameter in lora.adapters(each).values())
    for found, wanted in zip(*gradients, strict=True):
        assert (found - wanted).norm() <= 1e-3 * wanted.norm()


def test_dropout_is_for_training_only(make_model: MakeModel) -> None:
    model = make_model()
    lora.add(model, LoRA(rank=4, dropout=0.5))
    moved(model)
    tokens = ids(model)
    whole = logits(model.eval(), tokens)
    assert torch.equal(logits(model.train(), tokens), whole)
    assert (model.logits(model(tokens)) - whole).abs().max() > 0.1
    assert (model.eval().logits(model(tokens)) - whole).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: lora.add(m, LoRA(targets=("q_proj", "nonexistent"))), "target 'nonexistent' matches no linear"),
        (lambda m: (lora.add(m, LoRA()), lora.add(m, LoRA())), "the model has an adapter already"),
        (lambda m: LoRA(rank=0), "rank=0 must be at least 1"),
        (lambda m: LoRA(targets=()), "LoRA has no targets"),
        (lambda m: LoRA(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
        (lambda m: (lora.add(quantize(m, "int8"), LoRA()), lora.merge(m)), "is quantised, and an adapter cannot be"),
        (lambda m: (lora.add(m, LoRA()), griffin.save(m, "never")), "the model has an adapter: lora.merge it first"),
    ],
)
def test_what_is_refused(make_model: MakeModel, call: Callable[[Griffin], object], message: str) -> None:
    with pytest.raises(GriffinError, match=message):
        call(make_model())


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back(make_model: MakeModel, tmp_path: Path, kind: str) -> None:
    model = make_model()
    griffin.save(model, tmp_path / "model")
    tokens = ids(model)
    lora.add(model, KINDS[kind])
    moved(model)
    (tmp_path / "adapter").mkdir()
    lora.write_adapter(model, tmp_path / "adapter", str(tmp_path / "model"))
    adapter = lora.read_adapter(tmp_path / "adapter")
    assert set(adapter.lora.targets) == set(KINDS[kind].targets)
    assert (adapter.lora.scale, adapter.lora.gates) == (KINDS[kind].scale, KINDS[kind].gates)
    merged = griffin.load(tmp_path / "model", adapter=tmp_path / "adapter")
    assert lora.adapted(merged) is None
    changed = logits(model, tokens)
    assert (logits(merged, tokens) - changed).abs().max() <= 1e-5 * changed.abs().max()
    quantised = griffin.load(tmp_path / "model", quantize="int8", adapter=tmp_path / "adapter")
    # Linears keep theirs beside them; of gates, which are not quantised, nothing is left to do.
    assert (lora.adapted(quantised) is None) == (kind == "only gates")
    assert not any(parameter.requires_grad for name, parameter in quantised.named_parameters() if "lora" not in name)
    difference = (logits(quantised, tokens) - logits(model, tokens)).abs().max()
    assert difference < 0.5
    for generated in griffin.generate(quantised, griffin.Tokenizer.bytes(), [[5, 6]], max_tokens=3, temperature=0):
        assert len(generated.tokens) == 3


@pytest.mark.filterwarnings("ignore")  # of peft
@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_ours_and_we_open_peft_s(tmp_path: Path, kind: str) -> None:
    """Equal logits with `peft` on the `transformers` model, whichever wrote the files."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    how = KINDS[kind]
    ours, theirs = twins(SHAPES[0])
    ours.requires_grad_(True)
    tokens = ids(ours)
    griffin.save(ours, tmp_path / "model")
    lora.add(ours, how)
    moved(ours)
    (tmp_path / "ours").mkdir()
    lora.write_adapter(ours, tmp_path / "ours", None)
    theirs.eval()
    with torch.no_grad():
        plain = theirs(tokens).logits
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
        found = adapted(tokens).logits
    assert (found - plain).abs().max() > 0.05
    assert_close(found, logits(ours, tokens), rtol=1e-4, atol=1e-4)

    _, again = twins(SHAPES[0])
    again.load_state_dict({name: each.detach() for name, each in adapted.unload().state_dict().items()})
    config = peft.LoraConfig(
        r=how.rank,
        lora_alpha=how.alpha,
        use_rslora=how.rslora,
        target_modules=list(how.targets) or None,
        target_parameters=[f"rg_lru.{name}" for name in lora.GATES] if how.gates else None,
    )
    other = peft.get_peft_model(again, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        wanted = other(tokens).logits
    other.save_pretrained(tmp_path / "theirs")
    merged = griffin.load(tmp_path / "model", adapter=tmp_path / "theirs")
    assert_close(logits(merged, tokens), wanted, rtol=1e-4, atol=1e-4)


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / lora.CONFIG).read_text())
        (folder / lora.CONFIG).write_text(json.dumps(data | changes))

    return change


def _tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / lora.WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / lora.WEIGHTS)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_config(peft_type="LOHA"), "is of kind 'LOHA'; LoRA adapters are read"),
        (_config(use_dora=True), "use_dora=True is not computed here"),
        (_config(rank_pattern={"q_proj": 4}), "rank_pattern=.* is not computed here"),
        (_config(bias="all"), "bias='all' is not computed here"),
        (_config(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the weights below"),
        (_config(target_modules="all-linear"), "target_modules='all-linear' is a pattern"),
        (_config(r="many"), "is not the config of a LoRA adapter"),
        (_config(r=8), r"lora_A\.weight is \(4, .*, and this model needs \(8, "),
        (_config(target_modules=["q_proj"]), "has 'base_model.* with the targets of .* does not have"),
        (_tensors(lambda t: t.pop(min(t))), "lacks 'base_model.model.model.layers.0"),
        (_tensors(lambda t: t.update(x=torch.ones(2))), "has '.*', which this model"),
        (_tensors(lambda t: t[min(t)].fill_(torch.nan)), "holds NaN or infinity"),
        (lambda folder: (folder / lora.WEIGHTS).unlink(), "adapter_model.safetensors does not exist"),
        (lambda folder: (folder / lora.CONFIG).unlink(), "adapter_config.json does not exist; give the folder of a"),
    ],
)
def test_files_that_do_not_fit(
    make_model: MakeModel, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    model = make_model()
    griffin.save(model, tmp_path / "model")
    lora.add(model, KINDS["plain"])
    (tmp_path / "adapter").mkdir()
    lora.write_adapter(model, tmp_path / "adapter", None)
    change(tmp_path / "adapter")
    with pytest.raises(GriffinError, match=message):
        griffin.load(tmp_path / "model", adapter=tmp_path / "adapter")
