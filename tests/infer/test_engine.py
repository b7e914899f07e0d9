"""Engine: many requests at once, each getting what it would get alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from griffin import Engine, Griffin, GriffinError, Request, Sampling, Tokenizer
from griffin.infer.batch import Held
from griffin.infer.engine import Refused
from griffin.infer.handle import Handle
from griffin.infer.request import Completion

TEXT = "The sea was calm, and the sky, which had been grey since morning, was clearing. Then came the rain."
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def model(make_lively: Callable[..., Griffin]) -> Griffin:
    return make_lively()


def request(text: str, max_tokens: int = 12, **options: Any) -> Request:
    sampling = options.pop("sampling", GREEDY)
    return Request(prompt=tuple(text.encode()), max_tokens=max_tokens, sampling=sampling, **options)


def alone(model: Griffin, tokenizer: Tokenizer, asked: Request) -> Completion:
    engine = Engine(model, tokenizer, slots=asked.n, poison=True)
    handle = engine.submit(asked)
    engine.close()
    return handle.completion()


def finish(engine: Engine) -> None:
    while engine.turn():
        pass


def test_neighbours_that_come_and_go_change_nothing(model: Griffin, tokenizer: Tokenizer) -> None:
    """Greedy and seeded, with every filter, in three slots whose freed rows are NaN."""
    warm = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3}
    asked = [
        request(
            TEXT[i : i + 1 + 7 * i % 60],
            3 + 5 * i % 17,
            sampling=GREEDY if i % 3 else Sampling(seed=i, **warm),
            logprobs=i % 4 or None,
        )
        for i in range(20)
    ]
    engine = Engine(model, tokenizer, slots=3, chunk=16, gap=1e-9, poison=True)
    handles = []
    for each in asked:
        handles.append(engine.submit(each))
        engine.turn()
    finish(engine)
    for each, handle in zip(asked, handles, strict=True):
        wanted, found = alone(model, tokenizer, each), handle.completion()
        assert (found.tokens, found.text, found.unread) == (wanted.tokens, wanted.text, wanted.unread)
        for a, b in zip(found.logprobs or (), wanted.logprobs or (), strict=True):
            assert a.token == b.token
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [t for t, _ in a.top] == [t for t, _ in b.top]
    assert engine.stats().completed == 20
    assert engine.stats().tokens_read == sum(len(each.prompt) for each in asked)


def test_more_rows_than_a_recorded_step_has(model: Griffin, tokenizer: Tokenizer) -> None:
    asked = [request(TEXT[i : i + 9], 2 + i) for i in range(24)]
    engine = Engine(model, tokenizer, slots=24, gap=float("inf"), poison=True)
    handles = [engine.submit(each) for each in asked]
    finish(engine)
    for each, handle in zip(asked, handles, strict=True):
        assert handle.completion().tokens == alone(model, tokenizer, each).tokens


def test_a_long_prompt_does_not_stop_who_is_decoding(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=3, gap=1e-9)  # every chunk is the least there is
    first = engine.submit(request("ab", 50))
    engine.turn()
    engine.submit(request(TEXT * 5, 5))
    short = engine.submit(request("cd", 3))
    for _ in range(4):
        before = len(first.rows[0].tokens)
        engine.turn()
        assert len(first.rows[0].tokens) == before + 1
    assert short.done  # read beside the long one, not after it
    finish(engine)
    assert first.done


def test_a_cancelled_requests_slot_is_free_within_one_turn(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=2, poison=True)
    decoding, reading = engine.submit(request("ab", 90)), engine.submit(request(TEXT * 50, 9))
    waiting = engine.submit(request("x", 2))
    engine.turn()
    assert (engine.busy, engine.waiting) == (2, 1)
    for handle in (decoding, reading, waiting):
        engine.cancel(handle)
    last = engine.submit(request("last", 4))
    engine.turn()
    assert [h.completion().finish_reason for h in (decoding, reading, waiting)] == 3 * ["cancelled"]
    assert engine.busy == 1
    assert decoding.completion().state is not None
    assert reading.completion().state is None
    finish(engine)
    assert last.completion().tokens == alone(model, tokenizer, request("last", 4)).tokens
    assert engine.stats().cancelled == 3


def test_deadlines_end_what_waits_reads_and_decodes(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=1)
    handle = engine.submit(request("ab", 9999), deadline=0.05)
    late = engine.submit(request("x", 2), deadline=0.0)
    finish(engine)
    found = handle.completion()
    assert found.finish_reason == late.completion().finish_reason == "deadline"
    assert 0 < len(found.tokens) < 9999
    assert late.completion().tokens == ()


def test_what_does_not_fit_is_refused_at_once(model: Griffin, tokenizer: Tokenizer) -> None:
    """Ten times more than slots and queue hold: each is answered or refused, none is lost."""
    engine = Engine(model, tokenizer, slots=2, max_queue=4, max_queue_tokens=40)
    handles, reasons = [], []
    for i in range(60):
        try:
            handles.append(engine.submit(request("abcdefgh"[: 1 + i % 8], 3)))
        except Refused as refused:
            reasons.append(str(refused))
    assert (len(handles), len(reasons)) == (4, 56)
    assert all(reason == "4 requests wait, the most there may; try again later" for reason in reasons)
    engine._queue.max_requests = 5
    with pytest.raises(Refused, match="10 tokens of prompts wait and this one has 99; there may be 40"):
        engine.submit(request("x" * 99, 3))
    finish(engine)
    assert all(len(handle.completion().tokens) == 3 for handle in handles)
    assert (engine.stats().requests, engine.stats().refused, engine.stats().completed) == (4, 57, 4)
    engine.close()
    with pytest.raises(Refused, match="closed"):
        engine.submit(request("x"))


def test_tenants_have_their_turns(model: Griffin, tokenizer: Tokenizer) -> None:
    """Who asks for one thing does not wait for all of another's."""
    engine = Engine(model, tokenizer, slots=1)
    order: list[str] = []
    for name in (*"aaaaaa", "b"):
        engine.submit(request("x", 1), tenant=name).add_listener(lambda _, name=name: order.append(name))
    finish(engine)
    assert order == ["a", "b", "a", "a", "a", "a", "a"]


def test_n_answers_read_the_prompt_once(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=4, poison=True)
    asked = request(TEXT, 9, n=3, sampling=Sampling(seed=5))
    handle = engine.submit(asked, index=7)
    finish(engine)
    assert engine.stats().tokens_read == len(asked.prompt)
    for answer, found in enumerate(handle.completions()):
        single = request(TEXT, 9, sampling=Sampling(seed=5 + answer))
        assert found.tokens == alone(model, tokenizer, single).tokens
    pieces = list(handle)
    assert {piece.row for piece in pieces} == {7, 8, 9}
    assert sum(piece.finish_reason is not None for piece in pieces) == 3
    with pytest.raises(ValueError, match="n=5 answers do not fit 4 slots"):
        engine.submit(request("x", n=5))


def test_a_thread_of_its_own_serves_many(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=3)
    engine.start()
    texts: dict[str, str] = {}

    def ask(prompt: str) -> None:
        texts[prompt] = "".join(map(str, engine.submit(request(prompt, 10))))

    threads = [threading.Thread(target=ask, args=(TEXT[i:],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    for prompt, text in texts.items():
        assert text == alone(model, tokenizer, request(prompt, 10)).text


def test_closing_without_draining_cancels(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=1)
    engine.start()
    handles = [engine.submit(request("ab", 10**6)) for _ in range(3)]
    assert handles[0].get(timeout=30) is not None
    engine.close(drain=False)
    assert [handle.completion(timeout=1).finish_reason for handle in handles] == 3 * ["cancelled"]


def test_a_failing_turn_ends_every_handle_with_its_error(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=1)
    handles = [engine.submit(request("ab", 5)) for _ in range(3)]
    told: list[Any] = []
    handles[2].add_listener(told.append)
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no more")))
    engine.start()
    for handle in handles:
        with pytest.raises(RuntimeError, match="no more"):
            handle.completion(timeout=30)
    with pytest.raises(RuntimeError, match="no more"):
        list(handles[0])
    assert [(piece.finish_reason, piece.reason) for piece in told] == [("error", "no more")]
    with pytest.raises(Refused, match="the engine has ended: no more"):
        engine.submit(request("x"))
    engine.close()


def test_a_listener_that_raises_ends_its_own_request(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=2)
    bad, good = engine.submit(request("ab", 50)), engine.submit(request("ab", 5))

    def closed(_: object) -> None:
        raise RuntimeError("loop is closed")

    bad.add_listener(closed)
    finish(engine)
    assert len(good.completion().tokens) == 5
    with pytest.raises(RuntimeError, match="loop is closed"):
        bad.completion()
    assert engine.stats().cancelled == 1


def test_a_row_that_is_not_finite_ends_alone(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=3, poison=True)
    broken = model.new_state(1)
    for tensor in broken.tensors().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    broken.position.fill_(40)
    broken.longest = 40
    bad, good = engine.submit(request("ab", 5), state=broken), engine.submit(request("ab", 5))
    finish(engine)
    found = bad.completion()
    assert found.finish_reason == "error"
    assert "largest logit is nan" in (found.reason or "")
    assert good.completion().tokens == alone(model, tokenizer, request("ab", 5)).tokens


def test_slots_are_what_the_budget_holds(make_lively: Callable[..., Griffin], tokenizer: Tokenizer) -> None:
    model = make_lively()
    each = model.new_state(1).nbytes
    for slots in (1, 5, 40):
        taken = Engine(model, tokenizer, slots=slots)
        total = int(taken.describe().rsplit(" ", 2)[1].replace(",", ""))
        assert Engine(model, tokenizer, max_bytes=total).slots == slots
        assert Engine(model, tokenizer, max_bytes=total + each // 2).slots == slots
    with pytest.raises(ValueError, match="less than one slot"):
        Engine(model, tokenizer, max_bytes=each)
    with pytest.raises(ValueError, match="give one of them"):
        Engine(model, tokenizer, max_bytes=each, slots=1)
    with pytest.raises(ValueError, match="global attention grows"):
        Engine(make_lively(window=None), tokenizer, max_bytes=10**9)


def test_global_attention_grows_while_rows_come_and_go(
    make_lively: Callable[..., Griffin], tokenizer: Tokenizer
) -> None:
    model = make_lively(window=None)
    engine = Engine(model, tokenizer, slots=3, poison=True)
    asked = [request(TEXT[: 1 + 9 * i], 3 + 11 * (i % 3)) for i in range(9)]
    handles = [engine.submit(each) for each in asked]
    finish(engine)
    for each, handle in zip(asked, handles, strict=True):
        assert handle.completion().tokens == alone(model, tokenizer, each).tokens


def test_a_long_prompt_that_joins_moves_global_attention(
    make_lively: Callable[..., Griffin], tokenizer: Tokenizer
) -> None:
    """The state grows for it, elsewhere: the step that was recorded for one row must not go on where it lay."""
    model = make_lively(window=None)
    engine = Engine(model, tokenizer, slots=2)
    asked = [request("ab", 60), request(TEXT * 3, 3)]
    first = engine.submit(asked[0])
    for _ in range(5):
        engine.turn()
    second = engine.submit(asked[1])
    finish(engine)
    for each, handle in zip(asked, (first, second), strict=True):
        assert handle.completion().tokens == alone(model, tokenizer, each).tokens


class Kept:
    """Snapshots as simple as can be: everything, for ever."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, tuple[int, ...]], Held] = {}
        self.lasting: dict[int, bool] = {}

    def find(self, tokens: Sequence[int], tenant: str) -> tuple[int, Held] | None:
        for count in range(len(tokens), 0, -1):
            held = self.held.get((tenant, tuple(tokens[:count])))
            if held is not None and (held.logits is not None or count < len(tokens)):
                return count, Held(held.state.clone(), held.logits)
        return None

    def keep(self, tokens: Sequence[int], held: Held, tenant: str, *, lasting: bool) -> None:
        assert held.state.position.item() == len(tokens)
        logits = None if held.logits is None else held.logits.clone()
        self.held[tenant, tuple(tokens)] = Held(held.state.clone(), logits)
        self.lasting[len(tokens)] = lasting


def test_what_was_read_before_is_not_read_again(model: Griffin, tokenizer: Tokenizer) -> None:
    kept = Kept()
    engine = Engine(model, tokenizer, slots=2, snapshots=kept, poison=True)
    asked = request(TEXT, 20)
    first = engine.submit(asked, tenant="a")
    finish(engine)
    assert engine.stats().tokens_read == len(asked.prompt)
    again, other = engine.submit(asked, tenant="a"), engine.submit(asked, tenant="b")
    finish(engine)
    assert engine.stats().tokens_read == 2 * len(asked.prompt)  # the other tenant's alone
    assert engine.stats().tokens_from_snapshots == len(asked.prompt)
    assert first.completion().tokens == again.completion().tokens == other.completion().tokens
    more = Request(prompt=(*asked.prompt, *first.completion().tokens, *b" And"), max_tokens=9, sampling=GREEDY)
    went_on = engine.submit(more, tenant="a")
    finish(engine)
    assert engine.stats().tokens_read == 2 * len(asked.prompt) + 1 + len(b" And")  # the last token was never read
    assert went_on.completion().tokens == alone(model, tokenizer, more).tokens


def test_an_idle_engine_sleeps(model: Griffin, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, slots=1)
    assert not engine.turn()
    engine.start()
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1
    handle: Handle = engine.submit(request("ab", 3))
    assert len(handle.completion(timeout=30).tokens) == 3
    engine.close()
    assert isinstance(Refused("x"), GriffinError)
    assert torch.is_grad_enabled()
