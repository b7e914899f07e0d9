"""Sessions: what is restored goes on as what never left; files and names are believed only as far as they can be."""

from __future__ import annotations

import errno
import io
import json
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import griffin
from griffin import Griffin, GriffinError, Tokenizer, state_file
from griffin.infer.answered import Answered
from griffin.infer.batch import Held
from griffin.infer.engine import Engine
from griffin.infer.grammar import Grammar
from griffin.infer.handle import Handle
from griffin.infer.request import Completion, Request, Sampling
from griffin.infer.sessions import Changed, Full, NoSession, Session, Sessions
from tests.fuzz import attack

MakeModel = Callable[..., Griffin]
TOKENIZER = Tokenizer.bytes()
W = 20


def no_words(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def model(make_lively: MakeModel) -> Griffin:
    return make_lively(window=W)


def open_sessions(model: Griffin, folder: Path | None = None, **options: Any) -> Sessions:
    return Sessions(model, TOKENIZER.fingerprint(), folder=folder, **{"say": no_words, **options})


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    randomly = random.Random(seed)
    return tuple(randomly.randrange(32, 127) for _ in range(length))


def finish(engine: Engine, handle: Handle) -> Completion:
    while engine.turn():
        pass
    return handle.completion()


def say(engine: Engine, session: Session, tokens: tuple[int, ...], **options: Any) -> Handle:
    request = Request(prompt=(*session.unread, *tokens), **options)
    handle = engine.submit(request, state=session.start)
    finish(engine, handle)
    return handle


def same(left: Session, right: Session) -> bool:
    mine, theirs = left.held.state.tensors(), right.held.state.tensors()
    return left.unread == right.unread and all(torch.equal(mine[name], theirs[name]) for name in theirs)


TURNS = [W - 1, 1, W + 1, 3, 2 * W, 10 * W, 5]  # so that a turn ends before, at and behind the window


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_it_goes_on_whatever_was_done_to_it(model: Griffin, tmp_path: Path, temperature: float) -> None:
    """Each turn after another act; the answers are those of a conversation read in one piece."""
    engine, sessions = Engine(model, TOKENIZER, slots=1), open_sessions(model, tmp_path)
    session, read = sessions.create(), ()
    acts = ["nothing", "save and restore", "fork", "export and import", "restart", "append", "nothing"]
    for seed, (length, act) in enumerate(zip(TURNS, acts, strict=True)):
        turn = text(length, seed)
        if act == "save and restore":
            sessions.save(session.name)
            spoilt = sessions.put(session, replace(session, held=Held(model.new_state(1), None)))
            assert not same(spoilt, session)
            restored = sessions.restore(session.name)
            assert same(restored, session)
            session = restored
        elif act == "fork":
            session = sessions.fork(session.name)
        elif act == "export and import":
            sessions.export(session.name, tmp_path / "out")
            session = sessions.import_(io.BytesIO((tmp_path / "out").read_bytes()))
        elif act == "restart":
            sessions.save_all()
            sessions = open_sessions(model, tmp_path)
            session = sessions.get(session.name)
        elif act == "append":
            session, turn = sessions.append(session.name, turn), ()
        options: dict[str, Any] = {
            "max_tokens": 12,
            "logprobs": 0,
            "sampling": Sampling(temperature=temperature, seed=seed),
        }
        handle = say(engine, session, turn, **options)
        said = handle.completion()
        read = (*read, *(turn or text(length, seed)))
        whole = finish(engine, engine.submit(Request(prompt=read, **options)))
        assert said.tokens == whole.tokens, act
        for mine, theirs in zip(said.logprobs or (), whole.logprobs or (), strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        session = sessions.put(session, session.after(handle, note={"turn": str(seed)}))
        read = (*read, *said.tokens)
        assert session.tokens_read + len(session.unread) == len(read)
        assert sessions.get(session.name).note == {"turn": str(seed)}
    assert len(sessions.names()) == 3


CUTS: dict[str, dict[str, Any]] = {
    "greedy": {"sampling": Sampling(temperature=0)},
    "seeded": {"sampling": Sampling(temperature=1.3, top_k=50, seed=5), "logprobs": 2},
    "unseeded": {"sampling": Sampling(temperature=1.3)},
    "repetition": {"sampling": Sampling(temperature=0.9, repetition_penalty=1.4, seed=1)},
    "penalties": {"sampling": Sampling(temperature=0.9, presence_penalty=0.5, frequency_penalty=0.7, seed=2)},
    "bias": {
        "sampling": Sampling(temperature=1, logit_bias={70: 3.0, 71: -float("inf")}, frequency_penalty=1.0, seed=3),
        "min_tokens": 12,
        "stop_ids": frozenset(range(60, 90)),
    },
    "grammar": {"sampling": Sampling(temperature=1.2, seed=4), "grammar": Grammar.regex("([a-f]{3},|[0-9]+;){30}")},
}


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_answer_goes_on_as_if_it_had_not_been(model: Griffin, tmp_path: Path, kind: str) -> None:
    engine = Engine(model, TOKENIZER, slots=3, poison=True)
    request = Request(prompt=text(2 * W), max_tokens=30, **CUTS[kind])
    for least in (1, 5, 13, 28):
        # One that never leaves beside one that does, drawing the same numbers where no seed is given.
        stays, leaves = engine.submit(request), engine.submit(request)
        leaves.rows[0].generator.manual_seed(stays.rows[0].generator.initial_seed())
        while len(leaves.rows[0].tokens) < least and engine.turn():
            pass
        engine.cancel(leaves)
        finish(engine, leaves)
        cut = len(leaves.rows[0].tokens)
        whole = stays.completion()
        if leaves.completion().finish_reason != "cancelled":  # it ended by itself
            assert kind == "bias"
            assert Answered.of(leaves) is None
            continue
        sessions = open_sessions(model, tmp_path)
        session = sessions.create()
        session = sessions.put(session, session.after(leaves))
        assert session.tokens_read + len(session.unread) == 2 * W + cut
        sessions.save_all()
        answered = open_sessions(model, tmp_path).get(session.name).answered
        assert answered is not None
        engine.submit(request)  # a neighbour
        again = engine.submit(answered.request, state=answered)
        pieces = [piece.tokens for piece in again_pieces(engine, again)]
        done = again.completion()
        assert done.tokens == whole.tokens
        assert (done.text, done.finish_reason, done.unread) == (whole.text, whole.finish_reason, whole.unread)
        assert sum(pieces, ()) == whole.tokens[cut:]  # only what is new
        for mine, theirs in zip(done.logprobs or (), whole.logprobs or (), strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [index for index, _ in mine.top] == [index for index, _ in theirs.top]
        assert done.state is not None
        assert whole.state is not None
        for name, tensor in whole.state.tensors().items():
            assert torch.allclose(done.state.tensors()[name], tensor, atol=1e-4), name


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_an_answer_that_was_guessed_ahead_goes_on_too(model: Griffin, temperature: float) -> None:
    """The state may then lack several of its tokens."""
    plain, guessing = Engine(model, TOKENIZER, slots=1), Engine(model, TOKENIZER, slots=1, speculate=True)
    sampling = Sampling(temperature=temperature, top_k=2, seed=1)
    request = Request(prompt=5 * text(8), max_tokens=40, stop=("\0\1",), sampling=sampling)
    whole, lacks = finish(plain, plain.submit(request)), set()
    for least in range(1, 30, 3):
        handle = guessing.submit(request)
        while len(handle.rows[0].tokens) < least:
            guessing.turn()
        guessing.cancel(handle)
        finish(guessing, handle)
        answered = Answered.of(handle)
        assert answered is not None
        lacks.add(len(answered.unread))
        done = finish(guessing, guessing.submit(answered.request, state=answered))
        assert (done.tokens, done.text) == (whole.tokens, whole.text)
    assert max(lacks) > 1


def again_pieces(engine: Engine, handle: Handle) -> list[Any]:
    finish(engine, handle)
    return list(handle)


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_string_and_a_character_may_lie_across_the_cut(
    model: Griffin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """The answer is "a東\\nUser:", and the stop string "\\nUser:"; a token is a byte."""
    from griffin.infer import batch

    script = "a東\nUser:".encode()
    engine, plain = Engine(model, TOKENIZER, slots=1), batch.read_each
    request = Request(prompt=text(2 * W), max_tokens=30, stop=("\nUser:",), sampling=Sampling(temperature=0))
    left = iter(script)

    def read(chosen: Any) -> Any:
        choice, faults = plain(chosen)
        choice.ids[0] = next(left)
        return choice, faults

    monkeypatch.setattr(batch, "read_each", read)
    handle = engine.submit(request)
    while len(handle.rows[0].tokens) < cut:
        engine.turn()
    engine.cancel(handle)
    finish(engine, handle)
    sessions = open_sessions(model, tmp_path)
    session = sessions.create()
    session = sessions.put(session, session.after(handle))
    sessions.save_all()
    answered = open_sessions(model, tmp_path).get(session.name).answered
    assert answered is not None
    done = finish(engine, engine.submit(answered.request, state=answered))
    assert (done.text, done.finish_reason) == ("a東", "stop")
    shown = [*request.prompt, *"a東".encode()]
    assert done.state is not None
    assert int(done.state.position[0]) + len(done.unread) == len(shown)
    turn = list(text(5))
    with torch.no_grad():
        seen = model.logits(model(torch.tensor([[*done.unread, *turn]]), done.state))[0, -1]
        fresh = model.logits(model(torch.tensor([[*shown, *turn]])))[0, -1]
    assert torch.allclose(seen, fresh, atol=1e-4)


def test_what_is_no_answer_is_refused(model: Griffin) -> None:
    engine = Engine(model, TOKENIZER, slots=2)
    request = Request(prompt=(65,), max_tokens=5, stop=("AB",), sampling=Sampling(temperature=0))
    state = model.new_state(1)
    good = Answered(request, (65, 66), seed=0, num_read=1, state=state)
    for wrong in ({"tokens": ()}, {"num_read": 2}, {"tokens": (1,) * 5}, {"seed": -1}, {"logprobs": ()}):
        with pytest.raises(GriffinError):
            replace(good, **wrong)  # type: ignore[arg-type]
    with pytest.raises(GriffinError, match="ended with its token 2"):
        engine.submit(request, state=good)
    with pytest.raises(GriffinError, match="with the request it was given"):
        engine.submit(replace(request, max_tokens=6), state=good)
    assert Answered.of(engine.submit(request)) is None  # not ended


def test_names_are_the_servers_and_tenants_are_apart(model: Griffin, tmp_path: Path) -> None:
    sessions = open_sessions(model, tmp_path / "kept")
    ann, bob = sessions.create("ann"), sessions.create("bob")
    assert sessions.names("ann") == [ann.name] != sessions.names("bob")
    secret = tmp_path / "kept" / "x.session"
    for name in (bob.name, "../x", "x", "", "a" * 26, str(secret), ann.name.upper(), ann.name + "\n", "\0"):
        for act in (sessions.get, sessions.fork, sessions.save, sessions.restore, sessions.delete):
            with pytest.raises(NoSession, match="there is no session"):
                act(name, "ann")
        with pytest.raises(NoSession):
            sessions.append(name, (1,), "ann")
        with pytest.raises(NoSession):
            sessions.export(name, tmp_path / "out", "ann")
    assert not (tmp_path / "out").exists()
    with pytest.raises(NoSession, match="never saved"):
        sessions.restore(ann.name, "ann")
    sessions.save_all()
    sessions.delete(bob.name, "bob")
    assert sessions.names("bob") == []
    assert [file.stem for file in tmp_path.rglob("*.session")] == [ann.name]
    again = open_sessions(model, tmp_path / "kept")
    assert (again.names("ann"), again.names("bob"), again.names()) == ([ann.name], [], [])
    sessions.export(ann.name, tmp_path / "out", "ann")
    assert b"ann" not in (tmp_path / "out").read_bytes()


def test_whoever_goes_on_from_the_past_is_told(model: Griffin, tmp_path: Path) -> None:
    sessions = open_sessions(model, tmp_path, max_bytes=3 * model.new_state(1).nbytes)
    before = sessions.create()
    after = sessions.put(before, replace(before, unread=(1, 2)))
    with pytest.raises(Changed, match="has gone on meanwhile"):
        sessions.put(before, replace(before, unread=(3,)))
    assert sessions.get(before.name).unread == (1, 2)
    for _ in range(5):  # it leaves memory and comes back, which is no change
        sessions.create()
    assert sessions.put(after, replace(after, unread=(1, 2, 3))).unread == (1, 2, 3)
    with pytest.raises(GriffinError, match=r"not all within 0 \.\. 258"):
        sessions.append(before.name, (5, 259))
    sessions.delete(before.name)
    with pytest.raises(NoSession):
        sessions.put(after, after)


def test_memory_and_numbers_are_bounded(model: Griffin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, said = model.new_state(1).nbytes, list[str]()
    sessions = open_sessions(model, max_bytes=2 * one)
    first = sessions.create()
    sessions.fork(first.name)
    with pytest.raises(Full, match="or give a folder"):
        sessions.create()
    assert len(sessions.names()) == 2
    assert sessions.nbytes == 2 * one
    with pytest.raises(GriffinError, match="no folder"):
        sessions.save(first.name)
    few = open_sessions(model, tmp_path, most=3)
    for _ in range(3):
        few.create()
    with pytest.raises(Full, match="there are 3 sessions"):
        few.create()
    disk = open_sessions(model, tmp_path / "b", max_bytes=2 * one, say=said.append)
    made = [disk.create(note={"n": str(n)}) for n in range(10)]
    assert disk.nbytes == 2 * one
    assert [disk.get(each.name).note["n"] for each in made] == [str(n) for n in range(10)]
    assert disk.nbytes == 2 * one
    monkeypatch.setattr(
        "griffin.files._sync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    changed = disk.append(made[9].name, (1,))
    disk.create()  # in place of one that is on disk as it is
    with pytest.raises(Full):
        disk.create()
    assert said
    assert "stays in memory: [Errno 28] No space left on device" in said[0]
    assert disk.get(made[9].name) is changed
    assert all(disk.get(each.name).note for each in made)


def test_sizes_do_not_grow_with_what_was_read(model: Griffin, tmp_path: Path) -> None:
    sessions = open_sessions(model, tmp_path)
    sizes = []
    for position in (2_000, 1_000_000):
        session = sessions.create()
        state = model.new_state(1)
        state.position.fill_(position)
        state.longest = position
        session = sessions.put(session, replace(session, held=Held(state, None)))
        sessions.save(session.name)
        (file,) = tmp_path.rglob(f"{session.name}.session")
        sizes.append((session.nbytes, file.stat().st_size))
    assert sizes[0][0] == sizes[1][0]
    assert abs(sizes[0][1] - sizes[1][1]) < 64  # the header's numbers have more digits


@pytest.fixture
def cut_session(model: Griffin) -> Session:
    """With everything a session may have, but a grammar."""
    engine = Engine(model, TOKENIZER, slots=1)
    sampling = Sampling(temperature=1.3, top_k=50, seed=5, logit_bias={70: 3.0, 71: -float("inf")})
    request = Request(
        prompt=text(30), max_tokens=30, stop=("ab",), stop_ids=frozenset((5,)), sampling=sampling, logprobs=1
    )
    handle = engine.submit(request)
    while len(handle.rows[0].tokens) < 5:
        engine.turn()
    engine.cancel(handle)
    finish(engine, handle)
    session = open_sessions(model).create("ann", note={"messages": "[]"})
    return session.after(handle)


def test_a_fuzzer_finds_nothing(model: Griffin, cut_session: Session, tmp_path: Path) -> None:
    sessions = open_sessions(model)
    session = sessions.put(sessions.create(), cut_session)
    assert session.answered is not None
    sessions.export(session.name, tmp_path / "out")

    def read() -> Session:
        with (tmp_path / "out").open("rb") as source:
            return sessions.import_(source)

    def unchanged(found: Session) -> bool:
        sessions.delete(found.name)
        mine, theirs = found.answered, session.answered
        return (
            same(found, session)
            and found.note == session.note
            and mine is not None
            and theirs is not None
            and (mine.request, mine.tokens, mine.seed, mine.num_read, mine.logprobs)
            == (theirs.request, theirs.tokens, theirs.seed, theirs.num_read, theirs.logprobs)
        )

    attack([tmp_path / "out"], read, unchanged, seconds=1)


@pytest.mark.parametrize(
    "change",
    [
        *("x", 5, None, []),
        *(
            {"name": 5},
            {"tenant": None},
            {"version": 1},
            {"used_s": "now"},
            {"used_s": float("nan")},
            {"created_s": True},
        ),
        *(
            {"unread": 5},
            {"unread": [-1]},
            {"unread": [259]},
            {"unread": [True]},
            {"unread": [1.0]},
            {"unread": [10**30]},
        ),
        *(
            {"note": 5},
            {"note": {"a": 1}},
            {"note": ["a"]},
            {"tokenizer": "x"},
            {"more": 1},
            {"answered": 5},
            {"answered": {}},
        ),
        *({"answered.seed": -1}, {"answered.seed": 2**64}, {"answered.seed": 1.5}, {"answered.num_read": 99}),
        *({"answered.tokens": []}, {"answered.tokens": [300]}, {"answered.logprobs": []}, {"answered.logprobs": None}),
        *({"answered.logprobs": [[0, [[1]]]] * 5}, {"answered.logprobs": [["a", []]] * 5}, {"answered.more": 1}),
        *(
            {"request.max_tokens": -1},
            {"request.max_tokens": 5},
            {"request.max_tokens": True},
            {"request.min_tokens": 99},
        ),
        *({"request.stop": "ab"}, {"request.stop": [""]}, {"request.stop": ["a"] * 65}, {"request.stop": ["a" * 4097]}),
        *({"request.stop_ids": [-5]}, {"request.stop_ids": "5"}, {"request.logprobs": -1}, {"request.prompt": [259]}),
        *({"request.n": 2}, {"request.sampling": None}, {"sampling.temperature": -1}, {"sampling.temperature": None}),
        *({"sampling.temperature": "1"}, {"sampling.top_k": 1.5}, {"sampling.top_k": 0}, {"sampling.seed": -1}),
        *({"sampling.top_p": float("inf")}, {"sampling.logit_bias": {"x": 1}}, {"sampling.logit_bias": {"259": 1}}),
        *({"sampling.logit_bias": {"7": float("inf")}}, {"sampling.logit_bias": {"7": "a"}}, {"sampling.more": 1}),
        *({"request.grammar": "x"}, {"request.grammar": {"kind": "xml", "text": ""}}),
        *({"request.grammar": {"kind": [], "text": ""}}, {"request.grammar": {"kind": "json", "text": 5}}),
        *({"sampling.logit_bias": {"9" * 5000: 1}}, {"sampling.logit_bias": {"²": 1}}),
    ],
)
def test_forged_sessions_are_refused_in_one_line(
    model: Griffin, cut_session: Session, tmp_path: Path, change: Any
) -> None:
    sessions = open_sessions(model)
    session = sessions.put(sessions.create(), cut_session)
    sessions.export(session.name, tmp_path / "out")
    state, metadata = state_file.load_both(tmp_path / "out", model)
    content = json.loads(metadata["session"])
    for spoilt in (False, True):
        if spoilt and isinstance(change, dict):
            ((path, value),) = change.items()
            place, _, key = path.rpartition(".")
            answered = content["answered"]
            inner = {"": content, "answered": answered, "request": answered["request"]}
            (inner | {"sampling": answered["request"]["sampling"]})[place][key] = value
        elif spoilt:
            content = change
        state_file.save(state, tmp_path / "forged", model, metadata={"session": json.dumps(content)})
        with (tmp_path / "forged").open("rb") as source:
            if not spoilt:
                assert sessions.import_(source).answered is not None
                continue
            with pytest.raises(GriffinError) as caught:
                sessions.import_(source)
        assert len(str(caught.value).splitlines()) == 1
    assert len(sessions.names()) == 2


def test_no_more_is_read_than_a_session_can_have(model: Griffin) -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            self.taken += size
            return bytes(size)

    source = Endless()
    with pytest.raises(GriffinError, match="which no session of this model has"):
        open_sessions(model).import_(source)  # type: ignore[arg-type]
    assert source.taken < 80 * 2**20


def test_damaged_files_are_said_and_left(model: Griffin, tmp_path: Path) -> None:
    sessions = open_sessions(model, tmp_path)
    good, bad = sessions.create(), sessions.create()
    sessions.save_all()
    (file,) = tmp_path.rglob(f"{bad.name}.session")
    data = file.read_bytes()
    (file.parent / "notes.session").write_text("mine")
    file.write_bytes(data[:-9])
    said: list[str] = []
    again = open_sessions(model, tmp_path, say=said.append)
    assert again.names() == [good.name]
    assert len(said) == 2
    assert all(len(line.splitlines()) == 1 for line in said)
    assert file.exists()
    assert (file.parent / "notes.session").exists()
    for at in range(0, len(data), 61):  # whatever is damaged, nothing else is read
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        late = open_sessions(model, tmp_path, say=said.append)
        with pytest.raises(GriffinError):
            late.get(bad.name)
    file.write_bytes((file.parent / f"{good.name}.session").read_bytes())
    with pytest.raises(GriffinError, match="is another session's"):
        open_sessions(model, tmp_path, say=said.append).get(bad.name)


def test_threads_may_share_them(model: Griffin, tmp_path: Path) -> None:
    sessions = open_sessions(model, tmp_path, max_bytes=4 * model.new_state(1).nbytes)
    name, done, wrong = sessions.create().name, [0] * 4, list[BaseException]()

    def work(number: int) -> None:
        try:
            for _ in range(10):
                while True:
                    before = sessions.get(name)
                    try:
                        sessions.put(before, replace(before, unread=(*before.unread, number)))
                        break
                    except Changed:
                        continue
                done[number] += 1
                sessions.delete(sessions.fork(name).name)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(sessions.get(name).unread) == sorted(10 * [0, 1, 2, 3])


@pytest.mark.slow
def test_a_new_process_goes_on_in_the_middle_of_an_answer(model: Griffin, tmp_path: Path) -> None:
    griffin.save(model, tmp_path / "model", TOKENIZER)
    engine, sessions = Engine(model, TOKENIZER, slots=1), open_sessions(model, tmp_path / "kept")
    sampling = Sampling(temperature=1.1, repetition_penalty=1.2, seed=9)
    request = Request(prompt=text(10 * W), max_tokens=40, sampling=sampling)
    whole = finish(engine, engine.submit(request))
    handle = engine.submit(request)
    while len(handle.rows[0].tokens) < 17:
        engine.turn()
    engine.cancel(handle)
    finish(engine, handle)
    session = sessions.create("ann")
    sessions.put(session, session.after(handle))
    sessions.save_all()
    script = f"""
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        import griffin
        from griffin.infer.engine import Engine
        from griffin.infer.sessions import Sessions
        folder = {str(tmp_path / "model")!r}
        model, tokenizer = griffin.load(folder), griffin.load_tokenizer(folder)
        sessions = Sessions(model, tokenizer.fingerprint(), folder=Path({str(tmp_path / "kept")!r}), say=print)
        (name,) = sessions.names("ann")
        answered, engine = sessions.get(name, "ann").answered, Engine(model, tokenizer, slots=1)
        handle = engine.submit(answered.request, state=answered)
        while engine.turn():
            pass
        print(list(handle.completion().tokens))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(whole.tokens)
