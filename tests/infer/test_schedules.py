"""Whatever else happens in an engine, a request gets what it would get alone: over schedules that nobody chose."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from griffin import PRESETS, Engine, Griffin, Request, Sampling, State, Tokenizer
from griffin.infer.batch import Held
from griffin.infer.engine import Refused
from griffin.infer.handle import Handle
from griffin.infer.request import Completion

W = PRESETS["griffin-tiny"].window or 0  # 16
TOKENIZER = Tokenizer.bytes()
WARM: dict[str, Any] = {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "min_p": 0.001}
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(seed=1),
    Sampling(seed=2, **WARM),
    Sampling(seed=3, repetition_penalty=1.3, **WARM),
    Sampling(seed=4, presence_penalty=0.5, frequency_penalty=0.2, logit_bias={101: 1.0}, **WARM),
    Sampling(temperature=0, repetition_penalty=1.2, frequency_penalty=0.3),
]


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def finish(engine: Engine) -> None:
    while engine.turn():
        pass


def alone(model: Griffin, request: Request, state: State | None = None) -> Completion:
    engine = Engine(model, TOKENIZER, slots=1, poison=True)
    handle = engine.submit(request, state=state)
    finish(engine)
    return handle.completion()


def same(found: Completion, wanted: Completion) -> None:
    assert found.tokens == wanted.tokens
    assert (found.text, found.finish_reason, found.unread) == (wanted.text, wanted.finish_reason, wanted.unread)
    for a, b in zip(found.logprobs or (), wanted.logprobs or (), strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    if wanted.state is not None:
        assert found.state is not None
        assert found.state.position.item() == wanted.state.position.item()


class Kept:
    """Snapshots as simple as can be: everything, for ever; and what is given out may be written on."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, tuple[int, ...]], Held] = {}

    def find(self, tokens: Sequence[int], tenant: str) -> tuple[int, Held] | None:
        for count in range(len(tokens), 0, -1):
            held = self.held.get((tenant, tuple(tokens[:count])))
            if held is not None and (held.logits is not None or count < len(tokens)):
                return count, Held(held.state.clone(), held.logits)
        return None

    def keep(self, tokens: Sequence[int], held: Held, tenant: str, *, lasting: bool) -> None:
        logits = None if held.logits is None else held.logits.clone()
        self.held[tenant, tuple(tokens)] = Held(held.state.clone(), logits)


LENGTHS = (1, 7, W - 1, W, W + 1, 2 * W, 10 * W)


@pytest.mark.parametrize(
    ("slots", "kept", "sampling"),
    [
        (1, False, SAMPLINGS[0]),
        (3, False, SAMPLINGS[3]),
        (1, True, SAMPLINGS[3]),
        (3, True, SAMPLINGS[0]),
    ],
    ids=["cold alone, greedy", "cold of 3, seeded", "hit alone, seeded", "hit of 3, greedy"],
)
def test_chunks_hits_and_neighbours_change_nothing(
    make_lively: Callable[..., Griffin], slots: int, kept: bool, sampling: Sampling
) -> None:
    """Prompts around the window, read in chunks of 1, 7, 64 and 2048, cold or from what was kept, alone or not."""
    model = make_lively()
    asked = [Request(prompt=text(n), max_tokens=W + 3, sampling=sampling, logprobs=0) for n in LENGTHS]
    wanted = [alone(model, each) for each in asked]
    assert len({token for each in wanted for token in each.tokens}) > 9
    for chunk in (1, 7, 64, 2048):
        engine = Engine(model, TOKENIZER, slots=slots, chunk=chunk, poison=True, snapshots=Kept() if kept else None)
        for _ in range(1 + kept):
            handles = [engine.submit(each) for each in asked]
            finish(engine)
            for handle, want in zip(handles, wanted, strict=True):
                same(handle.completion(), want)
        stats = engine.stats()
        assert stats.tokens_read + stats.tokens_from_snapshots == (1 + kept) * sum(LENGTHS)
        assert stats.tokens_from_snapshots >= kept * sum(LENGTHS)  # nothing is read twice


@pytest.mark.parametrize("length", LENGTHS)
def test_going_on_from_a_completions_state(make_lively: Callable[..., Griffin], length: int) -> None:
    """Forked from what another has read, or saved and loaded in between, it goes on as if it had never been left."""
    model = make_lively()
    whole = Request(prompt=text(length), max_tokens=3 * W, sampling=SAMPLINGS[0])
    wanted = alone(model, whole)
    first = alone(model, replace(whole, max_tokens=W + 2))
    more = Request(prompt=first.unread, max_tokens=2 * W - 2, sampling=SAMPLINGS[0])
    engine = Engine(model, TOKENIZER, slots=2, poison=True)
    handles = [engine.submit(more, state=first.state) for _ in range(3)]
    finish(engine)
    for handle in handles:
        assert first.tokens + handle.completion().tokens == wanted.tokens


@dataclass
class Asked:
    handle: Handle
    request: Request
    state: State | None
    cancelled: bool = False


class Schedule(RuleBasedStateMachine):
    """Requests come, are read, decode, leave and are cancelled in any order; some go on from what others have read."""

    model: Griffin

    @initialize(
        slots=st.integers(1, 4),
        chunk=st.sampled_from([1, 7, 64, 2048]),
        gap=st.sampled_from([1e-9, 10.0, float("inf")]),
        kept=st.booleans(),
        speculate=st.booleans(),
    )
    def begin(self, slots: int, chunk: int, gap: float, kept: bool, speculate: bool) -> None:
        self.slots, self.asked = slots, list[Asked]()
        self.engine = Engine(
            self.model,
            TOKENIZER,
            slots=slots,
            chunk=chunk,
            gap=gap,
            max_queue=5,
            poison=True,
            snapshots=Kept() if kept else None,
            speculate=speculate,
        )

    @rule(
        length=st.sampled_from([*LENGTHS[:-1], 3 * W]),
        seed=st.integers(0, 2),
        max_tokens=st.sampled_from([0, 1, 3, W, 2 * W + 1]),
        sampling=st.sampled_from(SAMPLINGS),
        tenant=st.sampled_from("ab"),
        n=st.integers(1, 3),
        stop=st.sampled_from([(), ("e", "ab"), ("\ufffd\ufffd",)]),
    )
    def submit(self, length: int, seed: int, tenant: str, n: int, **options: Any) -> None:
        asked = Request(prompt=text(length, seed), logprobs=1, n=min(n, self.slots), **options)
        self._submit(asked, tenant, None)

    @rule(pick=st.integers(0, 99), more=st.integers(0, 20), tenant=st.sampled_from("ab"))
    def fork(self, pick: int, more: int, tenant: str) -> None:
        ended = [each for each in self.asked if each.handle.done and each.handle.completion().state is not None]
        if ended:
            found = ended[pick % len(ended)].handle.completion()
            prompt = (*found.unread, *text(more, 5)) or (65,)
            asked = Request(prompt=prompt, max_tokens=9, sampling=SAMPLINGS[3], logprobs=0)
            self._submit(asked, tenant, found.state)

    def _submit(self, asked: Request, tenant: str, state: State | None) -> None:
        try:
            handle = self.engine.submit(asked, tenant=tenant, state=state)
        except Refused:
            assert self.engine.waiting == 5
        else:
            self.asked.append(Asked(handle, asked, state))

    @rule(count=st.integers(1, 9))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.engine.turn()

    @precondition(lambda self: self.asked)
    @rule(pick=st.integers(0, 99))
    def cancel(self, pick: int) -> None:
        asked = self.asked[pick % len(self.asked)]
        if not asked.handle.done:
            asked.cancelled = True
            self.engine.cancel(asked.handle)
            self.engine.turn()
            assert asked.handle.done

    @invariant()
    def within_bounds(self) -> None:
        assert self.engine.busy <= self.slots
        assert self.engine.waiting <= 5

    def teardown(self) -> None:
        finish(self.engine)
        assert (self.engine.busy, self.engine.waiting) == (0, 0)
        for asked in self.asked:
            for answer, found in enumerate(asked.handle.completions()):
                sampling = asked.request.sampling
                if sampling.seed is not None:
                    sampling = replace(sampling, seed=sampling.seed + answer)
                wanted = alone(self.model, replace(asked.request, sampling=sampling, n=1), asked.state)
                if found.finish_reason == "cancelled":
                    assert asked.cancelled
                    assert found.tokens == wanted.tokens[: len(found.tokens)]
                else:
                    same(found, wanted)
        stats = self.engine.stats()
        assert stats.tokens_read + stats.tokens_from_snapshots <= sum(len(each.request.prompt) for each in self.asked)


@pytest.mark.parametrize("preset", ["griffin-tiny", "transformer-tiny"])
@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_any_schedule(make_lively: Callable[..., Griffin], preset: str, examples: int) -> None:
    machine = type("Machine", (Schedule,), {"model": make_lively(preset)})
    machine.TestCase.settings = settings(  # type: ignore[attr-defined]
        max_examples=examples, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase("runTest").runTest()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_nothing_leaks_over_a_hundred_thousand_slots(make_lively: Callable[..., Griffin]) -> None:
    """Two tenants' canaries, every freed slot NaN, memory flat: each request gets what its tenant gets alone."""
    model = make_lively(width=16, mlp_width=32, lru_width=16)
    engine = Engine(model, TOKENIZER, slots=64, max_queue=200, poison=True)
    asked = {
        (tenant, seed): Request(prompt=text(3, 10 * len(tenant) + seed), max_tokens=2, sampling=Sampling(temperature=0))
        for tenant in ("a", "bb")
        for seed in range(3)
    }
    wanted = {key: alone(model, request).tokens for key, request in asked.items()}
    assert len(set(wanted.values())) > 3
    keys, done, sizes = list(asked), 0, list[int]()
    while done < 100_000:
        handles = [(key, engine.submit(asked[key], tenant=key[0], keep_state=False)) for key in keys * 32]
        finish(engine)
        for key, handle in handles:
            assert handle.completion().tokens == wanted[key]
        done += len(handles)
        if not done % (192 * 100):
            gc.collect()
            sizes.append(len(gc.get_objects()))
    assert max(sizes) - min(sizes) < 200
