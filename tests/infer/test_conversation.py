from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from griffin import Griffin, GriffinError, Tokenizer, state_file
from griffin.infer import batch
from griffin.infer.conversation import METADATA, Conversation
from griffin.infer.generate import generate
from griffin.tokenizer.chat_template import GEMMA
from tests.fuzz import attack

TURNS = ["Hello there!", "What is <end_of_turn> in the middle?", "And 東京?\n", "Bye"]
OPTIONS: dict[str, Any] = {"temperature": 1.3, "max_tokens": 25, "stop_ids": range(5, 40)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 3], 270, chat_template=GEMMA)


@pytest.fixture
def model(make_lively: Callable[..., Griffin], tokenizer: Tokenizer) -> Griffin:
    return make_lively(vocab_size=tokenizer.vocab_size)


def say(conversation: Conversation, text: str, **options: Any) -> tuple[str, tuple[int, ...], str | None]:
    pieces = list(conversation.reply(text, **{**OPTIONS, **options}))
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return "".join(map(str, pieces)), tokens, pieces[-1].finish_reason


def test_a_turn_reads_only_what_is_new(model: Griffin, tokenizer: Tokenizer) -> None:
    """Every answer is that of a model which reads the whole conversation from its first token."""
    conversation = Conversation(model, tokenizer)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    read: list[int] = []
    reasons = []
    for seed, text in enumerate(TURNS):
        turn = tokenizer.encode_chat_turn([*conversation.messages, {"role": "user", "content": text}])
        read += turn
        by_itself = {"max_tokens": 99} if seed % 2 else {"max_tokens": 9, "stop_ids": ()}
        options = {**OPTIONS, "seed": seed, **by_itself}
        fresh = generate(model, tokenizer, [read], **options)[0]
        sizes.clear()
        _, tokens, reason = say(conversation, text, **options)
        assert tokens == fresh.tokens
        assert sizes[0] == len(turn) + (reasons[-1:] == ["length"])  # the token that was cut off comes first
        read += tokens
        reasons.append(reason)
        assert conversation.tokens_read + len(conversation.unread) == len(read)
    assert set(reasons[:-1]) == {"stop", "length"}
    assert [message["content"] for message in conversation.messages[::2]] == TURNS
    assert [message["role"] for message in conversation.messages] == 4 * ["user", "assistant"]


def test_the_first_turn_is_the_whole_template(model: Griffin, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    list(conversation.reply("Hi", max_tokens=0))
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert conversation.tokens_read == len(prompt)
    assert tokenizer.decode(prompt, skip_special=False) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_forks_go_on_independently(model: Griffin, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    say(conversation, TURNS[0], seed=1)
    left, right = conversation.fork(), conversation.fork()
    one = say(left, TURNS[1], seed=2)
    say(left, TURNS[2], seed=2)
    assert len(conversation.messages) == len(right.messages) == 2
    assert say(right, TURNS[1], seed=2) == one == say(conversation, TURNS[1], seed=2)


@pytest.mark.parametrize("seed", range(3))
def test_saved_and_loaded_it_goes_on(model: Griffin, tokenizer: Tokenizer, tmp_path: Path, seed: int) -> None:
    conversation = Conversation(model, tokenizer)
    say(conversation, TURNS[0], seed=seed)
    conversation.save(tmp_path / "talk")
    loaded = Conversation.load(tmp_path / "talk", model, tokenizer)
    assert loaded.messages == conversation.messages
    assert say(loaded, TURNS[1], seed=7) == say(conversation, TURNS[1], seed=7)
    size = (tmp_path / "talk").stat().st_size
    loaded.save(tmp_path / "talk")
    assert (tmp_path / "talk").stat().st_size - size < 1000  # the text grew, the state did not


def test_what_belongs_to_others_is_not_loaded(model: Griffin, tokenizer: Tokenizer, tmp_path: Path) -> None:
    conversation = Conversation(model, tokenizer)
    conversation.save(tmp_path / "talk")
    other = Tokenizer.train(["another text entirely, entirely"], 270)
    with pytest.raises(GriffinError, match="another tokenizer"):
        Conversation.load(tmp_path / "talk", model, other)
    model.new_state(2).save(tmp_path / "state", model)
    with pytest.raises(GriffinError, match="2 rows and no conversation"):
        Conversation.load(tmp_path / "state", model, tokenizer)
    with torch.no_grad():
        model.embedding.add_(1)
    with pytest.raises(GriffinError, match="another model"):
        Conversation.load(tmp_path / "talk", model, tokenizer)


@pytest.mark.parametrize(
    "content",
    [
        *(5, [], None, {}, "x"),
        *({"tokenizer": 5}, {"tokenizer": None}, {"more": 1}, {"messages": 5}, {"messages": None}, {"messages": "abc"}),
        *({"messages": {"a": 1}}, {"messages": [1, 2]}, {"messages": [{"role": "user"}]}, {"messages": [None]}),
        *({"messages": [{"role": "user", "content": 1}]}, {"messages": [{"role": [], "content": ""}]}),
        *({"messages": [{"role": "judge", "content": ""}]}, {"messages": [{"role": "user", "content": "", "x": ""}]}),
        *({"unread": 5}, {"unread": None}, {"unread": "12"}, {"unread": ["1"]}, {"unread": [1.0]}, {"unread": [True]}),
        *({"unread": [-1]}, {"unread": [270]}, {"unread": [10**30]}, {"unread": [[1]]}),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(
    model: Griffin, tokenizer: Tokenizer, tmp_path: Path, content: object
) -> None:
    whole = {"messages": [{"role": "user", "content": "Hi"}], "unread": [3], "tokenizer": tokenizer.fingerprint()}
    spoilt = {**whole, **content} if isinstance(content, dict) and content else content
    for held, refused in ((whole, False), (spoilt, True)):
        model.new_state(1).save(tmp_path / "talk", model, metadata={METADATA: json.dumps(held)})
        if not refused:
            assert Conversation.load(tmp_path / "talk", model, tokenizer).unread == [3]
            continue
        with pytest.raises(GriffinError, match=r"talk, conversation.*; use another copy") as caught:
            Conversation.load(tmp_path / "talk", model, tokenizer)
        assert len(str(caught.value).splitlines()) == 1
    model.new_state(1).save(tmp_path / "talk", model, metadata={METADATA: "[" * 200_000})
    with pytest.raises(GriffinError, match="nested more than 100 deep"):
        Conversation.load(tmp_path / "talk", model, tokenizer)


def test_its_file_is_read_once(
    model: Griffin, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Conversation(model, tokenizer).save(tmp_path / "talk")
    opened: list[object] = []
    plain = state_file.open_tensors
    monkeypatch.setattr(state_file, "open_tensors", lambda *args, **kw: opened.append(args) or plain(*args, **kw))
    Conversation.load(tmp_path / "talk", model, tokenizer)
    assert len(opened) == 1


def test_a_fuzzer_finds_nothing(model: Griffin, tokenizer: Tokenizer, tmp_path: Path) -> None:
    conversation = Conversation(model, tokenizer)
    say(conversation, TURNS[2], seed=1, max_tokens=5, stop_ids=())
    assert conversation.unread
    conversation.save(tmp_path / "talk")

    def same(loaded: Conversation) -> bool:
        mine, theirs = loaded.state.tensors(), conversation.state.tensors()
        return (loaded.messages, loaded.unread) == (conversation.messages, conversation.unread) and all(
            torch.equal(mine[name], theirs[name]) for name in theirs
        )

    attack([tmp_path / "talk"], lambda: Conversation.load(tmp_path / "talk", model, tokenizer), same, seconds=1)


def test_a_closed_reply_counts_as_far_as_it_came(model: Griffin, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    options: dict[str, Any] = {"seed": 5, "max_tokens": 20, "ignore_eos": True}
    closed, whole = conversation.fork(), conversation.fork()
    pieces = closed.reply(TURNS[0], **options)
    for _ in range(6):
        next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    list(whole.reply(TURNS[0], **{**options, "max_tokens": 6}))
    assert closed.messages == whole.messages
    assert closed.unread == whole.unread
    assert say(closed, TURNS[1], seed=1) == say(whole, TURNS[1], seed=1)


def test_a_failed_reply_leaves_the_conversation_as_it_was(model: Griffin, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    say(conversation, TURNS[0], seed=1)
    twin = conversation.fork()

    def interrupt(read: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(conversation.reply(TURNS[1], progress=interrupt))
    conversation.reply(TURNS[1])  # never begun
    assert conversation.messages == twin.messages
    assert say(conversation, TURNS[1], seed=2) == say(twin, TURNS[1], seed=2)


def test_without_a_template_the_text_goes_on(make_lively: Callable[..., Griffin]) -> None:
    model, tokenizer = make_lively(), Tokenizer.bytes()
    conversation = Conversation(model, tokenizer)
    assert not conversation.has_template
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 9, "ignore_eos": True, "stop_ids": ()}
    _, first, _ = say(conversation, "Once ", **options)
    _, second, _ = say(conversation, "", **options)
    _, third, _ = say(conversation, "upon", **options)
    read = [*tokenizer.encode("Once "), *first, *second]
    long = generate(model, tokenizer, "Once ", **{**options, "max_tokens": 18})[0]
    assert first + second == long.tokens
    fresh = generate(model, tokenizer, [[*read, *tokenizer.encode("upon", bos=False)]], **options)[0]
    assert third == fresh.tokens
    empty = Conversation(model, Tokenizer.bytes())
    list(empty.reply("x", max_tokens=0))
    with pytest.raises(GriffinError, match="say something"):
        empty.reply("")


def at(conversation: Conversation) -> tuple[Any, ...]:
    state = {name: tensor.tolist() for name, tensor in conversation.state.tensors().items()}
    return conversation.messages, conversation.unread, state


def test_turns_are_taken_back_bit_for_bit(model: Griffin, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    before, said = [], []
    for seed, text in enumerate(TURNS):
        before.append(at(conversation.fork()))
        said.append(say(conversation, text, seed=seed, stop_ids=range(5, 40) if seed % 2 else ()))
    twin = conversation.fork()
    for text, place in zip(TURNS[::-1], before[::-1], strict=True):
        assert conversation.undo() == text
        assert at(conversation) == place
    with pytest.raises(GriffinError, match="no turn to take back"):
        conversation.undo()
    assert say(conversation, TURNS[0], seed=0, stop_ids=()) == said[0]
    twin.undo()
    assert say(twin, TURNS[3], seed=3) == said[3]  # a fork has its own past


def test_what_is_not_kept_is_read_again_from_its_text(model: Griffin, tokenizer: Tokenizer, tmp_path: Path) -> None:
    conversation = Conversation(model, tokenizer)
    for seed, text in enumerate(TURNS):
        say(conversation, text, seed=seed)
    conversation.save(tmp_path / "talk")
    loaded = Conversation.load(tmp_path / "talk", model, tokenizer)
    for left in (3, 2, 1):
        assert loaded.undo() == TURNS[left]
        assert loaded.messages == conversation.messages[: 2 * left]
        assert loaded.tokens_read == 0
        *past, answer = loaded.messages
        assert loaded.unread == [*tokenizer.encode_chat(past), *tokenizer.encode(answer["content"], bos=False)]
    message = {"role": "user", "content": "Well?"}
    whole = [*loaded.unread, *tokenizer.encode_chat_turn([*loaded.messages, message])]
    fresh = generate(model, tokenizer, [whole], **OPTIONS, seed=4)[0]
    loaded.save(tmp_path / "unread")
    assert say(loaded, "Well?", seed=4)[1] == fresh.tokens
    assert say(Conversation.load(tmp_path / "unread", model, tokenizer), "Well?", seed=4)[1] == fresh.tokens
    assert [loaded.undo(), loaded.undo()] == ["Well?", TURNS[0]]
    assert (loaded.messages, loaded.unread, loaded.tokens_read) == ([], [], 0)
    long = Conversation(model, tokenizer)
    for turn in range(20):
        list(long.reply(f"turn {turn}", max_tokens=2, seed=turn))
    assert [long.undo() for _ in range(20)] == [f"turn {turn}" for turn in reversed(range(20))]
    assert (long.messages, long.unread, long.tokens_read) == ([], [], 0)


def test_without_a_template_turns_are_taken_back_too(make_lively: Callable[..., Griffin], tmp_path: Path) -> None:
    conversation = Conversation(make_lively(), Tokenizer.bytes())
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 9, "ignore_eos": True, "stop_ids": ()}
    say(conversation, "Once ", **options)
    say(conversation, "upon ", **options)
    conversation.save(tmp_path / "talk")
    loaded = Conversation.load(tmp_path / "talk", conversation.model, conversation.tokenizer)
    assert conversation.undo() == loaded.undo() == "upon "
    said = "Once " + conversation.messages[1]["content"]
    assert loaded.unread == conversation.tokenizer.encode(said)
    with pytest.raises(GriffinError, match="no chat template"):
        loaded.set_system("Be brief.")
    loaded.undo()
    list(loaded.reply("Once ", **options))
    assert loaded.messages[1] == conversation.messages[1]


CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<end_of_turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_a_system_message_is_put_in_front_and_all_is_read_again(make_lively: Callable[..., Griffin]) -> None:
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog " * 3], 270, chat_template=CHATML)
    model = make_lively(vocab_size=tokenizer.vocab_size)
    conversation = Conversation(model, tokenizer)
    conversation.set_system("Be brief.")
    twin = conversation.fork()
    say(conversation, TURNS[0], seed=1)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TURNS[0]}]
    fresh = generate(model, tokenizer, [tokenizer.encode_chat(prompt)], **OPTIONS, seed=1)[0]
    assert conversation.messages == [*prompt, {"role": "assistant", "content": fresh.text}]
    conversation.set_system("Be long.")
    assert conversation.messages[0]["content"] == "Be long."
    past = [conversation.messages[0], prompt[1]]
    unread = [*tokenizer.encode_chat(past), *tokenizer.encode(fresh.text, bos=False)]
    assert (conversation.unread, conversation.tokens_read) == (unread, 0)
    conversation.undo()
    assert conversation.messages == [{"role": "system", "content": "Be long."}]
    conversation.set_system("")
    assert conversation.messages == []
    assert say(twin, TURNS[0], seed=1)[1] == fresh.tokens


def test_a_template_that_takes_no_system_message_changes_nothing(model: Griffin, tokenizer: Tokenizer) -> None:
    conversation = Conversation(model, tokenizer)
    say(conversation, TURNS[0], seed=1)
    before = at(conversation)
    with pytest.raises(GriffinError, match="System role not supported"):
        conversation.set_system("Be brief.")
    assert at(conversation) == before


@pytest.mark.parametrize("stop", ["\nUser:", "o.\nUser", "Hello.\nUser:"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_turn_cut_by_a_stop_string_has_read_what_is_shown(
    make_lively: Callable[..., Griffin], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: str, plain: bool
) -> None:
    """Also where the stop string begins within a token."""
    words = [] if plain else ["User:", "lo.\nUs", "lo.\nUs", "Hello.\n"]
    tokenizer = Tokenizer.train(["hello world", *100 * words], 261 + 12 * len(set(words)), chat_template=GEMMA)
    model = make_lively(vocab_size=tokenizer.vocab_size, window=64)
    forced = tokenizer.encode("Hello.\nUser:", bos=False)
    assert plain or len(forced) < 12
    scripted(monkeypatch, forced)
    talk = Conversation(model, tokenizer)
    assert "".join(map(str, talk.reply("hi", stop=stop, max_tokens=50, temperature=0))) == talk.messages[-1]["content"]
    monkeypatch.undo()
    shown = "Hello.\nUser:".partition(stop)[0]
    assert talk.messages[-1]["content"] == shown
    more = [*talk.messages, {"role": "user", "content": "more"}]
    turn = tokenizer.encode_chat_turn(more)
    wanted = [*tokenizer.encode_chat(talk.messages[:1]), *tokenizer.encode(shown, bos=False)]
    assert talk.tokens_read + len(talk.unread) == len(wanted)
    talk.save(tmp_path / "talk")
    for each in (talk, Conversation.load(tmp_path / "talk", model, tokenizer)):
        with torch.no_grad():
            seen = model.logits(model(torch.tensor([[*each.unread, *turn]]), each.state.clone()))[0, -1]
            fresh = model.logits(model(torch.tensor([[*wanted, *turn]])))[0, -1]
        assert torch.allclose(seen, fresh, atol=1e-4)


def scripted(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Let the one row of an engine choose these."""
    left = iter(ids)
    plain = batch.read_each

    def read(chosen: Any) -> Any:
        choice, faults = plain(chosen)
        choice.ids[0] = next(left)
        return choice, faults

    monkeypatch.setattr(batch, "read_each", read)


def test_a_conversation_begins_in_a_state(model: Griffin, tokenizer: Tokenizer) -> None:
    """As if the state's tokens came before the first turn; and again after it was forked or begun anew."""
    start = model.new_state(1)
    ids = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        model(ids, start)
    kept = {name: tensor.clone() for name, tensor in start.tensors().items()}
    conversation = Conversation(model, tokenizer, start)
    text = "".join(map(str, conversation.reply("hello", max_tokens=8, temperature=0.0)))
    prompt = [*ids[0].tolist(), *tokenizer.encode_chat([{"role": "user", "content": "hello"}])]
    [wanted] = generate(model, tokenizer, [prompt], max_tokens=8, temperature=0.0)
    assert text == wanted.text
    assert all(torch.equal(tensor, kept[name]) for name, tensor in start.tensors().items())
    assert conversation.fork().start is start
    with pytest.raises(GriffinError, match="a conversation begins in a state of one row, not 2"):
        Conversation(model, tokenizer, start.rows([0, 0]))
