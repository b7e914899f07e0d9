"""Multiple choice: the files' forms, what is scored of them, and the command."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import griffin
from griffin import Griffin
from griffin.cli.main import run
from griffin.errors import GriffinError
from griffin.eval.choices import Question, answer, encode_pair, read_questions
from griffin.tokenizer import Tokenizer

LINES = [
    {"ctx": "The sky is", "choices": ["blue", "made of cheese", "x"], "label": 0},
    {"ctx": "Anna beat Eva because _ was quicker.", "choices": ["Anna", "Eva"], "label": 1},
    {"good": "Cats sleep.", "bad": "Cats sleeps.", "uid": "agreement"},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_the_forms_of_files(questions: Path, tmp_path: Path) -> None:
    read = read_questions(questions)
    assert read == [
        Question((("The sky is", " blue"), ("The sky is", " made of cheese"), ("The sky is", " x")), 0, ""),
        Question(
            (("Anna beat Eva because Anna", " was quicker."), ("Anna beat Eva because Eva", " was quicker.")), 1, ""
        ),
        Question((("", "Cats sleep."), ("", "Cats sleeps.")), 0, "agreement"),
    ]
    packed = tmp_path / "questions.jsonl.xz"
    packed.write_bytes(lzma.compress(questions.read_bytes()))
    assert read_questions(packed) == read
    (tmp_path / "text.jsonl").write_text('{"text": "a text"}\n')
    assert read_questions(tmp_path / "text.jsonl") is None
    assert read_questions(tmp_path / "book.txt") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a text"}, 'line 4 has neither "ctx"'),
        ({"ctx": "?", "choices": ["a"], "label": 1}, "line 4: label=1 names none of 1"),
        ({"ctx": "?", "choices": ["a"], "label": "0"}, "line 4: label='0'"),
    ],
)
def test_a_line_of_another_form_is_refused(questions: Path, line: dict[str, Any], message: str) -> None:
    questions.write_text(questions.read_text() + json.dumps(line) + "\n")
    with pytest.raises(GriffinError, match=message):
        read_questions(questions)


def test_answers_are_the_likeliest_texts(questions: Path, make_model: Callable[..., Griffin]) -> None:
    model, tokenizer, read = make_model(), Tokenizer.bytes(), read_questions(questions)
    assert read is not None
    right, fair = 0, 0
    for question in read:
        values = []
        for context, continuation in question.pairs:
            ids = [256, *context.encode(), *continuation.encode()]
            with torch.no_grad():
                rows = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
            first = len(context.encode()) + 1
            values.append(sum(float(rows[at - 1, ids[at]]) for at in range(first, len(ids))))
        each = [v / len(c.strip()) for v, (_, c) in zip(values, question.pairs, strict=True)]
        right += max(range(len(values)), key=values.__getitem__) == question.label
        fair += max(range(len(each)), key=each.__getitem__) == question.label
    assert tokenizer.bos_id == 256
    found = answer(model, tokenizer, read)
    assert set(found) == {"", "agreement"}
    assert found[""].num_questions == 3
    assert (found[""].sum, found[""].per_character) == (right / 3, fair / 3)
    assert found[""].chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


def test_pairs_are_the_ids_of_the_whole_text() -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat. " * 50], 300)
    for context, continuation in (("the cat", " sat"), ("the cat ", "sat"), ("th", "e cat"), ("", "the")):
        before, its = encode_pair(tokenizer, context, continuation)
        assert before
        assert its
        assert [*before, *its] == tokenizer.encode(context + continuation)
        assert continuation.strip() in tokenizer.decode(its)
    assert encode_pair(tokenizer, "the cat ", "sat") == encode_pair(tokenizer, "the cat", " sat")


def test_the_command(
    questions: Path, tmp_path: Path, make_model: Callable[..., Griffin], capsys: pytest.CaptureFixture[str]
) -> None:
    griffin.save(make_model(), tmp_path / "model", Tokenizer.bytes())
    (tmp_path / "text.txt").write_text("ein Text, der gemessen wird. " * 5)
    out = tmp_path / "out.json"
    files = [str(questions), str(tmp_path / "text.txt")]
    assert run(["eval", str(tmp_path / "model"), *files, "--window", "16", "--json", str(out), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "agreement" in shown
    assert "bits/byte" in shown
    found = json.loads(out.read_text())
    assert found[files[0]][""]["num_questions"] == 3
    assert found[files[1]]["from the state"]["bits_per_byte"] > 1
    assert found[files[1]]["windows of 16"]["positions"][0]["num_tokens"] == 1
    assert run(["eval", str(tmp_path / "model")]) == 2
    assert "give files, or --harness" in capsys.readouterr().err
    assert run(["eval", str(tmp_path / "model"), str(tmp_path / "none.txt")]) == 2
    assert "no such file" in capsys.readouterr().err
