"""`griffin finetune`, `data`, `merge` and `plot` from end to end, on a tiny set of dialogues."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import griffin
from griffin import Griffin, Tokenizer, lora
from griffin.cli.main import run
from griffin.train.metrics import read_metrics

# What two cores do in a second: a few steps of short rows.
FEW = ["steps=6", "row_tokens=64", "batch_rows=2", "threads=1", "validation_rows=2", "log_every=1", "warmup_steps=1"]
FEW += ["validate_every=2", "checkpoint_every=2"]
SMALL = [argument for setting in FEW for argument in ("--set", setting)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(make_model: Callable[..., Griffin], tmp_path: Path) -> Path:
    """A model whose vocabulary has the tokens of dialogues, and no template: what `griffin train` leaves."""
    tokenizer = Tokenizer.train(["What is it? The answer is a number, my lord. " * 5], 300)
    griffin.save(make_model(vocab_size=tokenizer.vocab_size, width=16, lru_width=16), tmp_path / "model", tokenizer)
    return tmp_path / "model"


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = []
    for number in range(24):
        messages = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A number."}]
        rows.append({"messages": messages})
    return write(tmp_path / "chats.jsonl", rows)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {number}?", "chosen": "A number.", "rejected": "Nothing."} for number in range(24)]
    return write(tmp_path / "pairs.jsonl", rows)


def test_lora_from_examples_to_a_chat(
    tmp_path: Path, folder: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(["finetune", str(folder), str(chats), "--lora", "4", "--run", str(out), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "chosen for" in shown
    assert "23 examples: LoRA of rank 4, 6 steps of 2 x 64 tokens" in shown
    assert "adapter    " in shown
    assert "examples   23, " in shown
    assert "--- example 1 ---" in shown
    assert "> What is 0?" in shown
    assert f"griffin chat {out}/model" in shown
    adapter = lora.read_adapter(out / "adapter")
    assert adapter.lora.rank == 4
    model = griffin.load(folder)
    lora.attach(model, adapter)
    tokens = torch.arange(5, 25)[None]
    merged = griffin.load(out / "model")
    with torch.no_grad():
        a, b = (each.logits(each(tokens)) for each in (model, merged))
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert griffin.load_tokenizer(out / "model").chat_template is not None
    before = {name: each.clone() for name, each in griffin.load(folder).named_parameters()}
    changed = {name for name, each in merged.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {f"{name}.weight" for name in before_targets(before)}
    assert run(["generate", str(out / "model"), "--chat", "What is 3?", "--max-tokens", "3"]) == 0
    assert run(["generate", str(folder), "--adapter", str(out / "adapter"), "--chat", "Hi", "--max-tokens", "3"]) == 0
    assert run(["merge", str(folder), str(out / "adapter"), str(tmp_path / "merged")]) == 0
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (out / "model" / name).read_bytes()


def before_targets(names: dict[str, torch.Tensor]) -> set[str]:
    owners = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    return {owner for owner in owners if owner.rpartition(".")[2] in lora.TARGETS}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_longer_one_does_not_jump(
    tmp_path: Path, folder: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit the unbroken run, adapters, dropout and all; and from a finished one as if it had never ended."""
    dropout = ["--set", "lora.dropout=0.1", "--set", "decay_steps=2", "--learning-rate", "0.01"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["finetune", str(folder), str(chats), "--lora", "4", *SMALL, *dropout]
    assert run([*arguments, "--run", str(whole), "--set", "steps=12"]) == 0
    assert run([*arguments, "--run", str(parts)]) == 0  # six steps, the rate falls over the last two
    assert run([*arguments, "--run", str(parts), "--resume", "--set", "steps=12"]) == 0
    assert "a longer one goes on from step 4, so that the rate does not jump" in capsys.readouterr().out
    lines = [[line for line in read_metrics(path / "metrics.jsonl") if "loss" in line] for path in (whole, parts)]
    rates = [line["learning_rate"] for line in lines[1]]
    assert rates[1:10] == [0.01] * 9
    assert rates[10:] == pytest.approx([0.0055, 0.001])
    for a, b in zip(*lines, strict=True):
        assert (a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"])
    files = [path / "adapter" / "adapter_model.safetensors" for path in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert run([*arguments, "--run", str(parts)]) == 2
    assert "has a run, at step_00000012: go on with it (--resume)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int8", "int4", "bf16"])
def test_over_quantised_bases(tmp_path: Path, folder: Path, chats: Path, base: str) -> None:
    out = tmp_path / "run"
    arguments = ["finetune", str(folder), str(chats), "--lora", "2", "--base", base, "--run", str(out), *SMALL]
    assert run([*arguments, "--set", "lora.gates=true"]) == 0
    lines = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert lines[-1] < lines[0]
    assert griffin.load(out / "model").config == griffin.load(folder).config  # merged into the original
    if base == "int8":
        assert run(["quantize", str(folder), str(tmp_path / "q"), "--to", base]) == 0
        again = ["finetune", str(tmp_path / "q"), str(chats), "--lora", "2", "--run", str(tmp_path / "r"), *SMALL]
        assert run(again) == 0
        assert not (tmp_path / "r" / "model").exists()
        assert run(["finetune", str(tmp_path / "q"), str(chats), "--run", str(tmp_path / "f"), *SMALL]) == 2


def test_all_weights_keep_the_best(
    tmp_path: Path, folder: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate at which it gets worse again: what is written is the best, not the last."""
    out = tmp_path / "run"
    more = ["--learning-rate", "0.3", "--set", "decay_steps=0", "--set", "validate_every=1", "--set", "warmup_steps=0"]
    assert run(["finetune", str(folder), str(chats), "--run", str(out), *SMALL, *more]) == 0
    shown = capsys.readouterr().out
    losses = {
        line["step"]: line["validation_loss"]
        for line in read_metrics(out / "metrics.jsonl")
        if "validation_loss" in line
    }
    best = min(losses, key=lambda step: losses[step])
    assert best < max(losses)
    assert f"the best at validation was step {best}: that is written" in shown
    assert f"{losses[best]:.3f} loss" in shown


def test_a_state_is_tuned_and_begun_in(
    tmp_path: Path, folder: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(["finetune", str(folder), str(chats), "--state", "4", "--run", str(out), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "numbers are trained, of 4 tokens" in shown
    assert f"griffin chat {folder} --state {out}/state.safetensors" in shown
    lines = [line["validation_loss"] for line in read_metrics(out / "metrics.jsonl") if "validation_loss" in line]
    assert lines[-1] < lines[0]
    assert not (out / "model").exists()
    texts = []
    for state in ([], ["--state", str(out / "state.safetensors")]):
        arguments = ["generate", str(folder), "Hi", "--max-tokens", "8", "--temperature", "0", "--logprobs", "0"]
        assert run([*arguments, *state]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    assert (
        run(["generate", str(folder), "--chat", "Hi", "--max-tokens", "3", *state]) == 0
    )  # its template comes with it


@pytest.mark.slow
@pytest.mark.parametrize("prefer", ["dpo", "ipo", "orpo"])
def test_pairs(tmp_path: Path, folder: Path, pairs: Path, prefer: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["finetune", str(folder), str(pairs), "--lora", "4", "--prefer", prefer, "--run", str(out), *SMALL]
    arguments += ["--learning-rate", "0.03"]
    assert run(arguments) == 0
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "validation_loss" in line]
    if prefer != "orpo":
        assert lines[0]["validation_accuracy"] == 0.5  # it is its reference
    assert lines[-1]["validation_accuracy"] == 1
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss"]
    assert "accuracy" in capsys.readouterr().out
    if prefer == "dpo":  # the reference is there without the model that it was
        assert run([*arguments, "--resume", "--set", "steps=8"]) == 0


@pytest.mark.slow
def test_curves_of_runs(tmp_path: Path, folder: Path, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    runs = [str(tmp_path / name) for name in ("a", "b")]
    for place in runs:
        assert run(["finetune", str(folder), str(chats), "--run", place, *SMALL]) == 0
    assert run(["plot", *runs, "--output", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    capsys.readouterr()
    for arguments, message in (
        ([str(tmp_path)], "has no metrics.jsonl: give the folder of a run"),
        ([*runs, "--output", "p.bmp"], "a name that ends in .png, .svg or .pdf"),
    ):
        assert run(["plot", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_data_is_prepared_apart(tmp_path: Path, folder: Path, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chats.open("a") as file:
        file.write('{"messages": [{"role": "robot", "content": "Hi"}]}\n')
    arguments = ["data", "prepare", str(chats), "--model", str(folder), "--output", str(tmp_path / "tokens")]
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert "chats.jsonl: line 25: message 1 has role 'robot', none of system, user, assistant, model; mend it" in error
    assert error.count("\n") == 1
    assert run([*arguments, "--bad-rows", "skip", "--row-tokens", "40"]) == 0
    shown = capsys.readouterr().out
    assert "left out: " in shown
    assert "line 25" in shown
    assert "examples truncated" in shown
    manifest = json.loads((tmp_path / "tokens" / "data" / "manifest.json").read_text())
    assert len(manifest["bad"]) == 1
    (tmp_path / "dump.txt").write_text("To be<|end|>or not" * 30)
    text = ["data", "prepare", str(tmp_path / "dump.txt"), "--model", str(folder), "--output", str(tmp_path / "t")]
    assert run([*text, "--divider", "<|end|>"]) == 0
    assert "examples   29, " in capsys.readouterr().out  # of 31, "or notTo be" being one; two are held out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl: no such file or folder"),
        (["CHATS", "--prefer", "dpo"], "has no pairs of chosen and rejected, but chat"),
        (["CHATS", "--lora", "2", "--state", "2"], "are two ways to tune; give one"),
        (["CHATS", "--base", "int8"], "base=int8 is for lora and state_tokens"),
        (["CHATS", "--lora", "2", "--set", "lora.targets=linear_z"], "the LoRA target 'linear_z' matches no linear"),
        (["CHATS", "--lora", "2", "--set", "lora.rnak=3"], "LoRA has no field 'rnak'; did you mean rank"),
        (["CHATS", "--template", "none.jinja"], "--template none.jinja: no such file"),
        (["CHATS", "--state", "400"], "a state of 400 tokens is tuned; give 1 .. 16"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    tmp_path: Path, folder: Path, chats: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(chats) if argument == "CHATS" else argument for argument in arguments]
    assert run(["finetune", str(folder), *where, "--run", str(tmp_path / "r")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
