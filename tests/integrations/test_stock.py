"""Cases that transformers' own RecurrentGemma (5.23) computes wrongly, slowly or not at all, and ours rightly.

The right value is each row alone in one call. Where a case says that transformers errs, by how much is printed
(pytest -s); where it agrees, today or once it is mended, that is printed too, and nothing fails.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from griffin.integrations.transformers import GriffinCache
from tests.integrations.conftest import Models, make_models, random_ids

CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture
def stock_says(request: pytest.FixtureRequest) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(f"\n{request.node.name}: transformers {text}")  # noqa: T201

    return say


def tell(say: Callable[[str], None], found: Tensor, right: Tensor) -> None:
    error = (found - right).abs().max().item()
    say("agrees" if error < 1e-4 else f"is off by {error:.3f}")


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Put rows (1, n) of several lengths under each other: ids and attention_mask."""
    T = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.int64)
    for index, row in enumerate(rows):
        span = slice(T - row.shape[1], T) if side == "left" else slice(0, row.shape[1])
        ids[index, span], mask[index, span] = row[0], 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(models: Models, side: str, stock_says: Callable[[str], None]) -> None:
    rows = [random_ids(1, n, seed=n) for n in (21, 3, 1, 14)]
    ids, mask = padded(rows, side)
    right = [models.alone(row)[0] for row in rows]
    ours = models.ours(ids, attention_mask=mask).logits
    for index, logits in enumerate(right):
        assert_close(ours[index][mask[index].bool()], logits, **CLOSE)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)  # as generate gives them
    stock = models.stock(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    tell(stock_says, stock[mask.bool()], torch.cat(right))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_generates_what_each_prompt_does_alone(
    models: Models, side: str, stock_says: Callable[[str], None]
) -> None:
    rows = [random_ids(1, n, seed=n) for n in (5, 12, 1)]
    ids, mask = padded(rows, side)
    right = [models.greedy(row, 12) for row in rows]
    options = {"attention_mask": mask, "max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    assert models.ours.generate(ids, **options).sequences[:, 12:].tolist() == right
    first = models.stock.generate(ids, **options).logits[0]
    tell(stock_says, first, torch.cat([models.alone(row)[:, -1] for row in rows]))


@torch.no_grad()
def test_packed_rows(models: Models, stock_says: Callable[[str], None]) -> None:
    rows = [random_ids(1, n, seed=n) for n in (9, 1, 17)]
    position_ids = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    right = torch.cat([models.alone(row) for row in rows], dim=1)
    ids = torch.cat(rows, dim=1)
    assert_close(models.ours(ids, position_ids=position_ids).logits, right, **CLOSE)
    tell(stock_says, models.stock(ids, position_ids=position_ids, use_cache=False).logits, right)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(11,), (1, 2, 30), (8, 9, 10)])
def test_a_prompt_in_chunks(models: Models, cuts: tuple[int, ...], stock_says: Callable[[str], None]) -> None:
    ids = random_ids(2, 40)
    right = torch.cat([models.alone(row[None]) for row in ids])
    cache, past = GriffinCache(), DynamicCache(config=models.stock.config)
    pieces = torch.tensor_split(ids, cuts, dim=1)
    ours = [models.ours(piece, past_key_values=cache).logits for piece in pieces]
    assert_close(torch.cat(ours, dim=1), right, **CLOSE)
    stock = [models.stock(piece, past_key_values=past, use_cache=True).logits for piece in pieces]
    tell(stock_says, torch.cat(stock, dim=1), right)


@torch.no_grad()
def test_prompts_beyond_the_window_in_generates_own_chunks(models: Models, stock_says: Callable[[str], None]) -> None:
    ids = random_ids(1, 50)
    right = models.greedy(ids, 10)
    found = models.ours.generate(ids, max_new_tokens=10, prefill_chunk_size=16)
    assert found[0, 50:].tolist() == right
    try:
        stock = models.stock.generate(ids, max_new_tokens=10, prefill_chunk_size=16)[0, 50:].tolist()
        stock_says("agrees" if stock == right else "writes other tokens")
    except (RuntimeError, ValueError, AttributeError) as error:
        stock_says(f"raises {error}")


@torch.no_grad()
def test_two_conversations_at_once(models: Models, stock_says: Callable[[str], None]) -> None:
    a, b, token = random_ids(1, 19, seed=1), random_ids(1, 19, seed=2), random_ids(1, 1, seed=3)
    right = models.alone(torch.cat([a, token], dim=1))[:, -1]
    caches, pasts = [GriffinCache() for _ in "ab"], [DynamicCache(config=models.stock.config) for _ in "ab"]
    for ids, cache, past in zip((a, b), caches, pasts, strict=True):
        models.ours(ids, past_key_values=cache)
        models.stock(ids, past_key_values=past, use_cache=True)
    assert_close(models.ours(token, past_key_values=caches[0]).logits[:, -1], right, **CLOSE)
    stock = models.stock(token, past_key_values=pasts[0], use_cache=True, position_ids=torch.tensor([[19]])).logits
    tell(stock_says, stock[:, -1], right)


@torch.no_grad()
def test_a_prefix_read_once_serves_two_continuations(models: Models, stock_says: Callable[[str], None]) -> None:
    prefix, ends = random_ids(1, 20), [random_ids(1, n, seed=n) for n in (6, 9)]
    cache, past = GriffinCache(), DynamicCache(config=models.stock.config)
    models.ours(prefix, past_key_values=cache)
    models.stock(prefix, past_key_values=past, use_cache=True)
    for end in ends:
        ids = torch.cat([prefix, end], dim=1)
        found = models.ours.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=8)
        assert found[0, ids.shape[1] :].tolist() == models.greedy(ids, 8)
        stock = models.stock(end, past_key_values=copy.deepcopy(past), use_cache=True).logits
        tell(stock_says, stock, models.alone(ids)[:, 20:])


@torch.no_grad()
@pytest.mark.parametrize("beams", [2, 5])
def test_beams(models: Models, beams: int, stock_says: Callable[[str], None]) -> None:
    ids = random_ids(2, 9)
    options = {"max_new_tokens": 12, "num_beams": beams, "num_return_sequences": beams}
    right = models.ours.generate(ids, use_cache=False, **options)  # every token reads the whole row again
    assert torch.equal(models.ours.generate(ids, **options), right)
    assert torch.equal(models.stock.generate(ids, use_cache=False, **options), right)
    wrong = (models.stock.generate(ids, **options) != right).any(1).sum()
    stock_says(f"has {wrong} of {len(right)} beams wrong" if wrong else "agrees")


@torch.no_grad()
def test_one_token_after_another_text(models: Models, stock_says: Callable[[str], None]) -> None:
    """What an earlier call left must not be seen by a new row of one token."""
    models.ours(random_ids(1, 12), use_cache=True)
    models.stock(random_ids(1, 12), use_cache=True)
    token = random_ids(1, 1, seed=9)
    right = models.alone(token)
    assert_close(models.ours(token, use_cache=True).logits, right, **CLOSE)
    past = DynamicCache(config=models.stock.config)
    tell(stock_says, models.stock(token, past_key_values=past, use_cache=True).logits, right)


@torch.no_grad()
def test_speculative_decoding(models: Models, stock_says: Callable[[str], None]) -> None:
    draft = make_models().ours
    for parameter in draft.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    ids = random_ids(1, 15)
    right = models.greedy(ids, 40)
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        assert models.ours.generate(ids, max_new_tokens=40, **options)[0, 15:].tolist() == right
    try:
        models.stock.generate(ids, max_new_tokens=40, prompt_lookup_num_tokens=3)
        stock_says("does not refuse it by now")
    except ValueError as error:
        stock_says(f"raises: {error}")


@torch.no_grad()
def test_the_window_is_the_one_that_the_released_weights_were_trained_with(
    models: Models, stock_says: Callable[[str], None]
) -> None:
    """Google's rule: W earlier tokens and the token itself. The same config.json, read by both."""
    ids = random_ids(1, 30)
    right = models.alone(ids)
    assert_close(models.ours(ids).logits, right, **CLOSE)
    models.stock.config.attention_window_size -= 1
    tell(stock_says, models.stock(ids, use_cache=False).logits, right)


@pytest.mark.slow
def test_a_gradient_of_2048_tokens_takes_a_fraction_of_the_time(stock_says: Callable[[str], None]) -> None:
    models = make_models(window=256, hidden_size=64, intermediate_size=384, lru_width=64, num_hidden_layers=3)
    ids, seconds = random_ids(1, 2048), []
    for model in (models.ours, models.stock):
        began = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        seconds.append(time.perf_counter() - began)
    stock = dict(models.stock.named_parameters())
    for name, parameter in models.ours.named_parameters():
        grad = stock[name].grad
        assert (parameter.grad - grad).abs().max() <= 2e-5 * grad.abs().max().clamp(min=1), name
    stock_says(f"takes {seconds[1]:.2f} s, ours {seconds[0]:.2f} s")
    assert seconds[0] < seconds[1]
