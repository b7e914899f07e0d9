from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import griffin
from griffin.cli import options
from griffin.cli.generate import read_prompts
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


def test_only_line_feeds_end_the_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    parts = [f"{name} still" for name in ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]]
    file.write_bytes(("\ufeffone" + "\r\n\n \r\n".join(parts) + "\n\ufefftwo").encode())
    assert read_prompts([], file) == ["one" + parts[0], *parts[1:], "\ufefftwo"]
    file.write_bytes(b"fine\n\xff\n")
    with pytest.raises(griffin.GriffinError, match=r"prompts\.txt: character 5 is the byte 0xff, which is not UTF-8"):
        read_prompts([], file)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), griffin.GriffinError("enough")])
def test_what_ends_a_text_early_is_said_on_a_line_of_its_own(
    plain_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    show = options.show

    def show_and_fail(text: str) -> None:
        show(text)
        raise error

    monkeypatch.setattr(options, "show", show_and_fail)
    status = 130 if isinstance(error, KeyboardInterrupt) else 2
    assert run(["generate", str(plain_folder), "Once", *OPTIONS]) == status
    out, _ = capsys.readouterr()
    assert out.endswith("\n")
    assert len(out) > 1


def test_prompts_of_others_do_not_drive_the_terminal(
    plain_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert run(["generate", str(plain_folder), "a\x1b]0;x\x07", "b", *OPTIONS]) == 0
    assert "\x1b]" not in capsys.readouterr().out


def test_log_probabilities_are_kept_only_where_asked_for(plain_folder: Path) -> None:
    from griffin.infer.generate import start

    model, tokenizer = griffin.load(plain_folder), griffin.load_tokenizer(plain_folder)
    for asked, kept in ((None, 0), (0, 12)):
        run = start(model, tokenizer, ["Once"], max_tokens=12, seed=3, ignore_eos=True, logprobs=asked)
        run.completions()
        assert len(run.handles[0].rows[0].logprobs) == kept
