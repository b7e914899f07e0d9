"""What a careless or hostile user types: one printable line, status 2, nothing left; no traceback, no hang.

tests/cli/test_bad_inputs.py has what is documented; this is the rest of the kind, cheap enough to add to.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import griffin
from griffin.cli.main import run

ESCAPE = "\x1b]0;title\x07"
HUGE = "9" * 30

GENERATE = [
    "--max-tokens -1",
    "--max-tokens x",
    "--max-tokens 1.5",
    "--temperature nan",
    "--temperature inf",
    "--top-k 0",
    "--top-k -1",
    "--top-p 0",
    "--top-p nan",
    "--min-p 2",
    "--min-p nan",
    "--repetition-penalty 0",
    "--repetition-penalty inf",
    "--seed -1",
    f"--seed {HUGE}",
    "--logprobs -1",
    f"--logprobs {HUGE}",
    "--chunk 0",
    "--chunk -5",
    "--batch 0",
    "--device mps",
    "--device xla",
    "--device vulkan",
    "--device meta",
    "--device cuda:99",
    "--device cpu:x",
    f"--device {ESCAPE}",
    "--dtype int8",
    "--file missing.txt",
    "--file folder",
    "--file latin.txt",
    "--file model/config.json/x",
    "\udcff",
]
TRAIN = [
    "device=meta",
    "device=mps",
    f"device={ESCAPE}",
    "threads=1000000",
    "threads=0",
    f"threads={HUGE}",
    "batch_rows=1000000000",
    f"batch_rows={HUGE}",
    "grad_accumulation=1000000000000",
    "row_tokens=1000000000000",
    "model.vocab_size=100000000000",
    f"model.vocab_size={HUGE}",
    f"model.width={HUGE}",
    "model.width=0",
    "model.num_heads=0",
    "model.window=0",
    "model.block_types=lstm",
    "model.rope_fraction=nan",
    "model.embedding_scale=big",
    "model=tiny",
    "model.x.y=3",
    f"{ESCAPE}=3",
    "=5",
    "steps",
    "steps=0",
    "steps=1e5",
    f"steps={'9' * 5000}",
    f"seed={HUGE}",
    "seed=-1",
    "learning_rate=-1",
    "learning_rate=inf",
    "min_learning_rate=nan",
    "betas=1,1",
    "betas=",
    "grad_clip=0",
    "dtype=fp16",
    "peak_flops=0",
    "keep_checkpoints=0",
    "warmup_steps=-1",
    "tokenizer=bpe:0",
    "tokenizer=bpe:x",
    "tokenizer=missing",
    "tokenizer=folder",
    "train_data=missing.txt",
    "train_data=folder",
    "train_data=",
    "validation_data=folder",
    "validation_data=latin.txt",
    "init_from=missing",
    "init_from=folder",
]
OTHERS = [
    ["generate", "", "Hi"],
    ["generate", "a\0b", "Hi"],
    ["generate", "x" * 5000, "Hi"],
    ["generate", f"{ESCAPE}", "Hi"],
    ["generate", "[/bold]", "Hi"],
    ["generate", "folder", "Hi"],
    ["generate", "t.txt", "Hi"],
    ["chat", "model", "--load", "missing"],
    ["chat", "model", "--load", "folder"],
    ["chat", "model", "--load", "t.txt"],
    ["chat", "model", "--load", "model/model.safetensors"],
    ["chat", "model", "--device", "meta"],
    ["chat", "model", "--temperature", "-1"],
    ["info", "folder"],
    ["info", f"{ESCAPE}"],
    ["info", "griffin-tiny", "--device", "meta"],
    ["info", "griffin-tiny", "--dtype", "int8"],
    ["quantize", "missing", "out", "--to", "int8"],
    ["quantize", "model", "model", "--to", "int8"],
    ["quantize", "model", "t.txt", "--to", "int8"],
    ["quantize", "model", "out", "--to", "int2"],
    ["quantize", "model", "out", "--to", "int4", "--group", "5"],
    ["convert", "missing", "out"],
    ["convert", "t.txt", "out"],
    ["convert", "t.txt", "out", "--window", "0"],
    ["convert", "t.txt", "out", "--soft-cap", "-1"],
    ["tokenizer", "train", "missing.txt", "--vocab-size", "300", "--output", "out"],
    ["tokenizer", "train", "folder", "--vocab-size", "300", "--output", "out"],
    ["tokenizer", "train", "latin.txt", "--vocab-size", "300", "--output", "out"],
    ["tokenizer", "train", "t.txt", "--vocab-size", "-1", "--output", "out"],
    ["tokenizer", "train", "t.txt", "--vocab-size", "300", "--output", "t.txt"],
    ["train", "missing.txt"],
    ["train", "folder"],
    ["train", "latin.txt"],
    ["train", "table.csv"],
    ["train", "folder.py"],
    ["train", "recursive.py"],
    ["train", "surrogate.py"],
    ["train", "t.txt", "--run", "t.txt"],
    ["train", "t.txt", "--run", "t.txt/run"],
    ["train", "t.txt", "--preset", "gpt"],
    ["train", "t.txt", "--preset", ESCAPE],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    model = griffin.Griffin(griffin.PRESETS["griffin-tiny"], generator=torch.Generator().manual_seed(0))
    griffin.save(model, folder / "model", griffin.Tokenizer.bytes())
    (folder / "folder").mkdir()
    (folder / "folder.py").mkdir()
    (folder / "t.txt").write_text("to be or not to be that is the question\n" * 30)
    (folder / "latin.txt").write_bytes("für immer\n".encode("latin-1") * 30)
    (folder / "table.csv").write_text("a,b\n")
    (folder / "recursive.py").write_text("def config():\n    return config()\n")
    (folder / "surrogate.py").write_text(f"def config():\n    raise KeyError({ESCAPE + chr(10)!r} + '\\udcff')\n")
    return folder


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def check(arguments: list[str]) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        before = sorted(place.rglob("*"))
        status = run(arguments)
        out, err = capsys.readouterr()
        assert status == 2, (out, err)
        lines = [line for line in err.split("\n") if line.startswith("griffin: error: ")]
        assert len(lines) == 1, err
        assert err.endswith(lines[0] + "\n")
        assert len(lines[0]) > len("griffin: error: ")
        assert "\x1b" not in err + out
        assert "Traceback" not in err
        assert sorted(place.rglob("*")) == before
        return lines[0]

    return check


@pytest.mark.parametrize("flags", GENERATE)
def test_generate(refused: Callable[..., str], flags: str) -> None:
    refused(["generate", "model", "Hi", *flags.split(" ")])


@pytest.mark.parametrize("setting", TRAIN, ids=lambda setting: repr(setting[:40]))
def test_train(refused: Callable[..., str], setting: str) -> None:
    line = refused(["train", "t.txt", "--set", "steps=3", "--set", "tokenizer=bytes", "--set", setting])
    assert len(line) < 2100


@pytest.mark.parametrize("arguments", OTHERS, ids=lambda arguments: repr(" ".join(arguments)[:40]))
def test_others(refused: Callable[..., str], arguments: list[str]) -> None:
    refused(arguments)
