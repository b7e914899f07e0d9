from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from griffin import Griffin, GriffinError, Tokenizer, state_file
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
