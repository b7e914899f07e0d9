"""Every wrong input a person can give a command: one line on stderr that names the thing, exit status 2, nothing left.

`python -m tests.cli.test_bad_inputs` prints the table of docs/errors.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import griffin
from griffin.cli.main import run

Make = Callable[[Path], None]


def edit(name: str, **changes: object) -> Make:
    def make(folder: Path) -> None:
        file = folder / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return make


def cut(name: str, size: int) -> Make:
    return lambda folder: (folder / "model" / name).write_bytes((folder / "model" / name).read_bytes()[:size]) and None


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    def make(folder: Path) -> None:
        file = folder / "model" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        (folder / "model" / "SHA256SUMS").unlink(missing_ok=True)  # made so, and not damaged since

    return make


def write(name: str, data: bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(data) and None


def nothing(folder: Path) -> None:
    pass


NORM = "model.final_norm.weight"
GENERATE = ["generate", "model", "Hi", "--max-tokens", "2"]
# (what is wrong, how the folder is made so, the command, what the line must say)
CASES: list[tuple[str, Make, list[str], str]] = [
    ("no such model", nothing, ["generate", "nothing/at/all", "Hi"], "does not exist"),
    ("a file for a folder", write("f", b""), ["generate", "f", "Hi"], "is a file"),
    ("config.json missing", lambda f: (f / "model/config.json").unlink(), GENERATE, "config.json does not exist"),
    ("config.json cut short", cut("config.json", 40), GENERATE, "is not JSON"),
    ("unknown config key", edit("config.json", warp=9), GENERATE, "does not understand: warp"),
    ("another architecture", edit("config.json", model_type="llama"), GENERATE, "model type 'llama'"),
    ("quantised by others", edit("config.json", quantization_config={"quant_method": "gptq"}), GENERATE, "'gptq'"),
    ("wrong shape", edit("config.json", vocab_size=300), GENERATE, "config.json says (300, 32)"),
    ("weights missing", lambda f: (f / "model/model.safetensors").unlink(), GENERATE, "has neither"),
    ("weights cut short", cut("model.safetensors", 9000), GENERATE, "cut short"),
    ("a tensor missing", weights(lambda t: t.pop(NORM)), GENERATE, "lacks model.final_norm.weight"),
    ("a tensor of whole numbers", weights(lambda t: t.update({NORM: torch.zeros(32).int()})), GENERATE, "is I32"),
    ("weights that are NaN", weights(lambda t: t[NORM].fill_(torch.nan)), GENERATE, "NaN"),
    ("tokenizer missing", lambda f: (f / "model/tokenizer.json").unlink(), GENERATE, "no tokenizer here"),
    ("tokenizer cut short", cut("tokenizer.json", 100), GENERATE, "not a whole tokenizer.json"),
    ("no prompt", nothing, ["generate", "model"], ""),
    ("negative temperature", nothing, [*GENERATE, "--temperature", "-1"], "temperature"),
    ("top-p above one", nothing, [*GENERATE, "--top-p", "1.5"], "top_p"),
    ("no such device", nothing, [*GENERATE, "--device", "mps"], "there are auto, cpu"),
    ("unknown option", nothing, [*GENERATE, "--hotness", "3"], "--hotness"),
    ("unknown command", nothing, ["trian", "x"], "trian"),
    ("no chat template", nothing, ["generate", "model", "Hi", "--chat"], "no chat template"),
    (
        "a chat template that never ends",
        write(
            "model/chat_template.jinja", b"{% for a in range(9999) %}{% for b in range(9999) %}" + b"{% endfor %}" * 2
        ),
        ["generate", "model", "Hi", "--chat"],
        "fuel",
    ),
    (
        "a chat template that crashes",
        write("model/chat_template.jinja", b"{% set n = namespace() %}{% set n.a = n %}{{ n }}"),
        ["generate", "model", "Hi", "--chat"],
        "crashed",
    ),
    ("a conversation of nowhere", nothing, ["chat", "model", "--load", "none.safetensors"], "none.safetensors"),
    (
        "a conversation that is text",
        write("c", b"hello"),
        ["chat", "model", "--load", "c"],
        "c cannot be read (",
    ),
    ("unknown preset", nothing, ["info", "griffin-1t"], "griffin-1t"),
    ("no text", nothing, ["train", "no.txt"], "no.txt"),
    ("empty text", write("e.txt", b""), ["train", "e.txt"], "e.txt"),
    ("text that is not UTF-8", write("b.txt", b"abc \xff\xfe" * 50), ["train", "b.txt"], "b.txt"),
    ("half a character", write("h.jsonl", b'{"text": "\\ud83d"}\n'), ["train", "h.jsonl"], "line 1"),
    ("text shorter than a row", write("s.txt", b"too short"), ["train", "s.txt"], "row"),
    ("no recipe", nothing, ["train", "no.py"], "no.py"),
    ("a broken recipe", write("r.py", b"def config(:\n"), ["train", "r.py"], "line 1"),
    ("a recipe that fails", write("r.py", b"def config():\n    return 1 / 0\n"), ["train", "r.py"], "line 2"),
    ("unknown recipe field", write("t.txt", b"to be or not " * 999), ["train", "t.txt", "--set", "stepz=3"], "steps"),
    ("a field of another type", write("t.txt", b"to be or " * 999), ["train", "t.txt", "--set", "steps=many"], "steps"),
    (
        "fields that do not fit",
        write("t.txt", b"to be " * 999),
        ["train", "t.txt", "--set", "model.width=33"],
        "head width 11",
    ),
    (
        "a vocabulary too small",
        write("t.txt", b"to be"),
        ["tokenizer", "train", "t.txt", "--vocab-size", "9", "--output", "o"],
        "9",
    ),
    (
        "a vocabulary too large",
        write("t.txt", b"to be"),
        ["tokenizer", "train", "t.txt", "--vocab-size", "1099511627776", "--output", "o"],
        "1048576",
    ),
    ("a pickle that is not one", write("g.pt", b"noise"), ["convert", "g.pt", "out"], "g.pt"),
    ("nothing to convert", nothing, ["convert", "g.pt", "out"], "g.pt"),
    ("a place already taken", write("g.pt", b"noise"), ["convert", "g.pt", "model"], "model"),
]


def outcome(case: tuple[str, Make, list[str], str], folder: Path) -> tuple[int, str, set[str]]:
    """Exit status, stderr, and the names that the command left behind."""
    _, make, command, _ = case
    model = griffin.Griffin(griffin.PRESETS["griffin-tiny"], generator=torch.Generator().manual_seed(0))
    griffin.save(model, folder / "model", griffin.Tokenizer.bytes())
    make(folder)
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    stderr = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        status = run(command)
    left = {path.relative_to(folder) for path in folder.rglob("*")} - before
    return status, stderr.getvalue(), {str(path) for path in left}


@pytest.mark.parametrize("case", CASES, ids=[case[0].replace(" ", "-") for case in CASES])
def test_one_line_and_status_two(case: tuple[str, Make, list[str], str], tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    status, stderr, left = outcome(case, tmp_path)
    assert status == 2
    errors = [line for line in stderr.splitlines() if line.startswith("griffin: error: ")]
    assert len(errors) == 1, stderr
    assert stderr.splitlines()[-1] == errors[0]
    assert case[3] in errors[0]
    assert not {name for name in left if not name.startswith("runs")}, left
    assert not any(name.endswith(".safetensors") for name in left), left


def main() -> None:
    rows = []
    for case in CASES:
        sys.stdin = io.StringIO("")
        with tempfile.TemporaryDirectory() as folder:
            _, stderr, _ = outcome(case, Path(folder))
        line = stderr.splitlines()[-1].removeprefix("griffin: error: ").replace("|", "\\|").replace(folder, "")
        rows.append(f"| {case[0]} | `griffin {' '.join(case[2])}` | {line} |")
    print("\n".join(["| what is wrong | command | what it prints |", "|---|---|---|", *rows]))  # noqa: T201


if __name__ == "__main__":
    main()
