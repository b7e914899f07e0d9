"""GriffinForCausalLM: what transformers does with a model, done with ours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
    RecurrentGemmaForCausalLM,
)

import griffin
from griffin.infer.step import available
from griffin.integrations import transformers as integration
from griffin.integrations.transformers import GriffinCache, GriffinForCausalLM, OwnConfig
from griffin.integrations.transformers.config import architecture
from tests.integrations.conftest import Models, V, make_models, random_ids, small_config

CLOSE = {"rtol": 0, "atol": 2e-5}
EDGE = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0])  # padding on the left, in between and on the right


# Being there and gone.


def test_register_and_unregister(tmp_path: Path) -> None:
    griffin.save(griffin.Griffin(griffin.PRESETS["griffin-tiny"]), tmp_path / "hf")
    griffin.save(griffin.Griffin(griffin.PRESETS["transformer-tiny"]), tmp_path / "own")
    before = {name: value for name, value in vars(RecurrentGemmaForCausalLM).items() if callable(value)}
    integration.register()  # a second time
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), GriffinForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "own"), OwnConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "own"), GriffinForCausalLM)
    integration.unregister()
    integration.unregister()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")) is RecurrentGemmaForCausalLM
    with pytest.raises(ValueError, match="griffin"):
        AutoConfig.from_pretrained(tmp_path / "own")
    assert before == {name: value for name, value in vars(RecurrentGemmaForCausalLM).items() if callable(value)}


@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
@torch.no_grad()
def test_folders_go_both_ways(tmp_path: Path, preset: str, make_model) -> None:  # type: ignore[no-untyped-def]
    kind = make_model(preset)
    griffin.save(kind, tmp_path / "there", griffin.Tokenizer.bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    ids = random_ids(2, 40)
    assert_close(model(ids).logits, kind.logits(kind(ids)), **CLOSE)
    model.save_pretrained(tmp_path / "back")
    back = griffin.load(tmp_path / "back")
    assert back.config == kind.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), kind.parameters(), strict=True))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(again.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("form", ["int8", "int4"])
@torch.no_grad()
def test_quantised_folders_load_and_save(tmp_path: Path, form: str, make_model) -> None:  # type: ignore[no-untyped-def]
    kind = griffin.quantize.quantize(make_model(), form, group=32 if form == "int4" else None)
    griffin.save(kind, tmp_path / "there")
    ids = random_ids(1, 20)
    for dtype in ("auto", torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "there", dtype=dtype)
        right = griffin.load(tmp_path / "there", dtype=None if dtype == "auto" else dtype)
        assert torch.equal(model(ids).logits, right.logits(right(ids)))
        state, expected = right.new_state(1), []
        for t in range(20):
            expected.append(right.logits(right(ids[:, t : t + 1], state)))
        cache = GriffinCache()
        found = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20)]
        assert_close(torch.cat(found, 1), torch.cat(expected, 1), **CLOSE)
    model.save_pretrained(tmp_path / "back")
    back = griffin.load(tmp_path / "back")
    assert torch.equal(back.logits(back(ids)), right.logits(right(ids)))
    model.train()  # adapters over quantised linears can be trained: the numbers themselves have no gradient
    stored = [parameter for name, parameter in model.named_parameters() if name.endswith("weight_q")]
    assert stored
    assert not any(parameter.requires_grad for parameter in stored)


@pytest.mark.parametrize("change", ["missing", "unknown", "untied"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change: str, make_model) -> None:  # type: ignore[no-untyped-def]
    griffin.save(make_model(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.layers.1.mlp_block.down_proj.bias"]
    else:
        name = "lm_head.weight" if change == "untied" else "model.layers.7.x"
        tensors[name] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, file, {"format": "pt"})
    said = {"missing": "lacks model.layers.1", "unknown": "has, which the model does not, model.layers.7.x"}
    with pytest.raises(ValueError, match=said.get(change, "untied models are not supported")):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_new_model_has_our_initial_weights() -> None:
    model = AutoModelForCausalLM.from_config(small_config(hidden_size=256, intermediate_size=1536, lru_width=256))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    layer = model.model.layers[0]
    assert_close(layer.mlp_block.gate_proj.weight.std().item(), (2 * 256) ** -0.5, rtol=0.02, atol=0)
    assert_close(layer.temporal_block.rg_lru.input_gate_weight.std().item(), 256**-0.5, rtol=0.02, atol=0)
    assert layer.mlp_block.gate_proj.bias.count_nonzero() == 0
    assert (
        -7 < layer.temporal_block.rg_lru.recurrent_param.min() < layer.temporal_block.rg_lru.recurrent_param.max() < -2
    )


def test_more_tokens_in_the_vocabulary() -> None:
    models = make_models()
    ids = random_ids(1, 9)
    models.ours.resize_token_embeddings(V + 5)
    logits = models.ours(ids).logits
    assert_close(logits[..., :V], models.alone(ids), **CLOSE)
    assert logits.shape[-1] == models.ours.config.vocab_size == V + 5
    models.ours(torch.tensor([[V + 4]]))
    assert models.ours.lm_head.weight is models.ours.get_input_embeddings().weight


# Logits, losses, gradients.


def test_losses_and_gradients_are_those_of_transformers_where_it_is_right(models: Models) -> None:
    ids = random_ids(2, 30)
    labels = ids.masked_fill(torch.rand(2, 30) < 0.3, -100)
    for model, options in ((models.stock, {}), (models.ours, {}), (models.ours, {"skip_logits": True})):
        model.zero_grad()
        loss = model(ids, labels=labels, use_cache=False, **options).loss
        loss.backward()
        if model is models.stock:
            right, gradients = loss, {name: p.grad for name, p in model.named_parameters()}
        else:
            assert_close(loss, right, rtol=1e-6, atol=0)
            for name, parameter in model.named_parameters():
                assert_close(parameter.grad, gradients[name], rtol=0, atol=2e-5, msg=name)
    total = torch.tensor(100)
    assert_close(
        models.ours(ids, labels=labels, num_items_in_batch=total, skip_logits=True).loss,
        models.stock(ids, labels=labels, num_items_in_batch=total, use_cache=False).loss,
    )


@pytest.mark.parametrize("skip", [False, True])
def test_padded_and_packed_losses_are_the_mean_over_the_texts_alone(models: Models, skip: bool) -> None:
    texts = [random_ids(1, n, seed=n) for n in (7, 1, 12)]
    nats = [
        models.ours(text, labels=text, use_cache=False).loss * (text.shape[1] - 1)
        for text in texts
        if text.shape[1] > 1
    ]
    right = sum(nats) / 17
    mask = torch.zeros(3, 14, dtype=torch.int64)
    mask[0, 2:9] = mask[1, 13] = mask[2, :5] = mask[2, 7:] = 1
    ids, labels = torch.zeros(3, 14, dtype=torch.int64), torch.full((3, 14), -100)
    ids[mask.bool()] = labels[mask.bool()] = torch.cat(texts, 1)[0]
    assert_close(models.ours(ids, attention_mask=mask, labels=labels, skip_logits=skip).loss, right)
    packed = DataCollatorWithFlattening()([{"input_ids": text[0].tolist()} for text in texts])
    assert_close(models.ours(**packed, skip_logits=skip).loss, right)
    position_ids = packed["position_ids"]  # labels that say more than they may: no document predicts another
    assert_close(models.ours(packed["input_ids"], position_ids=position_ids, labels=packed["input_ids"]).loss, right)


def test_gradients_of_packed_rows_are_those_of_the_documents_alone(models: Models) -> None:
    texts = [random_ids(1, n, seed=n) for n in (7, 12)]
    sum(models.ours(text, labels=text, num_items_in_batch=17).loss for text in texts).backward()
    right = {name: parameter.grad for name, parameter in models.ours.named_parameters()}
    models.ours.zero_grad()
    position_ids = torch.cat([torch.arange(7), torch.arange(12)])[None]
    models.ours(torch.cat(texts, 1), labels=torch.cat(texts, 1), position_ids=position_ids).loss.backward()
    for name, parameter in models.ours.named_parameters():
        assert_close(parameter.grad, right[name], rtol=0, atol=2e-6, msg=name)


@torch.no_grad()
def test_padding_anywhere_changes_nothing_and_has_the_logits_of_the_token_before_it(models: Models) -> None:
    ids = random_ids(1, 11)
    right = models.alone(ids[:, EDGE.bool()])[0]
    noise = torch.where(EDGE.bool(), ids, 3)
    for given in ({"input_ids": noise}, {"inputs_embeds": models.ours.get_input_embeddings()(noise)}):
        logits = models.ours(**given, attention_mask=EDGE[None]).logits[0]
        assert_close(logits[EDGE.bool()], right, **CLOSE)
        assert_close(logits[10], right[-1], **CLOSE)
        assert_close(logits[4], right[2], **CLOSE)
    cache, found = GriffinCache(), []
    for start, stop in ((0, 4), (4, 6), (6, 10), (10, 11)):
        out = models.ours(noise[:, start:stop], attention_mask=EDGE[None, :stop], past_key_values=cache)
        found.append(out.logits[0])
    assert_close(torch.cat(found)[3:], logits[3:], **CLOSE)


@torch.no_grad()
def test_embeddings_in_place_of_tokens(models: Models) -> None:
    ids = random_ids(2, 12)
    rows = models.ours.get_input_embeddings()(ids)
    assert_close(models.ours(inputs_embeds=rows).logits, models.ours(ids).logits, **CLOSE)
    assert torch.equal(
        models.ours.generate(inputs_embeds=rows, max_new_tokens=6), models.ours.generate(ids, max_new_tokens=6)[:, 12:]
    )


@torch.no_grad()
def test_hidden_states_are_those_of_transformers(models: Models) -> None:
    ids = random_ids(2, 12)
    ours = models.ours(ids, output_hidden_states=True).hidden_states
    stock = models.stock(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(ours) == len(stock) == 6
    for a, b in zip(ours, stock, strict=True):
        assert_close(a, b, **CLOSE)


def test_hooks_on_the_embedding_see_its_rows_unscaled(models: Models) -> None:
    """As transformers' noisy embeddings and gradient hooks expect."""
    seen = []
    hook = models.ours.get_input_embeddings().register_forward_hook(lambda _, i, out: seen.append(out) or out + 1)
    logits = models.ours(ids := random_ids(1, 6)).logits
    hook.remove()
    table = models.ours.get_input_embeddings().weight
    assert torch.equal(seen[0], table[ids])
    assert_close(logits, models.ours(inputs_embeds=table[ids] + 1).logits, **CLOSE)


def test_recomputed_activations_give_the_same_gradients(models: Models) -> None:
    ids = random_ids(2, 20)
    model = models.ours.train()
    calls: list[int] = []
    hook = model.model.layers[1].channel_pre_norm.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for reentrant in (None, False, True):
        model.zero_grad()
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        calls.clear()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert len(calls) == (1 if reentrant is None else 2)
    model.activation_checkpointing_disable()
    model.zero_grad()
    calls.clear()
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 1
    hook.remove()
    for others in gradients[1:]:
        assert_close(others, gradients[0], rtol=1e-5, atol=1e-7)


def test_autocast_is_bf16_activations_over_fp32_parameters(models: Models) -> None:
    ids = random_ids(2, 20)
    right = griffin.Griffin(models.griffin.config, activation_dtype=torch.bfloat16)
    right.load_state_dict(models.griffin.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = models.ours(ids, use_cache=False).logits
        again = models.ours(ids[:, :1], past_key_values=(cache := GriffinCache())).logits
    assert found.dtype == torch.float32
    assert_close(found, right.logits(right(ids)), **CLOSE)
    assert again.dtype == torch.float32
    with pytest.raises(ValueError, match="same autocast"):
        models.ours(ids[:, 1:2], past_key_values=cache)


@torch.no_grad()
def test_a_copy_and_a_replaced_part_are_what_runs(models: Models) -> None:
    ids = random_ids(1, 9)
    before = models.ours(ids).logits
    twin = copy.deepcopy(models.ours)
    twin.model.final_norm.weight += 1
    assert torch.equal(models.ours(ids).logits, before)
    assert not torch.equal(twin(ids).logits, before)
    models.ours.model.layers = nn.ModuleList(models.ours.model.layers[:2])
    models.ours.config.num_hidden_layers = 2
    assert not torch.equal(models.ours(ids, use_cache=False).logits, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
def test_compiled_whole_it_gives_the_same_loss_and_gradients(models: Models) -> None:
    ids = random_ids(2, 24)
    model = models.ours.train()
    model(ids, labels=ids).loss.backward()
    right = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model)(ids, labels=ids).loss.backward()
    for parameter, grad in zip(model.parameters(), right, strict=True):
        assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


# Caches and generate.


@torch.no_grad()
def test_decoding_makes_the_recorded_step_again(models: Models) -> None:
    ids = random_ids(2, 20)
    right = torch.cat([models.alone(row[None]) for row in ids])
    out = models.ours(ids[:, :5])
    cache, found = out.past_key_values, [out.logits]
    for t in range(5, 20):
        found.append(models.ours(ids[:, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]])).logits)
    assert_close(torch.cat(found, 1), right, **CLOSE)  # kept, not overwritten by later steps
    assert cache.get_seq_length() == 20
    assert cache.step(models.ours.griffin).kept == ("kernels" if available() else None)


@torch.no_grad()
def test_rows_of_a_cache_are_reordered_repeated_and_chosen(models: Models) -> None:
    ids, token = random_ids(3, 9), random_ids(3, 1, seed=5)
    cache = models.ours(ids).past_key_values
    models.ours(token, past_key_values=cache)  # the step is recorded before the rows move
    ids = torch.cat([ids, token], 1)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    ids = ids[[2, 2, 0]]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 1, 3]))
    ids = ids.repeat_interleave(2, 0)[[5, 0, 1, 3]]
    token = random_ids(4, 1, seed=6)
    right = torch.cat([models.alone(row[None])[:, -1:] for row in torch.cat([ids, token], 1)])
    assert_close(models.ours(token, past_key_values=cache).logits, right, **CLOSE)
    cache.reset()
    assert_close(models.ours(token, past_key_values=cache).logits, models.ours(token).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[30], [4] * 5, [1] * 25, [70, 3, 1, 1], [63, 1, 1, 70]])
def test_a_cropped_cache_is_as_if_the_tokens_had_not_been_read(models: Models, pieces: list[int]) -> None:
    ids = random_ids(1, sum(pieces))
    for crop in {1, 2, 3, 7, 20}:
        cache = GriffinCache()
        cache.activate_past_recording()
        for piece in ids.split(pieces, 1):
            models.ours(piece, past_key_values=cache)
        cache.crop(0)
        cache.crop(-crop)
        kept, more = ids[:, :-crop], random_ids(1, 5, seed=crop)
        assert cache.get_seq_length() == kept.shape[1]
        right = models.alone(torch.cat([kept, more], 1))[:, -5:]
        assert_close(models.ours(more[:, :1], past_key_values=cache).logits, right[:, :1], **CLOSE)
        cache.crop(-1)  # and again
        position_ids = torch.arange(kept.shape[1], kept.shape[1] + 5)[None]
        found = models.ours(more, past_key_values=cache, position_ids=position_ids).logits
        assert_close(found, right, **CLOSE)


def test_a_crop_that_cannot_be_right_says_why(models: Models) -> None:
    cache = GriffinCache()
    models.ours(random_ids(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be run backwards"):
        cache.crop(-1)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="more tokens than were recorded"):
        cache.crop(-1)
    models.ours(random_ids(1, 5), attention_mask=torch.tensor([[1] * 5 + [0, 1, 1, 1, 1]]), past_key_values=cache)
    with pytest.raises(ValueError, match="padding"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(1)


def test_sampling_with_a_cache_draws_what_it_draws_without(models: Models) -> None:
    ids = random_ids(3, 9)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(models.ours.generate(ids, do_sample=True, top_k=20, max_new_tokens=20, use_cache=use_cache))
    assert torch.equal(*found)


def test_speculative_sampling_runs_with_a_draft_model(models: Models) -> None:
    draft = make_models(num_hidden_layers=2).ours
    out = models.ours.generate(random_ids(1, 9), assistant_model=draft, do_sample=True, max_new_tokens=30)
    assert out.shape == (1, 39)


def test_a_conversation_goes_on_from_the_cache_that_generate_gave(models: Models) -> None:
    ids = random_ids(1, 9)
    first = models.ours.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    more = torch.cat([first.sequences, random_ids(1, 4, seed=2)], dim=1)
    found = models.ours.generate(more, past_key_values=first.past_key_values, max_new_tokens=6)
    assert found[0, more.shape[1] :].tolist() == models.greedy(more, 6)


def test_static_is_what_the_cache_is_and_others_are_refused(models: Models) -> None:
    ids = random_ids(1, 5)
    right = models.greedy(ids, 5)
    for kind in ("static", "dynamic"):
        assert models.ours.generate(ids, max_new_tokens=5, cache_implementation=kind)[0, 5:].tolist() == right
    for kind in ("offloaded", "quantized"):
        with pytest.raises(ValueError, match="state of fixed size"):
            models.ours.generate(ids, max_new_tokens=5, cache_implementation=kind)
    with pytest.raises(ValueError, match="cannot hold a recurrent state"):
        models.ours.generate(ids, max_new_tokens=5, past_key_values=DynamicCache())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"past_key_values": DynamicCache()}, "cannot hold a recurrent state"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "packed into a row are said by position_ids"),
        ({"attention_mask": torch.ones(2, 5)}, r"must be \(2, 6\)"),
        ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6]])}, r"positions\[0, 3\]=4 must be 3"),
        ({"position_ids": torch.arange(7)[None]}, "position_ids is"),
        ({"output_attentions": True}, "never form attention weights"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "without position_ids"),
        ({"inputs_embeds": torch.zeros(2, 6, 32)}, "one of them"),
        (
            {"labels": torch.ones(2, 6, dtype=torch.int64), "attention_mask": torch.tensor([[1] * 6, [0] + [1] * 5])},
            "padding",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(models: Models, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        models.ours(random_ids(2, 6), **arguments)


def test_an_argument_that_nothing_is_done_with_is_refused(models: Models) -> None:
    with pytest.raises(TypeError, match="takes no token_type_ids"):
        models.ours(random_ids(1, 3), token_type_ids=torch.zeros(1, 3))


def test_our_generate_runs_the_model_too(models: Models) -> None:
    """`model.griffin` is a Griffin over the same parameters, adapters included."""
    ids = random_ids(1, 9)
    state = models.ours.griffin.new_state(1)
    with torch.no_grad():
        logits = models.ours.griffin.logits(models.ours.griffin(ids, state))
    assert_close(logits, models.alone(ids), **CLOSE)
    assert architecture(models.ours.config) == models.ours.griffin.config
