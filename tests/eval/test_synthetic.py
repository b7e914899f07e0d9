"""The synthetic tasks against their contracts, row by row, and a model that is right by construction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from griffin import Griffin
from griffin.data.packing import Batch
from griffin.eval.synthetic.induction_heads import InductionHeads
from griffin.eval.synthetic.mqar import MQAR
from griffin.eval.synthetic.needle import DIGITS, Needle, needle_prompt
from griffin.eval.synthetic.phonebook import COLON, DIGIT, END, QUERY, Phonebook, phonebook_text
from griffin.eval.synthetic.selective_copying import SelectiveCopying
from griffin.eval.synthetic.task import Task, accuracy, distinct, generator
from griffin.loss import NOT_COUNTED

TASKS: list[Task] = [
    SelectiveCopying(length=40, data=5),
    InductionHeads(length=21),
    MQAR(vocab_size=64, input_seq_len=32, num_kv_pairs=3),
    MQAR(vocab_size=64, input_seq_len=12, num_kv_pairs=3, random_non_queries=False),
    Phonebook(least=1, most=5),
    Needle(length=31, digits=3),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_batch_is_a_function_of_seed_and_step(task: Task) -> None:
    one, same, later, other = (task.batch(*which, 16) for which in ((7, 3), (7, 3), (7, 4), (8, 3)))
    assert torch.equal(one.tokens, same.tokens)
    assert torch.equal(one.targets, same.targets)
    for different in (later, other):
        assert not torch.equal(one.tokens, different.tokens)
    assert one.tokens.dtype == one.targets.dtype == one.positions.dtype == torch.int64
    assert torch.equal(one.positions, torch.arange(one.tokens.shape[1]).expand(16, -1))
    assert 0 <= int(one.tokens.min()) <= int(one.tokens.max()) < task.vocab_size
    assert 0 < task.chance < 1


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_the_answer_can_be_read_off_the_row(task: Task) -> None:
    batch = task.batch(0, 0, 64)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        expected = _answers(task, tokens, targets)
        assert {at: target for at, target in enumerate(targets) if target != NOT_COUNTED} == expected


def _answers(task: Task, tokens: list[int], targets: list[int]) -> dict[int, int]:
    """Where a target is due, and which, by looking at the row alone."""
    T = len(tokens)
    if isinstance(task, SelectiveCopying):
        data = [token for token in tokens if 0 < token < task.vocab_size - 1]
        assert len(data) == task.data
        assert tokens[T - task.data :] == [task.vocab_size - 1] * task.data
        return dict(zip(range(T - task.data, T), data, strict=True))
    if isinstance(task, InductionHeads):
        first = tokens.index(task.vocab_size - 1)
        assert tokens.count(task.vocab_size - 1) == 2
        return {T - 1: tokens[first + 1]}
    if isinstance(task, MQAR):
        n, half = task.num_kv_pairs, task.vocab_size // 2
        book = dict(zip(tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2], strict=True))
        assert len(book) == n
        assert all(0 < key < half <= value for key, value in book.items())
        assert sum(target != NOT_COUNTED for target in targets) == n
        found = {at: book[tokens[at]] for at in range(2 * n, T, 2) if tokens[at] in book}
        if task.random_non_queries:  # a filler may be a key too, and is then not counted
            return {at: value for at, value in found.items() if targets[at] != NOT_COUNTED}
        assert all(token == 0 for at, token in enumerate(tokens) if at >= 2 * n and at not in found)
        return found
    if isinstance(task, Phonebook):
        asked = tokens.index(QUERY)
        name = tokens[asked + 1 : asked + 3]
        entries = [tokens[at : at + 8] for at in range(0, asked, 8)]
        book, examples = entries[:-2], entries[-2:]
        assert len(examples) == 2
        assert len(book) < 2 or entries[-2][:2] != name != entries[-1][:2]
        assert len(book) < 3 or entries[-2] != entries[-1]
        assert all(entry[2] == COLON and entry[-1] == END for entry in entries)
        assert len({tuple(entry[:2]) for entry in book}) == len(book)
        assert all(example in book for example in examples)
        [entry] = [entry for entry in book if entry[:2] == name]
        assert all(token == END for token in tokens[asked + 8 :])
        assert tokens[asked + 1 : asked + 8] == entry[:-1]
        return {asked + 3 + k: entry[3 + k] for k in range(4)}
    assert isinstance(task, Needle)
    first = tokens.index(DIGITS)
    secret = tokens[first + 1 : first + 1 + task.digits]
    assert tokens.count(DIGITS) == 2
    assert tokens[T - task.digits :] == [DIGITS, *secret[:-1]]
    return {T - task.digits + k: digit for k, digit in enumerate(secret)}


def test_places_are_drawn_evenly() -> None:
    rows = 20_000
    where = InductionHeads(length=10).batch(0, 0, rows).tokens.eq(15).int().argmax(1)
    shares = torch.bincount(where, minlength=8) / rows
    assert len(shares) == 8
    assert float((shares - 1 / 8).abs().max()) < 5 * math.sqrt(1 / 8 * 7 / 8 / rows)
    chosen = distinct(generator(0, 0), rows, 6, 2)
    pairs = torch.bincount(torch.from_numpy(6 * chosen[:, 0] + chosen[:, 1]), minlength=36).reshape(6, 6) / rows
    assert float(pairs.diagonal().max()) == 0
    off = pairs[~torch.eye(6, dtype=torch.bool)]
    assert float((off - 1 / 30).abs().max()) < 5 * math.sqrt(1 / 30 / rows)


def test_gaps_of_mqar_follow_its_power_law() -> None:
    """The first gap has p(g) = (g + 1)^(a - 1) / sum; NumPy's draws without replacement agree on the second."""
    task, rows = MQAR(vocab_size=256, input_seq_len=20, num_kv_pairs=2, random_non_queries=False), 40_000
    batch = task.batch(0, 0, rows)
    gaps = torch.zeros(rows, 2, dtype=torch.int64)
    for each in range(2):
        key = batch.tokens[:, 2 * each, None]
        gaps[:, each] = (batch.tokens[:, 4:] == key).int().argmax(1) // 2
    weights = np.arange(1, 9) ** (task.power_a - 1)
    p = torch.from_numpy(weights / weights.sum())
    second = sum(p[g] * torch.where(torch.arange(8) == g, 0.0, p / (1 - p[g])) for g in range(8))
    for each, expected in ((0, p), (1, second)):
        shares = torch.bincount(gaps[:, each], minlength=8) / rows
        assert float((shares - expected).abs().max()) < 5 * math.sqrt(0.25 / rows)


def test_phonebook_text_asks_for_a_line_of_the_book() -> None:
    prompt, answer = phonebook_text(0, 1, 20)
    assert (prompt, answer) == phonebook_text(0, 1, 20) != phonebook_text(0, 2, 20)
    book, examples, query = prompt.split("\n\n")
    lines = book.split("\n")
    assert len({line.split(": ")[0] for line in lines}) == len(lines) == 20
    assert all(len(line.split(": ")[1]) == 10 and line.split(": ")[1][0] in "6789" for line in lines)
    assert set(examples.split("\n")) < set(lines)
    assert f"{query} {answer}" in lines
    assert f"{query} {answer}" not in examples


def test_needle_depth() -> None:
    hay, needle, question = list(range(100)), [-1, -2], [-3]
    for depth, at in ((0, 0), (0.5, 23), (1, 47)):
        prompt = needle_prompt(hay, needle, question, length=50, depth=depth)
        assert len(prompt) == 50
        assert prompt.index(-1) == at
        assert prompt[-1] == -3
        assert [each for each in prompt if each >= 0] == hay[:47]
    with pytest.raises(ValueError, match="there are 100"):
        needle_prompt(hay, needle, question, length=104, depth=0)
    rows = Needle(length=30, digits=2, depth=1.0).batch(0, 0, 4).tokens
    assert rows.eq(DIGITS).int().argmax(1).tolist() == [25] * 4
    assert DIGIT == 128  # what the phonebook's contract says


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelectiveCopying(length=10, data=6),
        lambda: SelectiveCopying(vocab_size=3),
        lambda: InductionHeads(length=2),
        lambda: MQAR(input_seq_len=63),
        lambda: MQAR(input_seq_len=32, num_kv_pairs=9),
        lambda: MQAR(vocab_size=64, input_seq_len=64),
        lambda: Phonebook(least=3, most=2),
        lambda: Needle(length=7, digits=3),
        lambda: Needle(depth=1.5),
        lambda: phonebook_text(0, 0, 2),
        lambda: needle_prompt([1], [], [], length=1, depth=2),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        make()


def test_accuracy_counts_tokens_and_whole_rows(make_model: Callable[..., Griffin]) -> None:
    model = make_model()
    tokens = torch.randint(0, 259, (6, 9))
    positions = torch.arange(9).expand(6, 9).contiguous()
    with torch.no_grad():
        likeliest = model.logits(model(tokens, positions=positions)).argmax(-1)
        logprobs = model.logits(model(tokens, positions=positions)).log_softmax(-1)
    targets = torch.full((6, 9), NOT_COUNTED)
    targets[:, 3], targets[:, 7] = likeliest[:, 3], likeliest[:, 7]
    targets[0, 7] = (likeliest[0, 7] + 1) % 259
    targets[1, :] = NOT_COUNTED
    counted = targets != NOT_COUNTED
    expected = -logprobs[counted].gather(1, targets[counted][:, None]).mean()
    batches = [Batch(*(each[rows] for each in (tokens, targets, positions))) for rows in (slice(0, 4), slice(4, 6))]
    found = accuracy(model, batches)
    assert (found.tokens, found.rows, found.num_rows) == (9 / 10, 4 / 6, 6)
    assert found.nats == pytest.approx(float(expected), rel=1e-5)


def test_a_small_model_learns_one() -> None:
    """Through the very step of training: induction over a handful of tokens, far above chance."""
    from griffin import PRESETS
    from griffin.train.objective import LanguageModel
    from griffin.train.step import take_step

    task: Any = SelectiveCopying(length=8, data=1, vocab_size=6)
    model = Griffin(PRESETS["griffin-tiny"], generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        take_step(model, LanguageModel(), optimizer, [task.batch(0, step, 32)], 1.0)
    assert accuracy(model, [task.batch(1, 0, 256)]).tokens > 0.9 > 3 * task.chance
