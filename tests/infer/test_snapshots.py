"""Snapshots: what is found is the longest beginning kept, exact, its owner's, and counted truly."""

from __future__ import annotations

import errno
import itertools
import json
import random
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import griffin
from griffin import Griffin, GriffinError, State, Tokenizer, state_file
from griffin.infer.batch import Held
from griffin.infer.engine import Engine
from griffin.infer.generate import generate
from griffin.infer.pages import PAGE, Cut, cut, join
from griffin.infer.prefill import prefill
from griffin.infer.request import Completion, Request, Sampling
from griffin.infer.snapshots import Snapshots, Stats
from griffin.state import from_int8, to_int8

MakeModel = Callable[..., Griffin]
W = 150  # two pages, of which one is not whole
LENGTHS = [1, PAGE - 1, PAGE, W - 1, W, W + 1, W + 2, 2 * W, 10 * W]


def text(length: int, seed: int = 0) -> list[int]:
    randomly = random.Random(seed)
    return [randomly.randrange(256) for _ in range(length)]


def read(model: Griffin, tokens: Sequence[int], state: State | None = None) -> Held:
    """Read tokens on from a state, and give the new state and logits."""
    state = model.new_state(1) if state is None else state
    with torch.no_grad():
        logits = model.logits(prefill(model, state, [tokens], chunk=64))[0]
    return Held(state, logits)


def same(left: State, right: State) -> bool:
    mine, theirs = left.tensors(), right.tensors()
    return left.longest == right.longest and all(torch.equal(mine[name], theirs[name]) for name in theirs)


# Pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
def test_what_is_cut_and_joined_is_the_state_bit_for_bit(
    make_model: MakeModel, family: str, dtype: torch.dtype
) -> None:
    model = make_model(family, dtype=dtype, **({} if family == "transformer-tiny" else {"window": W}))
    state, tokens, earlier, start = model.new_state(1), text(LENGTHS[-1]), None, 0
    for length in LENGTHS:
        held = read(model, tokens[start:length], state)
        kept = cut(state, held.logits, earlier=earlier)
        back = join(kept, model)
        assert kept.position == length
        if family == "transformer-tiny":  # whose slots are more than the tokens
            back.reserve_(next(iter(state.layers)).keys.shape[1])  # type: ignore[union-attr]
            after = torch.tensor([text(30, seed=1)])
            with torch.no_grad():
                assert torch.allclose(model(after, back), model(after, state.clone()), atol=1e-5, rtol=1e-2)
        else:
            assert same(back, state), length
        assert kept.logits is not None
        assert torch.equal(kept.logits, held.logits)  # type: ignore[arg-type]
        earlier, start = kept, length


def test_pages_are_shared_where_every_bit_is_the_same(make_model: MakeModel) -> None:
    model = make_model(window=W)
    state, tokens = model.new_state(1), text(400)
    read(model, tokens[:300], state)
    first = cut(state, None)
    read(model, tokens[300:310], state)
    second = cut(state, None, earlier=first)
    assert [page.start for page in first.pages] == [300 - W - 1, 256]
    assert second.pages[0] is first.pages[0]  # 149 .. 255, of which it needs 159 .. 255
    assert second.pages[1] is not first.pages[1]
    assert second.pages[1].window.shape[1] == 310 - 256
    assert same(join(second, model), state)
    layer = state.layers[2]
    layer.keys[0, 200 % (W + 1), 0, 0] *= -1  # type: ignore[union-attr]
    third = cut(state, None, earlier=first)
    assert third.pages[0] is not first.pages[0]
    assert same(join(third, model), state)
    layer.keys[0, 310 % (W + 1)] += 1  # type: ignore[union-attr]  # the slot of the token 159, the oldest
    assert same(join(cut(state, None, earlier=second), model), state)


def test_what_a_state_keeps_is_as_large_after_a_million_tokens(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(window=W)
    state = read(model, text(10)).state
    sizes = []
    for length in (2_048, 2_048 + 7_800 * PAGE):  # alike within a page, which is all that could differ
        state.position.fill_(length)
        state.longest = length
        kept = cut(state, None)
        state_file.save(state, tmp_path / "state", model)
        sizes.append((kept.own_bytes(), sum(page.nbytes for page in kept.pages)))
        sizes[-1] += ((tmp_path / "state").stat().st_size // 64,)  # the header names the number of tokens
        snapshots = Snapshots(model, max_bytes=10**8)
        snapshots.keep([1] * length, Held(state, None))
        assert snapshots.stats.nbytes == sum(sizes[-1][:2]) + 4 * length
    assert length > 1_000_000
    assert sizes[0] == sizes[1]


# Keys and values in 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_eight_bits_are_within_half_a_step_and_lose_once(dtype: torch.dtype) -> None:
    x = torch.randn(50, 3, 64, dtype=torch.float64) * torch.logspace(-6, 3, 50, dtype=torch.float64)[:, None, None]
    x[0], x[1, 0, 0] = 0, 127 / 128
    x = x.to(dtype)
    x[2] = torch.finfo(dtype).tiny
    x[3, 0, 0] = 65504  # fp16's largest
    q, e = to_int8(x)
    back = from_int8(q, e, dtype)
    assert q.dtype == e.dtype == torch.int8
    assert back.isfinite().all()
    step = torch.exp2(e.double())[..., None]
    inside = back.double().abs() < 65504
    assert ((back.double() - x.double()).abs() <= step / 2)[inside & (step > 2.0**-126)].all()
    largest = x.double().abs().amax(-1)
    assert (step[..., 0] < largest / 127 * 2)[largest > 1e-30].all()  # the smallest that fits
    again = to_int8(back)
    assert torch.equal(again[0][inside.all(-1)], q[inside.all(-1)])
    assert torch.equal(from_int8(*again, dtype), back)


def test_a_window_in_eight_bits_is_stored_in_half_and_loses_once(make_model: MakeModel, tmp_path: Path) -> None:
    model, tokens = make_model(window=W, dtype=torch.bfloat16), text(500)
    held = read(model, tokens)
    exact, small = Snapshots(model, max_bytes=10**8), Snapshots(model, max_bytes=10**8, int8_window=True)
    sizes = []
    for snapshots in (exact, small):
        snapshots.keep(tokens, Held(held.state, None))
        sizes.append(snapshots.stats.nbytes - 4 * len(tokens) - cut(held.state, None).own_bytes())
    K = model.config.head_width
    assert sizes[1] * 2 * K == sizes[0] * (K + 1)  # one exponent for each head
    found = small.find([*tokens, 1])
    assert found is not None
    state = found[1].state
    assert not same(state, held.state)
    small.clear()
    small.keep(tokens, Held(state, None))
    again = small.find([*tokens, 1])
    assert again is not None
    assert same(again[1].state, state)
    state_file.save(held.state, tmp_path / "state", model, int8_window=True)
    assert same(State.load(tmp_path / "state", model), state)
    state_file.save(state, tmp_path / "state", model, int8_window=True)
    assert same(State.load(tmp_path / "state", model), state)


# Found and kept


def test_the_longest_beginning_is_found_and_its_state_is_the_callers(make_model: MakeModel) -> None:
    model, tokens = make_model(window=W), text(400)
    snapshots = Snapshots(model, max_bytes=10**8)
    assert snapshots.find(tokens) is None
    state = model.new_state(1)
    for start, end in itertools.pairwise((0, 100, 300, 350)):
        held = read(model, tokens[start:end], state)
        snapshots.keep(tokens[:end], held if end != 350 else Held(state, None))
    twin = state.clone()
    read(model, tokens[350:], state)  # what was kept is not what goes on
    for length, wanted in ((99, 0), (100, 100), (299, 100), (300, 300), (350, 300), (351, 350), (400, 350)):
        assert snapshots.longest(tokens[:length]) == wanted  # 350 has no logits
        found = snapshots.find(tokens[:length])
        assert (0 if found is None else found[0]) == wanted
    assert found is not None
    assert same(found[1].state, twin)
    found[1].state.position.fill_(0)
    found = snapshots.find(tokens)
    assert found is not None
    assert same(found[1].state, twin)
    assert snapshots.find([*tokens[:99], tokens[99] ^ 1, *tokens[100:]]) is None
    stats = snapshots.stats
    assert (stats.hits, stats.misses, stats.tokens_saved) == (7, 3, 100 + 100 + 300 + 300 + 350 + 350 + 350)
    assert stats.tokens_asked == 400 + 99 + 100 + 299 + 300 + 350 + 351 + 400 + 400 + 400


def test_a_prompt_asked_again_has_its_logits(make_model: MakeModel) -> None:
    model, tokens = make_model(window=W), text(200)
    snapshots = Snapshots(model, max_bytes=10**8)
    held = read(model, tokens)
    snapshots.keep(tokens, Held(held.state, None))
    assert snapshots.find(tokens) is None
    snapshots.keep(tokens, held)
    found = snapshots.find(tokens)
    assert found is not None
    assert found[0] == 200
    assert torch.equal(found[1].logits, held.logits)  # type: ignore[arg-type]
    snapshots.keep(tokens, Held(held.state, None))  # takes nothing away
    assert snapshots.longest(tokens) == 200


def test_neither_tenants_nor_adapters_nor_changed_weights_share(make_model: MakeModel) -> None:
    model, tokens = make_model(), text(40)
    snapshots = Snapshots(model, max_bytes=10**8)
    held = read(model, tokens)
    snapshots.keep(tokens, held, "ann")
    one = snapshots.stats.nbytes
    assert snapshots.longest(tokens, "ann") == 40
    for tenant, adapter in (("", ""), ("bob", ""), ("ann", "style"), ("an", "n")):
        assert snapshots.longest(tokens, tenant, adapter=adapter) == 0
        assert snapshots.find(tokens, tenant, adapter=adapter) is None
    snapshots.keep(tokens, held, "bob")
    assert snapshots.stats.nbytes == 2 * one  # not even bytes
    with torch.no_grad():
        model.embedding.add_(0.01)
    assert snapshots.find(tokens, "ann") is None
    snapshots.keep(tokens, held, "ann")
    model.model.final_norm.weight = torch.nn.Parameter(model.model.final_norm.weight + 1)
    assert snapshots.find(tokens, "ann") is None
    with pytest.raises(GriffinError, match="another model"):
        snapshots.keep(tokens, Held(make_model(seed=1).new_state(1), None))
    with pytest.raises(ValueError, match="does not fit 39 tokens"):
        snapshots.keep(tokens[:39], held)


Kept = tuple[str, tuple[int, ...]]


class Plain:
    """What `Snapshots` must be for a model without windows: a dict, the least recently used first."""

    def __init__(self, model: Griffin, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.state_bytes = cut(model.new_state(1), None).own_bytes()
        self.logit_bytes = 4 * model.config.vocab_size
        self.kept: OrderedDict[Kept, tuple[float, bool]] = OrderedDict()  # a mark, and whether there are logits
        self.stats = Stats()
        self.evictions = self.refused = 0

    def nbytes(self) -> int:
        beginnings = {(who, tokens[:length]) for who, tokens in self.kept for length in range(1, len(tokens) + 1)}
        logits = sum(self.logit_bytes for _, has in self.kept.values() if has)
        return len(self.kept) * self.state_bytes + logits + 4 * len(beginnings)

    def find(self, who: str, tokens: tuple[int, ...]) -> tuple[int, float] | None:
        for length in range(len(tokens), 0, -1):
            kept = self.kept.get((who, tokens[:length]))
            if kept is not None and (length < len(tokens) or kept[1]):
                self.kept.move_to_end((who, tokens[:length]))
                return length, kept[0]
        return None

    def keep(self, who: str, tokens: tuple[int, ...], mark: float, logits: bool) -> None:
        old = self.kept.get((who, tokens))
        if old is None or (logits and not old[1]):
            self.kept[who, tokens] = mark, logits
        self.kept.move_to_end((who, tokens))
        while self.nbytes() > self.max_bytes:
            gone, _ = self.kept.popitem(last=False)
            self.refused += gone == (who, tokens)
            self.evictions += 1


TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple)
ACTIONS = st.tuples(st.sampled_from(["find", "keep", "keep with logits"]), st.sampled_from("ab"), TEXTS)


@given(actions=st.lists(ACTIONS, max_size=60), room=st.integers(0, 6))
def test_it_is_a_dict_with_a_budget(
    make_model: MakeModel, actions: list[tuple[str, str, tuple[int, ...]]], room: int
) -> None:
    model = make_model("hawk-tiny")
    plain = Plain(model, 0)
    plain.max_bytes = room * (plain.state_bytes + 300)
    snapshots = Snapshots(model, max_bytes=plain.max_bytes)
    state, logits, saved, asked, hits = model.new_state(1), torch.zeros(model.config.vocab_size), 0, 0, 0
    for number, (action, who, tokens) in enumerate(actions, start=1):
        if action == "find":
            wanted, found = plain.find(who, tokens), snapshots.find(tokens, who)
            assert (wanted is None) == (found is None)
            asked += len(tokens)
            if wanted is not None and found is not None:
                assert (found[0], float(found[1].state.layers[0].tensors()[0][0, 0])) == wanted
                assert int(found[1].state.position) == found[0]
                saved += found[0]
                hits += 1
        else:
            state.position.fill_(len(tokens))
            state.longest = len(tokens)
            state.layers[0].tensors()[0].fill_(number)
            has = action == "keep with logits"
            plain.keep(who, tokens, number, has)
            snapshots.keep(tokens, Held(state, logits if has else None), who)
        stats = snapshots.stats
        assert (stats.nbytes, stats.snapshots) == (plain.nbytes(), len(plain.kept))
        assert stats.nbytes <= plain.max_bytes
        assert (stats.evictions, stats.refused) == (plain.evictions, plain.refused)
        assert (stats.tokens_saved, stats.tokens_asked, stats.hits) == (saved, asked, hits)
        for who, tokens in plain.kept:
            assert snapshots.longest((*tokens, 9), who) == len(tokens)
    snapshots.clear()
    assert snapshots.stats.nbytes == 0


def nbytes_by_hand(snapshots: Snapshots) -> int:
    kept: list[Cut] = [entry.cut for entry in snapshots._kept.values() if entry.cut is not None]
    pages = {id(page): page.nbytes for each in kept for page in each.pages}
    beginnings = {
        (entry.owner, tuple(node.text()[:length]))
        for node, entry in snapshots._kept.items()
        for length in range(1, node.depth + 1)
    }
    return sum(pages.values()) + sum(each.own_bytes() for each in kept) + 4 * len(beginnings)


@pytest.mark.parametrize("seed", range(3))
def test_shared_pages_are_counted_once_and_freed_last(make_model: MakeModel, seed: int) -> None:
    model, randomly = make_model(window=W), random.Random(seed)
    whole = cut(read(model, text(400)).state, None)
    one = whole.own_bytes() + sum(page.nbytes for page in whole.pages)
    snapshots = Snapshots(model, max_bytes=4 * one)
    texts = [text(400, seed=0), [*text(200, seed=0), *text(200, seed=1)], text(400, seed=2)]
    shared = 0
    for _ in range(25):
        tokens = randomly.choice(texts)[: randomly.randrange(1, 400)]
        found = snapshots.find(tokens)
        start, state = (0, model.new_state(1)) if found is None else (found[0], found[1].state)
        if start < len(tokens):
            snapshots.keep(tokens, read(model, tokens[start:], state), lasting=randomly.random() < 0.5)
        assert snapshots.stats.nbytes == nbytes_by_hand(snapshots) <= 4 * one
        alone = [page.nbytes for entry in snapshots._kept.values() if entry.cut for page in entry.cut.pages]
        shared = max(shared, sum(alone) - sum({id(p): p.nbytes for p in snapshots._holders}.values()))
    assert shared > 0
    assert snapshots.stats.evictions
    snapshots.clear()
    assert snapshots.stats.nbytes == 0


def test_what_lies_on_the_way_is_thinned_further_back_than_a_window(make_model: MakeModel) -> None:
    model, tokens = make_model(window=2 * PAGE), text(64 * PAGE)
    snapshots = Snapshots(model, max_bytes=10**9)
    state = model.new_state(1)
    for length in range(PAGE, len(tokens) + 1, PAGE):
        read(model, tokens[length - PAGE : length], state)
        snapshots.keep(tokens[:length], Held(state, None), lasting=length == 5 * PAGE)
    kept = sorted(node.depth // PAGE for node in snapshots._kept)
    # The newest window whole; then every 2nd page, every 4th up to 4 windows back, every 8th, 16th and 32nd. And 5.
    assert kept == [5, 32, 48, 56, 60, 62, 63, 64]
    assert snapshots.stats.thinned == 64 - len(kept)


# A trace


def turn_out(engine: Engine, request: Request, tenant: str = "") -> Completion:
    handle = engine.submit(request, tenant=tenant)
    while engine.turn():
        pass
    return handle.completion()


def test_a_recorded_trace_with_a_shared_prompt_and_branches(make_lively: MakeModel) -> None:
    """Three people behind one system prompt, turns each, a prompt asked again, its end changed: what is read."""
    model, tokenizer = make_lively(window=W), Tokenizer.bytes()
    snapshots = Snapshots(model, max_bytes=10**8)
    warm, cold = Engine(model, tokenizer, slots=2, snapshots=snapshots), Engine(model, tokenizer, slots=2)
    system = text(500, seed=9)
    seen: set[tuple[int, ...]] = set()
    asked = 0

    def ask(tokens: list[int], borders: list[int]) -> list[int]:
        nonlocal asked
        request = Request(
            prompt=tuple(tokens), borders=tuple(borders), max_tokens=40, sampling=Sampling(temperature=0), logprobs=0
        )
        before = warm.stats().tokens_read
        said, wanted = turn_out(warm, request), turn_out(cold, request)
        assert said.tokens == wanted.tokens
        assert [each.logprob for each in said.logprobs or ()] == pytest.approx(
            [each.logprob for each in wanted.logprobs or ()], abs=1e-4
        )
        # The longest beginning of it that was read before, of which at most 127 tokens are read again.
        shared = next((n for n in range(len(tokens), 0, -1) if tuple(tokens[:n]) in seen), 0)
        again = shared - (len(tokens) - (warm.stats().tokens_read - before))
        assert again <= 127
        whole = (*tokens, *said.tokens[:-1])
        seen.update(whole[:n] for n in range(1, len(whole) + 1))
        asked += 1
        return list(said.tokens)

    for person in range(3):
        tokens, borders = list(system), [len(system)]
        for turn in range(4):
            tokens += text(30 + 60 * turn, seed=100 * person + turn)
            if turn == 2:
                ask([*tokens[:-20], *text(25, seed=77)], borders)
            answer = ask(tokens, borders)
            if turn == 2:
                before = warm.stats().tokens_read
                assert ask(tokens, borders) == answer
                assert warm.stats().tokens_read == before  # its logits were kept
            tokens += answer
            borders.append(len(tokens))
    stats = snapshots.stats
    assert (asked, stats.hits, stats.misses) == (18, 17, 1)
    assert cold.stats().tokens_read == stats.tokens_asked == 14_535
    assert warm.stats().tokens_read == stats.tokens_asked - stats.tokens_saved == 2_210
    assert warm.stats().tokens_from_snapshots == stats.tokens_saved


# The matrix


def answer(
    model: Griffin, tokens: Sequence[int], state: State | None, *, temperature: float
) -> tuple[list[int], list[float]]:
    done = generate(
        model,
        Tokenizer.bytes(),
        [list(tokens)],
        state=state,
        max_tokens=20,
        seed=3,
        temperature=temperature,
        logprobs=0,
        ignore_eos=True,
    )[0]
    return list(done.tokens), [each.logprob for each in done.logprobs or ()]


CASES = [(length, temperature) for length in (W - 1, W, W + 1, 2 * W, 10 * W) for temperature in (0, 1.5)]


def test_cold_hit_forked_and_restored_say_the_same(make_lively: MakeModel, tmp_path: Path) -> None:
    """Around the window, greedy and seeded."""
    model = make_lively(window=W)
    snapshots = Snapshots(model, max_bytes=10**8, folder=tmp_path)
    for length, _ in CASES[::2]:
        tokens = text(length + 5, seed=length)
        snapshots.keep(tokens[:length], read(model, tokens[:length]))
    snapshots.save()
    restored = Snapshots(model, max_bytes=10**8, folder=tmp_path)
    for length, temperature in CASES:
        tokens = text(length + 5, seed=length)
        cold = answer(model, tokens, None, temperature=temperature)
        for kept in (snapshots, restored):
            found = kept.find(tokens)
            assert found is not None
            assert found[0] == length
            for state in (found[1].state, found[1].state.clone()):
                warm = answer(model, tokens[length:], state, temperature=temperature)
                assert warm[0] == cold[0]
                assert warm[1] == pytest.approx(cold[1], abs=1e-4)
    assert restored.stats.file_hits == len(CASES) // 2


@pytest.mark.slow
def test_a_new_process_says_the_same(make_lively: MakeModel, tmp_path: Path) -> None:
    model = make_lively(window=W)
    griffin.save(model, tmp_path / "model", Tokenizer.bytes())
    snapshots = Snapshots(model, max_bytes=10**8, folder=tmp_path / "kept")
    for length, _ in CASES[::2]:
        tokens = text(length + 5, seed=length)
        snapshots.keep(tokens[:length], read(model, tokens[:length]))
    snapshots.save()
    script = f"""
        import json, warnings
        from pathlib import Path
        import torch
        warnings.simplefilter("error")
        torch.set_num_threads(1)
        import griffin
        from griffin.infer.snapshots import Snapshots
        from tests.infer.test_snapshots import CASES, answer, text
        model = griffin.load({str(tmp_path / "model")!r})
        snapshots = Snapshots(model, max_bytes=10**8, folder=Path({str(tmp_path / "kept")!r}))
        for length, temperature in CASES:
            tokens = text(length + 5, seed=length)
            depth, held = snapshots.find(tokens)
            assert depth == length, depth
            print(json.dumps(answer(model, tokens[length:], held.state, temperature=temperature)))
        assert snapshots.stats.file_hits == len(CASES) // 2, snapshots.stats
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, (length, temperature) in zip(done.stdout.splitlines(), CASES, strict=True):
        wanted = answer(model, text(length + 5, seed=length), None, temperature=temperature)
        restored = json.loads(line)
        assert restored[0] == wanted[0]
        assert restored[1] == pytest.approx(wanted[1], abs=1e-4)


# On disk


@pytest.fixture
def said() -> list[str]:
    return []


def test_what_leaves_memory_is_found_on_disk(make_model: MakeModel, tmp_path: Path, said: list[str]) -> None:
    model, tokens = make_model(window=W), text(400)
    held, other = read(model, tokens), read(model, text(300, seed=1))
    snapshots = Snapshots(model, max_bytes=20_000, folder=tmp_path, say=said.append)
    snapshots.keep(tokens, held, "ann")
    snapshots.keep(text(300, seed=1), other, "ann")
    snapshots.keep(text(200, seed=2), read(model, text(200, seed=2)), "ann", lasting=False)
    assert snapshots.stats.snapshots == 1
    assert snapshots.stats.evictions == 2
    assert snapshots.stats.files == 2
    assert snapshots.stats.file_bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert snapshots.stats.nbytes <= 20_000
    found = snapshots.find(tokens, "ann")
    assert found is not None
    assert same(found[1].state, held.state)
    assert torch.equal(found[1].logits, held.logits)  # type: ignore[arg-type]
    assert snapshots.longest(text(200, seed=2), "ann") == 0  # it only lay on the way
    assert snapshots.stats.file_hits == 1
    new = Snapshots(model, max_bytes=10**8, folder=tmp_path, say=said.append)
    assert (new.stats.files, new.stats.snapshots) == (2, 0)
    assert new.find(tokens, "bob") is None
    found = new.find([*text(300, seed=1), 5], "ann")
    assert found is not None
    assert same(found[1].state, other.state)
    assert not said


def test_files_have_a_budget_too(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    texts = [text(50, seed=seed) for seed in range(4)]
    all_of_them = Snapshots(model, max_bytes=0, folder=tmp_path)
    for tokens in texts:
        all_of_them.keep(tokens, read(model, tokens))
        assert all_of_them.stats.nbytes == 0  # nor is there an index of files, which takes memory
    snapshots = Snapshots(model, max_bytes=10**6, folder=tmp_path)
    for tokens in texts:
        snapshots.keep(tokens, read(model, tokens))
    snapshots.save()
    assert snapshots.stats.files == 4
    size = snapshots.stats.file_bytes // 4
    few = Snapshots(model, max_bytes=10**6, max_file_bytes=2 * size + 10, folder=tmp_path)
    assert few.stats.files == 2 == len(list(tmp_path.rglob("*.safetensors")))
    assert few.longest([*texts[3], 0]) == 50
    assert few.longest([*texts[0], 0]) == 0


def test_every_flipped_byte_is_found_and_done_without(make_model: MakeModel, tmp_path: Path, said: list[str]) -> None:
    model, tokens = make_model("hawk-tiny", lru_width=8, num_gate_blocks=2), text(30)
    snapshots = Snapshots(model, max_bytes=10**6, folder=tmp_path)
    snapshots.keep(tokens[:20], read(model, tokens[:20]))
    snapshots.keep(tokens, read(model, tokens))
    snapshots.save()
    (long,) = (file for file in tmp_path.rglob("*") if snapshots.stats and file.is_file() and _length(file) == 30)
    data = long.read_bytes()
    bits = random.Random(0)
    for at in range(0, len(data), 11):
        long.write_bytes(data[:at] + bytes([data[at] ^ 1 << bits.randrange(8)]) + data[at + 1 :])
        new = Snapshots(model, max_bytes=10**6, folder=tmp_path, say=said.append)
        found = new.find([*tokens, 7])
        assert found is not None
        assert found[0] == 20 or torch.equal(found[1].state.position, torch.tensor([30])), at
        assert found[0] == 20, at
        assert new.stats.file_failures == 1
        assert len(said.pop().splitlines()) == 1
        assert not said
    long.write_bytes(data)
    found = Snapshots(model, max_bytes=10**6, folder=tmp_path).find([*tokens, 7])
    assert found is not None
    assert found[0] == 30


def test_a_file_that_became_anothers_is_not_believed(make_model: MakeModel, tmp_path: Path, said: list[str]) -> None:
    model, texts = make_model(), [text(50, seed=1), text(50, seed=2)]
    snapshots = Snapshots(model, max_bytes=10**6, folder=tmp_path, say=said.append)
    for tokens in texts:
        snapshots.keep(tokens, read(model, tokens))
    snapshots.save()
    snapshots.clear()
    left, right = tmp_path.rglob("*.safetensors")
    left.write_bytes(right.read_bytes())
    found = [snapshots.find([*tokens, 1]) is not None for tokens in texts]
    assert sorted(found) == [False, True]
    assert "it is not the snapshot that its name says" in said.pop()
    assert not left.exists()
    again = Snapshots(model, max_bytes=10**6, folder=tmp_path, say=said.append)
    assert (again.stats.files, said) == (1, [])


def _length(file: Path) -> int:
    return len(state_file.peek(file, {"tokens": state_file.Vector(torch.int32)})[2]["tokens"])


def test_a_disk_that_fails_is_said_and_done_without(
    make_model: MakeModel, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = make_model(), text(50)
    held = read(model, tokens)
    # Full.
    snapshots = Snapshots(model, max_bytes=10**6, folder=tmp_path, say=said.append)
    snapshots.keep(tokens, held)
    with monkeypatch.context() as patch:
        patch.setattr(
            "griffin.files._sync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        )
        snapshots.save()
        snapshots.save()
    assert len(said) == 1  # the same again is not said again
    assert said.pop() == "a snapshot is not kept on disk: [Errno 28] No space left on device"
    assert snapshots.stats.file_failures == 2
    assert not list(tmp_path.rglob("*.*"))
    assert snapshots.find([*tokens, 1]) is not None  # from memory
    # Read-only, or not a folder at all.
    (tmp_path / "file").write_text("")
    blocked = Snapshots(model, max_bytes=10**6, folder=tmp_path / "file", say=said.append)
    blocked.keep(tokens, held)
    blocked.save()
    assert "a snapshot is not kept on disk: " in said.pop()
    assert blocked.find([*tokens, 1]) is not None
    # Gone.
    snapshots.save()
    snapshots.clear()
    (file,) = tmp_path.rglob("*.safetensors")
    file.unlink()
    assert snapshots.longest([*tokens, 1]) == 50
    assert snapshots.find([*tokens, 1]) is None
    assert f"a snapshot is read again from its text: {file} does not exist" in said.pop()
    assert snapshots.stats.nbytes == 0
    # Another model's, under this model's name.
    snapshots.keep(tokens, held)
    snapshots.save()
    with torch.no_grad():
        model.embedding.add_(0.5)
    changed = Snapshots(model, max_bytes=10**6, folder=tmp_path, say=said.append)
    assert changed.stats.files == 0


def test_stats_are_whole_in_every_thread(make_model: MakeModel) -> None:
    model = make_model("hawk-tiny")
    snapshots, done, wrong = Snapshots(model, max_bytes=10**6), threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            stats = snapshots.stats
            if stats.hits * 10 != stats.tokens_saved:
                wrong.append(stats)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        snapshots.keep(text(10), read(model, text(10)))
        for _ in range(60):
            snapshots.find([*text(10), 1])
    finally:
        done.set()
        thread.join()
    assert not wrong


def test_a_budget_is_not_negative(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="max_bytes=-1"):
        Snapshots(make_model(), max_bytes=-1)
