"""What each row of an engine has of its own: penalties, bias, least length, the prompt's log-probabilities, its cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from griffin import Engine, Griffin, Request, Sampling, Tokenizer, generate
from griffin.infer import batch as module
from griffin.infer.conversation import Conversation
from griffin.infer.handle import Handle
from griffin.tokenizer.chat_template import GEMMA

PROMPT = "The rain in Spain"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def model(make_lively: Callable[..., Griffin]) -> Griffin:
    return make_lively()


def run(model: Griffin, tokenizer: Tokenizer, *requests: Request, **options: Any) -> list[Handle]:
    engine = Engine(model, tokenizer, **{"slots": len(requests), "poison": True, **options})
    handles = [engine.submit(request) for request in requests]
    while engine.turn():
        pass
    return handles


def request(text: str = PROMPT, max_tokens: int = 30, **options: Any) -> Request:
    sampling = options.pop("sampling", Sampling(temperature=0))
    return Request(prompt=tuple(text.encode()), max_tokens=max_tokens, sampling=sampling, **options)


@torch.no_grad()
def by_definition(model: Griffin, asked: Request) -> list[int]:
    """Greedy with penalties and bias, one forward over the whole text for each token."""
    sampling, tokens = asked.sampling, list[int]()
    while len(tokens) < asked.max_tokens:
        text = [*asked.prompt, *tokens]
        logits = model.logits(model(torch.tensor([text])))[0, -1].tolist()
        for token in range(len(logits)):
            if token in text and sampling.repetition_penalty is not None:
                by = sampling.repetition_penalty
                logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
            if count := tokens.count(token):
                logits[token] -= (sampling.presence_penalty or 0) + (sampling.frequency_penalty or 0) * count
            logits[token] += (sampling.logit_bias or {}).get(token, 0)
        if len(tokens) < asked.min_tokens:
            for token in asked.stop_ids:
                logits[token] = -math.inf
        best = max(range(len(logits)), key=logits.__getitem__)
        if best in asked.stop_ids:
            break
        tokens.append(best)
    return tokens


def test_penalties_bias_and_least_length_are_their_definition(model: Griffin, tokenizer: Tokenizer) -> None:
    """Each row with options of its own, beside rows with others and with none; none leaks into who comes after."""
    plain = by_definition(model, request())
    often = max(set(plain), key=plain.count)
    options: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7, "presence_penalty": -0.3},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {often: 4.0, 7: 2.5}},
        {"logit_bias": {often: -math.inf}},
        {},
    ]
    asked = [request(sampling=Sampling(temperature=0, **each)) for each in options]
    asked.append(request(min_tokens=20, stop_ids=frozenset(plain[3:])))
    asked.append(request(min_tokens=20, stop_ids=frozenset(plain[3:]), sampling=Sampling(temperature=0, **options[2])))
    asked.append(request())
    wanted = [by_definition(model, each) for each in asked]
    assert len({tuple(each) for each in wanted}) >= 6  # the options do something
    for slots in (2, len(asked)):
        found = [list(handle.completion().tokens) for handle in run(model, tokenizer, *asked, slots=slots)]
        assert found == wanted


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_log_probabilities_of_the_prompt(model: Griffin, tokenizer: Tokenizer, chunk: int) -> None:
    asked = request(max_tokens=2, prompt_logprobs=2, n=2)
    handle = run(model, tokenizer, asked, request(), slots=3, chunk=chunk)[0]
    with torch.no_grad():
        wanted = model.logits(model(torch.tensor([asked.prompt])))[0].log_softmax(dim=-1)
    for completion in handle.completions():
        found = completion.prompt_logprobs
        assert found is not None
        assert len(found) == len(asked.prompt)
        assert found[0] is None
        for at, each in enumerate(found[1:]):
            assert each is not None
            assert each.token == asked.prompt[at + 1]
            assert each.logprob == pytest.approx(wanted[at, each.token].item(), abs=1e-4)
            assert [value for _, value in each.top] == pytest.approx(wanted[at].topk(2).values.tolist(), abs=1e-4)


def test_forbidding_every_token_ends_one_row_with_a_reason(model: Griffin, tokenizer: Tokenizer) -> None:
    nothing = dict.fromkeys(range(model.config.vocab_size), -math.inf)
    bad, good = run(model, tokenizer, request(sampling=Sampling(logit_bias=nothing, seed=1)), request())
    assert (bad.completion().finish_reason, bad.completion().reason) == ("error", "every token is forbidden")
    assert list(good.completion().tokens) == by_definition(model, request())


def test_options_that_cannot_be_are_refused(model: Griffin, tokenizer: Tokenizer) -> None:
    for message, make in {
        "logit_bias of token 3 is inf": lambda: Sampling(logit_bias={3: math.inf}),
        "presence_penalty=nan": lambda: Sampling(presence_penalty=math.nan),
        r"min_tokens=9 must be within 0 .. max_tokens=5": lambda: request(max_tokens=5, min_tokens=9),
        "n=0 answers": lambda: request(n=0),
        "token 259, whose logit": lambda: run(model, tokenizer, request(sampling=Sampling(logit_bias={259: 1.0}))),
        "prompt_logprobs=260": lambda: run(model, tokenizer, request(prompt_logprobs=260)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Let the one row there is choose these ids, whatever the logits are."""

    def script(ids: list[int]) -> None:
        said: Iterator[int] = iter(ids)
        choose = module.choose

        def scripted(logits: Tensor, *rest: Any, **options: Any) -> Any:
            chosen = choose(logits, *rest, **options)
            chosen.ids[0] = next(said)
            return chosen

        monkeypatch.setattr(module, "choose", scripted)

    return script


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("Hello.\nUser: me", "\nUser:", "Hello."),
        ("a\n\n\nUser: me", "\nUser:", "a\n\n"),  # what is held back moves on
        ("aab aabaac!", "aabaac", "aab "),
        ("aaaab", "aab", "aa"),
        ("stop", "stop", ""),
        ("é東🙂 – ok", "🙂 –", "é東"),  # characters of several tokens, the stop string within them
        ("a🙂b🙂c", "b🙂", "a🙂"),
    ],
)
def test_a_stop_string_is_not_in_the_state(
    model: Griffin, tokenizer: Tokenizer, say: Callable[[list[int]], None], text: str, stop: str, shown: str
) -> None:
    say(list(text.encode()))
    found = run(model, tokenizer, request(stop=(stop,), max_tokens=99))[0].completion()
    assert (found.text, found.finish_reason) == (shown, "stop")
    assert found.state is not None
    read = [*PROMPT.encode(), *shown.encode()]
    read = read[: len(read) - len(found.unread)]
    assert [*found.unread] == [*PROMPT.encode(), *shown.encode()][len(read) :]
    assert found.state.position.item() == len(read)
    wanted = model.new_state(1)
    with torch.no_grad():
        model(torch.tensor([read]), wanted)
    for name, tensor in wanted.tensors().items():
        if not name.endswith(("keys", "values")):  # slots that no query sees may hold anything
            torch.testing.assert_close(found.state.tensors()[name], tensor)


def test_a_stop_string_that_begins_within_a_token(
    make_lively: Callable[..., Griffin], say: Callable[[list[int]], None]
) -> None:
    """What is shown of the token is to be read next, in ids of its own."""
    tokenizer = Tokenizer.train(["hello world, hello world, hello world"] * 9, 300)
    model = make_lively(vocab_size=tokenizer.vocab_size)
    ids = tokenizer.encode("ab hello world", bos=False)
    assert len(ids) < len("ab hello world") - 4
    say(ids)
    found = run(model, tokenizer, Request(prompt=(tokenizer.bos_id or 0,), max_tokens=99, stop=("llo",)))[
        0
    ].completion()
    assert found.text == "ab he"
    assert found.state is not None
    count = found.state.position.item() - 1
    assert 0 < count < len(found.tokens)
    assert tokenizer.decode([*found.tokens[:count], *found.unread]) == "ab he"


def test_the_next_turn_sees_the_conversation_that_is_shown(
    make_lively: Callable[..., Griffin], say: Callable[[list[int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.train(["hello world"], 270, chat_template=GEMMA)  # letters
    model = make_lively(vocab_size=tokenizer.vocab_size)
    said = tokenizer.encode("Hello.\nUser:", bos=False)
    with monkeypatch.context():
        say(said)
        talk = Conversation(model, tokenizer)
        list(talk.reply("hi", stop="\nUser:", max_tokens=50, temperature=0))
        monkeypatch.undo()
    assert talk.messages[-1]["content"] == "Hello."
    fresh = [
        *tokenizer.encode_chat([{"role": "user", "content": "hi"}]),
        *tokenizer.encode("Hello.", bos=False),
    ]
    assert talk.tokens_read + len(talk.unread) == len(fresh)
    turn = tokenizer.encode_chat_turn([*talk.messages, {"role": "user", "content": "and?"}])
    (wanted,) = generate(model, tokenizer, [[*fresh, *turn]], temperature=0, max_tokens=20)
    found = tuple(token for piece in talk.reply("and?", max_tokens=20, temperature=0) for token in piece.tokens)
    assert found == wanted.tokens
