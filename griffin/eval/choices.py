"""Multiple choice and minimal pairs by log-likelihood, from JSON lines in the forms that are in use."""

from __future__ import annotations

import lzma
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from griffin.errors import GriffinError
from griffin.model import Griffin
from griffin.reading import parse_json
from griffin.score import Progress, log_likelihoods
from griffin.tokenizer import Tokenizer

BLANK = "_"  # what a choice is put in place of (WinoGrande)


@dataclass(frozen=True, slots=True)
class Question:
    """One question: texts of which one is right, each as what is given and what is scored after it."""

    pairs: tuple[tuple[str, str], ...]  # (context, continuation); a context of "" is the beginning of a text
    label: int  # which pair is right
    group: str  # questions of a group are also counted by themselves; "" for none


@dataclass(frozen=True, slots=True)
class Answers:
    """How many questions are answered right, by three ways of choosing."""

    num_questions: int
    sum: float  # share, by log p(continuation | context)
    per_character: float  # by log p / its characters, a blank at its front aside
    chance: float  # mean of 1 / number of choices


def read_questions(path: Path) -> list[Question] | None:
    """Read a .jsonl (or .jsonl.xz) file of questions; None where its first line is no question.

    {"ctx": ..., "choices": [...], "label": i}: each choice follows ctx and a blank. Where ctx has a lone "_", the
    choices are put in its place and what follows it is scored (partial scoring, as the papers do for WinoGrande).
    {"good": ..., "bad": ..., "uid": ...}: whole texts (BLiMP); uid is the group.

    Raises:
        GriffinError: a later line is not of the first one's form, or a label names no choice.
    """
    if not path.name.endswith((".jsonl", ".jsonl.xz")):
        return None
    questions: list[Question] = []
    with lzma.open(path, "rt", encoding="utf-8") if path.name.endswith(".xz") else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            question = _question(parse_json(line, where), where)
            if question is None and not questions:
                return None
            if question is None:
                raise GriffinError(f'{where} has neither "ctx", "choices" and "label" nor "good" and "bad"')
            questions.append(question)
    return questions or None


def _question(value: Any, where: str) -> Question | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("good"), str) and isinstance(value.get("bad"), str):
        return Question((("", value["good"]), ("", value["bad"])), 0, str(value.get("uid", "")))
    context, choices, label = (value.get(name) for name in ("ctx", "choices", "label"))
    if not isinstance(context, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        return None
    if type(label) is not int or not 0 <= label < len(choices):
        raise GriffinError(f"{where}: label={label!r} names none of {len(choices)} choices")
    words = context.split(BLANK)
    if len(words) == 2 and words[1].strip():
        before, after = words
        return Question(tuple((before + choice, after) for choice in choices), label, "")
    return Question(tuple((context.rstrip(), f" {choice}") for choice in choices), label, "")


def answer(
    model: Griffin,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_rows: int = 32,
    progress: Progress | None = None,
) -> dict[str, Answers]:
    """Choose for each question the likeliest of its texts.

    Returns:
        "" for all questions, then each group by name.

    Raises:
        GriffinError: the tokenizer has no token that begins a text, and a context is empty.
    """
    texts = [pair for question in questions for pair in question.pairs]
    found = log_likelihoods(
        model,
        [encode_pair(tokenizer, context, continuation) for context, continuation in texts],
        batch_rows=batch_rows,
        progress=progress,
    )
    nats = iter(each.nats for each in found)
    right: dict[str, list[tuple[bool, bool, float]]] = defaultdict(list)
    for question in questions:
        its = [next(nats) for _ in question.pairs]
        lengths = [max(1, len(continuation.removeprefix(" "))) for _, continuation in question.pairs]
        each = [value / length for value, length in zip(its, lengths, strict=True)]
        result = (_best(its) == question.label, _best(each) == question.label, 1 / len(its))
        for group in dict.fromkeys(("", question.group)):
            right[group].append(result)
    return {
        group: Answers(len(results), *(sum(column) / len(results) for column in zip(*results, strict=True)))
        for group, results in sorted(right.items())
    }


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)  # of equal ones the first


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, which joined are those of the whole text.

    Cut where the context's own ids and the whole text's first differ: a token that reaches over the context's end is
    the continuation's, as are blanks at the context's end, which most vocabularies join to what follows.

    Raises:
        GriffinError: nothing comes before the continuation, and the tokenizer has neither BOS nor EOS to begin with.
        ValueError: the continuation is empty.
    """
    if not continuation:
        raise ValueError(f"nothing is to be scored after {context[-40:]!r}: a continuation needs some text")
    begin = list(tokenizer.begin_ids)
    whole = begin + tokenizer.encode(context + continuation, bos=False)
    before = begin + tokenizer.encode(context.rstrip(" "), bos=False)
    cut = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(before, whole[:-1], strict=False)))
    if cut:
        return whole[:cut], whole[cut:]
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is None:
        raise GriffinError("a text is to be scored from its beginning, and this tokenizer has neither BOS nor EOS")
    return [start], whole
