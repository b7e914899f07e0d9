"""The commands of docs/finetuning.md, as they stand there, one after the other."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import griffin
from griffin import Griffin, Tokenizer
from griffin.cli.main import run

DOCUMENT = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text()
[BLOCK] = re.findall(r"^```bash\n(.*?)^```", DOCUMENT, re.M | re.S)
[ROWS] = re.findall(r"^```json\n(.*?)^```", DOCUMENT, re.M | re.S)


@pytest.mark.slow
def test_five_commands_from_a_jsonl_to_a_chat(
    make_model: Callable[..., Griffin],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.train(["Who are you? I am a king, my lord. " * 5], 300)
    griffin.save(make_model(vocab_size=tokenizer.vocab_size), Path("runs/shakespeare/model"), tokenizer)
    with Path("chats.jsonl").open("w") as file:
        for number in range(40):
            said = [{"role": "user", "content": f"Who are you, {number}?"}, {"role": "assistant", "content": "A king."}]
            file.write(json.dumps({"messages": said}) + "\n")
    lines = iter(["Who are you?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _="": next(lines))
    commands = [shlex.split(line) for line in BLOCK.splitlines()]
    assert [command[:2] for command in commands] == [
        ["griffin", name] for name in ("data", "finetune", "plot", "generate", "chat")
    ]
    before = torch.get_num_threads()
    for command in commands:
        assert run(command[1:]) == 0, capsys.readouterr().err
    torch.set_num_threads(before)
    assert Path("runs/chats.png").is_file()
    assert Path("runs/chats/adapter/adapter_model.safetensors").is_file()
    assert "A king." in capsys.readouterr().out


def test_every_kind_of_row_is_read(tmp_path: Path) -> None:
    from griffin.data.examples import find_kind

    kinds = []
    for row in ROWS.splitlines():
        (tmp_path / "a.jsonl").write_text(row + "\n")
        kinds.append(find_kind(tmp_path / "a.jsonl"))
    assert kinds == ["chat", "chat", "pairs", "text"]
