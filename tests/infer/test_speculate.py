"""Speculation: the tokens are those of one step each, and fewer passes make them where the text repeats itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from griffin import PRESETS, Engine, Griffin, Request, Sampling, Tokenizer
from griffin.infer.grammar import Grammar
from griffin.infer.request import Completion
from griffin.infer.speculate import Drafter

W = PRESETS["griffin-tiny"].window or 0  # 16
REPEATING = tuple(b"one two three one two three one two three one two")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def model(make_lively: Callable[..., Griffin]) -> Griffin:
    return make_lively()


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[int]], list[int]]], None]:
    """Let rows guess what a function of all their tokens says, whatever it gains."""

    def use(guess: Callable[[list[int]], list[int]]) -> None:
        monkeypatch.setattr(Drafter, "draft", lambda self, tokens: guess(tokens))

    return use


def run(model: Griffin, tokenizer: Tokenizer, *asked: Request, speculate: bool) -> tuple[list[Completion], Engine]:
    engine = Engine(model, tokenizer, slots=2, speculate=speculate, poison=True)
    handles = [engine.submit(each) for each in asked]
    while engine.turn():
        pass
    return [handle.completion() for handle in handles], engine


OPTIONS: list[dict[str, Any]] = [
    {"sampling": Sampling(temperature=0)},
    {"sampling": Sampling(seed=1, temperature=0.9, top_k=40, top_p=0.9)},
    {"sampling": Sampling(seed=2, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.1), "logprobs": 2},
    {"sampling": Sampling(seed=3), "stop": ("e", "th"), "min_tokens": 5, "stop_ids": frozenset(range(60, 90))},
    {"sampling": Sampling(seed=4), "grammar": Grammar.regex("([ab]{2}|xyz){9}")},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "seeded", "penalties", "stops", "grammar"])
@pytest.mark.parametrize("right", [0, 1, 3, 7, None])
def test_the_tokens_are_those_without(
    model: Griffin,
    tokenizer: Tokenizer,
    guesses: Callable[[Callable[[list[int]], list[int]]], None],
    options: dict[str, Any],
    right: int | None,
) -> None:
    """Guesses of which so many are right, every number of them in turn (None), around and past the window."""
    asked = Request(prompt=REPEATING, max_tokens=3 * W + 5, **options)
    (wanted,), _ = run(model, tokenizer, asked, speculate=False)
    turn = itertools.count()

    def guess(tokens: list[int]) -> list[int]:
        good = next(turn) % 8 if right is None else right
        at = len(tokens)
        return [*wanted.tokens[at : at + good], 7, 7, 7][:7] if at < len(wanted.tokens) else []

    guesses(guess)
    (found,), engine = run(model, tokenizer, asked, speculate=True)
    assert (found.tokens, found.text, found.finish_reason) == (wanted.tokens, wanted.text, wanted.finish_reason)
    assert found.unread == wanted.unread
    for a, b in zip(found.logprobs or (), wanted.logprobs or (), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert found.state is not None
    assert wanted.state is not None
    assert found.state.position.item() == wanted.state.position.item()
    for name, tensor in wanted.state.tensors().items():
        if not name.endswith(("keys", "values")):  # slots that no query sees may hold anything
            torch.testing.assert_close(found.state.tensors()[name], tensor, rtol=1e-4, atol=1e-4)
    if right:
        assert engine.stats().tokens_accepted > 0
        assert engine.stats().turns < len(wanted.tokens)


def test_neighbours_may_come_and_go_meanwhile(
    model: Griffin, tokenizer: Tokenizer, guesses: Callable[[Callable[[list[int]], list[int]]], None]
) -> None:
    """A row that guessed wrong and has several tokens unread goes on in a batch."""
    asked = [Request(prompt=REPEATING[:n], max_tokens=30, sampling=Sampling(seed=n)) for n in (9, 20)]
    wanted = [run(model, tokenizer, each, speculate=False)[0][0].tokens for each in asked]
    guesses(lambda tokens: [*wanted[0][len(tokens) : len(tokens) + 1], 7, 7])
    engine = Engine(model, tokenizer, slots=2, speculate=True, poison=True)
    first = engine.submit(asked[0])
    for _ in range(3):
        engine.turn()
    second = engine.submit(asked[1])
    while engine.turn():
        pass
    assert [handle.completion().tokens for handle in (first, second)] == wanted
    assert engine.stats().tokens_accepted > 0


def test_what_has_stood_before_is_guessed() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6, 1, 2])
    assert drafter.draft([3]) == [4, 5, 6, 1, 2, 3]
    assert drafter.draft([3, 9, 2, 3]) == []
    assert drafter.draft([3, 9, 2, 3, 9, 2, 3]) == [9, 2, 3]  # what followed last


def test_guessing_stops_where_it_does_not_pay_and_is_tried_again() -> None:
    drafter = Drafter([1, 2, 3, 4, 1, 2, 3])
    tried = 0
    for _ in range(500):
        if drafter.draft([]):
            tried += 1
            drafter.judge(1, 1.5, 1.0, guessed=True)
            drafter.judge(1, 1.5, 1.0, guessed=False)
    assert 2 < tried < 12
    for _ in range(20):
        drafter.judge(5, 1.5, 1.0, guessed=True)
    assert all(drafter.draft([]) for _ in range(9))
