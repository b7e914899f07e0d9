"""Structured output: what a grammar describes and nothing else, each row by its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from griffin import Engine, Griffin, GriffinError, Request, Sampling, Tokenizer, generate
from griffin.infer.grammar import Grammar
from griffin.infer.handle import Handle

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(['{"name": "Anna", "age": 17} yes no maybe 0123456789'] * 9, 300)


@pytest.fixture
def model(make_lively: Callable[..., Griffin], tokenizer: Tokenizer) -> Griffin:
    return make_lively(vocab_size=tokenizer.vocab_size + 5)  # embeddings often have more rows than there are tokens


def request(tokenizer: Tokenizer, grammar: Grammar | None, seed: int = 0, **options: Any) -> Request:
    return Request(
        prompt=tuple(tokenizer.encode("Once")),
        max_tokens=options.pop("max_tokens", 80),
        sampling=Sampling(seed=seed, temperature=0.9, **options.pop("sampling", {})),
        stop_ids=frozenset(tokenizer.stop_ids),
        grammar=grammar,
        **options,
    )


def run(model: Griffin, tokenizer: Tokenizer, *requests: Request, slots: int = 4) -> list[Handle]:
    engine = Engine(model, tokenizer, slots=slots, poison=True)
    handles = [engine.submit(each) for each in requests]
    while engine.turn():
        pass
    return handles


def test_every_kind_is_followed_beside_others(model: Griffin, tokenizer: Tokenizer) -> None:
    kinds: list[tuple[Grammar | None, Callable[[str], Any]]] = [
        (Grammar.json(SCHEMA), lambda text: json.loads(text).keys() == {"name", "age"}),
        (Grammar.regex(r"[a-c]{3,9}-[0-9]{2}"), lambda text: re.fullmatch(r"[a-c]{3,9}-[0-9]{2}", text)),
        (None, lambda text: True),
        (Grammar.choice(["yes", 'no "really"', "mäh\n"]), lambda text: text in ("yes", 'no "really"', "mäh\n")),
        (Grammar.lark('start: "(" start ")" | "x"'), lambda text: re.fullmatch(r"\(*x\)*", text)),
        (None, lambda text: True),
    ]
    asked = [request(tokenizer, grammar, seed) for seed in range(3) for grammar, _ in kinds]
    found = [handle.completion() for handle in run(model, tokenizer, *asked)]
    for index, (each, completion) in enumerate(zip(asked, found, strict=True)):
        check = kinds[index % len(kinds)][1]
        if completion.finish_reason == "stop":
            assert check(completion.text), completion.text
        assert completion.reason is None
        alone = run(model, tokenizer, each, slots=1)[0].completion()
        assert (alone.tokens, alone.text) == (completion.tokens, completion.text)
    reasons = [completion.finish_reason for completion in found]
    assert reasons.count("stop") >= 9
    assert len({completion.text for completion in found}) > 9


def test_answers_to_one_prompt_follow_it_apart(model: Griffin, tokenizer: Tokenizer) -> None:
    handle = run(model, tokenizer, request(tokenizer, Grammar.regex("[0-9]{4}"), n=3))[0]
    texts = [completion.text for completion in handle.completions()]
    assert all(re.fullmatch("[0-9]{4}", text) for text in texts)
    assert len(set(texts)) > 1


def test_a_dead_end_has_a_reason_and_no_nan(model: Griffin, tokenizer: Tokenizer) -> None:
    """The grammar allows one token alone, and the bias, or the least length, forbids that."""
    (y,) = tokenizer.encode("yes", bos=False)[:1]
    dead = request(tokenizer, Grammar.regex("y?"), min_tokens=9)
    banned = request(
        tokenizer, Grammar.choice(["a"]), sampling={"logit_bias": {tokenizer.encode("a", bos=False)[0]: -float("inf")}}
    )
    free = request(tokenizer, None, 5)
    handles = run(model, tokenizer, dead, banned, free)
    assert y is not None
    assert handles[1].completion().finish_reason == "error"
    assert handles[1].completion().reason == "every token is forbidden"
    assert handles[0].completion().finish_reason in ("stop", "error")
    assert handles[2].completion().tokens == run(model, tokenizer, free, slots=1)[0].completion().tokens


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.regex("[ab"), "invalid regex"),
        (Grammar.lark("begin: x"), "followed"),
        (Grammar.json("{nonsense"), "grammar"),
        (Grammar.json({"type": "number", "minimum": 9, "maximum": 1}), "followed"),
        (Grammar.lark("start: " + "(" * 5000 + '"a"' + ")" * 5000), "grammar"),
    ],
)
def test_what_is_no_grammar_is_refused(model: Griffin, tokenizer: Tokenizer, grammar: Grammar, message: str) -> None:
    with pytest.raises(GriffinError, match=message):
        Engine(model, tokenizer, slots=1).submit(request(tokenizer, grammar))


def test_generate_takes_one(model: Griffin, tokenizer: Tokenizer) -> None:
    found = generate(model, tokenizer, ["a", "b"], grammar=Grammar.choice(["yes", "no"]), max_tokens=9, seed=1)
    assert all(completion.text in ("yes", "no") for completion in found)
    with pytest.raises(GriffinError, match="at least one"):
        Grammar.choice([])
