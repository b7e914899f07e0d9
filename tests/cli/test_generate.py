from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import griffin
from griffin.cli import options
from griffin.cli.main import run

OPTIONS = ["--max-tokens", "12", "--seed", "3", "--device", "cpu"]


def completions(folder: Path, prompts: list[str]) -> list[griffin.infer.generate.Completion]:  # type: ignore[name-defined]
    model, tokenizer = griffin.load(folder), griffin.load_tokenizer(folder)
    return griffin.generate(model, tokenizer, prompts, max_tokens=12, seed=3)


def test_one_prompt_is_streamed(plain_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(plain_folder), "Once", *OPTIONS]) == 0
    assert capsys.readouterr().out == completions(plain_folder, ["Once"])[0].text + "\n"


def test_stdin_and_file_give_prompts_in_batches(
    plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("second\n\nthird über\n", encoding="utf-8")
    prompts = ["first\n", "second", "third über"]
    wanted = completions(plain_folder, prompts)
    file = ["--file", str(tmp_path / "prompts.txt")]
    for batch in ("1", "2", "16"):
        monkeypatch.setattr("sys.stdin", io.StringIO("first\n"))
        assert run(["generate", str(plain_folder), "-", *file, *OPTIONS, "--batch", batch, "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] for line in lines] == prompts
        assert [tuple(line["tokens"]) for line in lines] == [each.tokens for each in wanted]
        assert [line["text"] for line in lines] == [each.text for each in wanted]
    assert run(["generate", str(plain_folder), *file, *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert out == f"== 1: second\n{wanted[1].text}\n\n== 2: third über\n{wanted[2].text}\n"


def test_logprobs_are_shown(plain_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(plain_folder), "Once", "--max-tokens", "3", "--temperature", "0", "--logprobs", "2"]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["logprobs"]
    assert len(found) == 3
    assert all(each["top"][0] == [each["token"], each["logprob"]] for each in found)  # greedy
    assert run(command) == 0
    assert f"{found[0]['logprob']:.3f}" in capsys.readouterr().out


def test_chat_uses_the_template(chat_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = griffin.load_tokenizer(chat_folder)
    assert run(["generate", str(chat_folder), "Hi", *OPTIONS, "--json", "--chat"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] == len(tokenizer.encode_chat([{"role": "user", "content": "Hi"}]))


def test_freed_memory_is_kept(plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the pages of every chunk's activations are cleared anew."""
    kept: list[bool] = []
    monkeypatch.setattr(options, "keep_freed_memory", lambda: kept.append(True))
    assert run(["generate", str(plain_folder), "once", "--max-tokens", "1", "--device", "cpu"]) == 0
    assert kept == [True]


def test_options_out_of_range_are_named(plain_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(plain_folder), "Once", "--top-p", "1.5"]) == 2
    assert "top_p=1.5" in capsys.readouterr().err
