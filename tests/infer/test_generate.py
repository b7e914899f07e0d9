from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from griffin import PRESETS, Griffin, GriffinError, State, Tokenizer
from griffin.infer.batch import Batch
from griffin.infer.generate import generate, start
from griffin.infer.prefill import prefill
from griffin.infer.request import Completion
from griffin.ops.cpu import library

W = PRESETS["griffin-tiny"].window or 0  # 16
PROMPTS = [
    "a",
    "The sea was calm, and the sky, which had been grey since morning, was clearing.",  # several windows
    [256, 5, 250, 17, 99],
    "Wir fuhren über Brücken – 東京 🙂",
    "abcdefghijklmnopqrstuvwxyz",
]
WARM = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture
def model(make_lively: Callable[..., Griffin]) -> Griffin:
    return make_lively()


# A Script's logits are not made by kernels, so its steps cannot be recorded; it is warned of.
scripted = pytest.mark.filterwarnings("ignore:decoding goes operation by operation")


class Script(Griffin):
    """A model that says what it is told, whatever it reads: its logits follow a list of ids."""

    def __init__(self, text: str | bytes, *ids: int) -> None:
        super().__init__(PRESETS["griffin-tiny"])
        self.ids = [*(text.encode() if isinstance(text, str) else text), *ids]
        self.said = 0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(hidden.shape[0], self.config.vocab_size)
        logits[:, self.ids[self.said]] = 100.0
        self.said += 1
        return logits


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


def test_a_prompt_gets_what_it_would_get_alone(model: Griffin, tokenizer: Tokenizer) -> None:
    seeds, limits = [3, 1, 4, 1, 5], [9, 40, 25, 3, 33]
    options: dict[str, Any] = {**WARM, "repetition_penalty": 1.2, "ignore_eos": True}
    alone = [
        generate(model, tokenizer, [prompt], seed=seed, max_tokens=limit, **options)[0]
        for prompt, seed, limit in zip(PROMPTS, seeds, limits, strict=True)
    ]
    assert [len(each.tokens) for each in alone] == limits
    for order, chunk in (([0, 1, 2, 3, 4], 512), ([4, 1, 3, 0, 2], 7), ([3, 1], 1), ([2, 2, 2], W)):
        together = generate(
            model,
            tokenizer,
            [PROMPTS[i] for i in order],
            seed=[seeds[i] for i in order],
            max_tokens=[limits[i] for i in order],
            prefill_chunk=chunk,
            **options,
        )
        assert tokens(together) == [alone[i].tokens for i in order]
        assert [each.prompt_tokens for each in together] == [alone[i].prompt_tokens for i in order]


def test_one_seed_is_every_rows_seed(model: Griffin, tokenizer: Tokenizer) -> None:
    same = tokens(generate(model, tokenizer, ["ab", "ab"], seed=1, max_tokens=20))
    other = tokens(generate(model, tokenizer, ["ab", "ab"], seed=[1, 2], max_tokens=20))
    assert same[0] == same[1] == other[0] != other[1]
    free = [generate(model, tokenizer, "ab", max_tokens=20)[0].tokens for _ in range(2)]
    assert free[0] != free[1]  # torch.manual_seed, which the tests call, is not asked


@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
def test_going_on_equals_never_having_stopped(
    make_lively: Callable[..., Griffin], tokenizer: Tokenizer, tmp_path: Path, preset: str
) -> None:
    model = make_lively(preset)
    greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    whole = generate(model, tokenizer, PROMPTS, max_tokens=2 * W + 9, **greedy)
    assert len({token for each in whole for token in each.tokens}) > 5
    first = generate(model, tokenizer, PROMPTS, max_tokens=W + 2, **greedy)
    for row, (long, short) in enumerate(zip(whole, first, strict=True)):
        assert long.tokens[: W + 2] == short.tokens
        assert len(short.unread) == 1
        short.state.save(tmp_path / f"{row}.state", model)
        loaded = State.load(tmp_path / f"{row}.state", model)
        for state in (short.state, loaded, short.state):  # twice: it is not changed
            rest = generate(model, tokenizer, [short.unread], state=state, max_tokens=W + 7, **greedy)[0]
            assert short.tokens + rest.tokens == long.tokens


def test_one_state_serves_many_prompts(model: Griffin, tokenizer: Tokenizer) -> None:
    prefix = "Once upon a time in the west there was "
    read = generate(model, tokenizer, prefix, max_tokens=0)[0]
    assert (read.tokens, read.finish_reason, read.unread) == ((), "length", ())
    before = {name: tensor.clone() for name, tensor in read.state.tensors().items()}
    ends = ["a fox", "no", "an old railway station"]
    forked = generate(model, tokenizer, ends, state=read.state, seed=1, max_tokens=20, **WARM)
    whole = generate(model, tokenizer, [prefix + end for end in ends], seed=1, max_tokens=20, **WARM)
    assert tokens(forked) == tokens(whole)
    assert all(torch.equal(before[name], tensor) for name, tensor in read.state.tensors().items())


def test_greedy_is_the_argmax_of_one_forward_pass(model: Griffin, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in PROMPTS]
    completions = generate(model, tokenizer, prompts, temperature=0, max_tokens=3 * W, logprobs=3, ignore_eos=True)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(set(completion.tokens)) > 5
        text = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logits = model.logits(model(text))[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(dim=-1)
        assert completion.logprobs is not None
        for step, each in enumerate(completion.logprobs):
            assert each.token == completion.tokens[step]
            assert each.logprob == pytest.approx(wanted[step].max().item(), abs=1e-4)
            assert each.logprob == pytest.approx(wanted[step, each.token].item(), abs=1e-4)
            assert [value for _, value in each.top] == pytest.approx(wanted[step].topk(3).values.tolist(), abs=1e-4)


def test_prefill_reads_ragged_rows_in_any_chunks(model: Griffin) -> None:
    lengths = [1, 5 * W, W + 1, 23, 23, W]
    prompts = [torch.randint(0, 259, (n,)).tolist() for n in lengths]
    with torch.no_grad():
        wanted = torch.stack([model(torch.tensor([prompt]))[0, -1] for prompt in prompts])
        for chunk in (1, 7, W, W + 1, 1000):
            state, seen = model.new_state(len(prompts)), []
            got = prefill(model, state, prompts, chunk=chunk, progress=lambda *at: seen.append(at))  # noqa: B023
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            assert state.position.tolist() == lengths
            assert seen[-1] == (sum(lengths), sum(lengths))
            assert seen == sorted(set(seen))


def test_a_long_prompt_is_run_without_its_short_neighbours(model: Griffin) -> None:
    sizes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    prefill(model, model.new_state(3), [[1] * 3, [1] * 20, [1] * 9], chunk=8)
    assert sizes == [(3, 8), (2, 8), (1, 4)]


def test_rows_that_are_done_leave_the_batch(model: Griffin, tokenizer: Tokenizer) -> None:
    sizes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    with library.without_kernels():  # with them a step is recorded, and hooks do not see it
        generate(model, tokenizer, 3 * ["ab"], max_tokens=[1, 4, 2], ignore_eos=True)
    assert sizes == [(3, 3), (2, 1), (1, 1), (1, 1)]  # the last token of a row is never read


def test_a_step_may_have_more_places_than_rows(
    model: Griffin, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step of each number of rows would be a graph: no row's result changes, nor its state."""
    options: dict[str, Any] = {**WARM, "seed": [3, 1, 4, 1, 5], "max_tokens": [9, 40, 0, 3, 33], "ignore_eos": True}
    expected = generate(model, tokenizer, PROMPTS, **options)
    monkeypatch.setattr(Batch, "bucket", lambda batch, rows: batch.places)
    for found, wanted in zip(generate(model, tokenizer, PROMPTS, **options), expected, strict=True):
        assert (found.tokens, found.text, found.unread) == (wanted.tokens, wanted.text, wanted.unread)
        assert found.state is not None
        assert wanted.state is not None
        for a, b in zip(found.state.tensors().values(), wanted.state.tensors().values(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [1, 512])
def test_pieces_join_to_the_completion(model: Griffin, tokenizer: Tokenizer, chunk: int) -> None:
    options: dict[str, Any] = {"seed": 3, "max_tokens": 30, "logprobs": 2, "prefill_chunk": chunk, "stop": ["e", "zz"]}
    completions = generate(model, tokenizer, PROMPTS, **options)
    pieces = list(generate(model, tokenizer, PROMPTS, stream=True, **options))
    for row, completion in enumerate(completions):
        mine = [piece for piece in pieces if piece.row == row]
        assert "".join(map(str, mine)) == completion.text
        assert tuple(token for piece in mine for token in piece.tokens) == completion.tokens
        assert completion.logprobs == tuple(each for piece in mine for each in piece.logprobs or ())
        assert [piece.finish_reason for piece in mine] == [*(len(mine) - 1) * [None], completion.finish_reason]


def test_streaming_leaves_the_callers_grad_mode_alone(model: Griffin, tokenizer: Tokenizer) -> None:
    for _ in generate(model, tokenizer, "ab", stream=True, max_tokens=3):
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        state = generate(model, tokenizer, "ab", max_tokens=3)[0].state
    generate(model, tokenizer, "ab", state=state, max_tokens=3)


@scripted
def test_stop_strings_may_lie_across_tokens(tokenizer: Tokenizer) -> None:
    for stop in ("User:", ["\nUser:", "User:"], ["never", "ser:", "User:"]):
        completion = generate(Script("Hello!\nUseful. User: me"), tokenizer, "x", stop=stop)[0]
        assert completion.text == "Hello!\nUseful. "
        assert completion.finish_reason == "stop"
        assert bytes(completion.tokens).decode() == "Hello!\nUseful. User:"
        assert completion.state is not None
        assert completion.state.position.item() + len(completion.unread) == 2 + len(completion.text)  # BOS, x
    cut = generate(Script("Hello!\nUser"), tokenizer, "x", stop="User:", max_tokens=11)[0]
    assert (cut.text, cut.finish_reason) == ("Hello!\nUser", "length")


@scripted
def test_stop_ids_are_neither_text_nor_tokens(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id or 0
    done = generate(Script("Hi", eos, 65), tokenizer, "x")[0]
    assert (done.text, done.tokens, done.finish_reason, done.unread) == ("Hi", (72, 105), "stop", ())
    assert done.state.position.item() == 2 + 2  # BOS, x, H, i
    assert generate(Script("", eos), tokenizer, "x")[0].tokens == ()
    more = generate(Script("Hi", eos, 65, 33), tokenizer, "x", ignore_eos=True, stop_ids=[33])[0]
    assert (more.text, more.tokens, more.finish_reason) == ("HiA", (72, 105, eos, 65), "stop")


@scripted
def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    text = "é東🙂 – ok"
    pieces = list(generate(Script(text), tokenizer, "x", stream=True, max_tokens=len(text.encode())))
    assert "".join(map(str, pieces)) == text
    assert "\ufffd" not in "".join(map(str, pieces))
    first = generate(Script("🙂".encode()[:2]), tokenizer, "x", max_tokens=2)[0]
    assert first.text == tokenizer.decode(first.tokens)
    # The prompt may end inside a character; what follows completes it.
    ids = [*tokenizer.encode("x"), *"🙂".encode()[:3]]
    assert generate(Script("🙂".encode()[3:] + b"!"), tokenizer, [ids], max_tokens=2)[0].text == "🙂!"


@scripted
def test_repetition_penalty_counts_prompt_and_answer(tokenizer: Tokenizer) -> None:
    class Fading(Script):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.linspace(10, 9, 259).expand(hidden.shape[0], -1)

    got = generate(Fading(""), tokenizer, [[0, 2]], temperature=0, repetition_penalty=2.0, max_tokens=4)[0]
    assert got.tokens == (1, 3, 4, 5)


def test_what_cannot_work_is_refused_at_once(model: Griffin, tokenizer: Tokenizer) -> None:
    def refused(message: str, prompts: Any = "x", **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            generate(model, tokenizer, prompts, stream=True, **options)  # nothing is drawn from the iterator

    assert generate(model, tokenizer, []) == []
    assert list(generate(model, tokenizer, [], stream=True)) == []
    refused("prompt 1 has no tokens", ["a", []])
    refused("prompt 0 has token 259; the model's vocabulary is 0 .. 258", [[1, 259, 2]])
    refused("token -1", [[-1]])
    refused("texts or sequences of ids", [1, 2])
    refused("max_tokens=-1", max_tokens=-1)
    refused("max_tokens has 2 numbers for 1 prompts", max_tokens=[1, 2])
    refused("seed has 1 numbers for 2 prompts", ["a", "b"], seed=[1])
    refused("top_p=1.5", top_p=1.5)
    refused("prefill_chunk=0", prefill_chunk=0)
    refused("logprobs=260", logprobs=260)
    refused("2 rows for 3 prompts", ["a", "b", "c"], state=model.new_state(2))
    refused("another model", state=Griffin(replace(model.config, num_heads=2)).new_state(1))
    refused("another model", state=Griffin(model.config).new_state(1))
    refused("no tokens", "", state=model.new_state(1))  # without BOS an empty text is nothing
    small = Griffin(replace(model.config, vocab_size=258))
    with pytest.raises(GriffinError, match="tokenizer has 259 ids and the model 258"):
        generate(small, tokenizer, "x")


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_may_come_and_go_between_pieces(
    make_lively: Callable[..., Griffin], tokenizer: Tokenizer, first: bool
) -> None:
    model = make_lively("transformer-tiny")
    options: dict[str, Any] = {"max_tokens": [3, 9], "seed": 1, "ignore_eos": True, "repetition_penalty": 1.2}
    wanted = generate(model, tokenizer, ["a", "bc"], **options)
    with torch.inference_mode(first):
        pieces = generate(model, tokenizer, ["a", "bc"], stream=True, **options)
    tokens: list[list[int]] = [[], []]
    for index in range(99):
        with torch.inference_mode(first if index % 3 else not first):
            piece = next(pieces, None)
        if piece is None:
            break
        tokens[piece.row] += piece.tokens
    assert tokens == [list(completion.tokens) for completion in wanted]


def test_asking_for_a_completion_changes_nothing(make_model: Callable[..., Griffin]) -> None:
    """Between any two pieces, and twice: what is held back may still become a stop string, or a character."""
    model, tokenizer = make_model(), Tokenizer.bytes()
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 5.0, "seed": 3, "stop": ["\ufffd\ufffd\ufffd", "ab"]}
    (wanted,) = generate(model, tokenizer, "to be", **options)
    generation = start(model, tokenizer, "to be", **options)
    for _ in generation:
        assert generation.completion(0).text == generation.completion(0).text
    assert generation.completion(0).text == wanted.text
    assert generation.completion(0).tokens == wanted.tokens


def test_an_option_that_is_none_is_named(make_model: Callable[..., Griffin]) -> None:
    with pytest.raises(TypeError, match=r"no option hotness; there are .*temperature"):
        generate(make_model(), Tokenizer.bytes(), "to be", hotness=3)
