from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

import griffin
from griffin import PRESETS, Griffin, ops
from griffin.checkpoint.describe import describe
from griffin.cli.main import run
from griffin.ops import device
from griffin.ops.cpu import library
from griffin.ops.device import OPS, serving


@pytest.mark.parametrize("name", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
def test_sizes_are_those_of_the_real_thing(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found, model = describe(name, dtype), Griffin(PRESETS[name], dtype=dtype)
        assert found.num_parameters == sum(p.numel() for p in model.parameters())
        assert found.weight_bytes == sum(p.nbytes for p in model.parameters())
        assert found.num_embedding_parameters == model.embedding.numel()
        state = model.new_state(1)
        assert found.state_bytes == state.nbytes
        with torch.no_grad():
            model(torch.ones(1, 64, dtype=torch.int64), state)
        assert found.state_bytes + 64 * found.state_bytes_per_token == state.nbytes


def test_the_largest_preset_needs_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "griffin-14b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_parameters"] == PRESETS["griffin-14b"].num_parameters()
    assert len(found["kernels"]) == len(OPS)


def test_a_folder_goes_before_a_preset(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_folder.rename(chat_folder.parent / "griffin-14b")
    monkeypatch.chdir(chat_folder.parent)
    assert run(["info", "griffin-14b"]) == 0
    out = capsys.readouterr().out
    assert "a chat template" in out
    assert "float32" in out
    assert "however long the text" in out
    griffin.save(griffin.load("griffin-14b", dtype=torch.bfloat16), "half", griffin.load_tokenizer("griffin-14b"))
    assert describe("half").dtype == torch.bfloat16


def test_what_serves_every_op_is_shown() -> None:
    assert {row.op for row in serving("cpu")} == {*ops.__all__, "quantized_linear_many", "product"}
    available, reason = library.status()
    rows = {row.op: row for row in serving("cpu")}
    assert (rows["rg_lru"].kernel == "ours") == available
    assert rows["rg_lru"].reason == reason
    assert rows["quantize_int8"].reason == "the definition is what there is for it"
    if available:
        assert "at most 8 taps" in rows["causal_conv1d"].reason
        assert "where no gradient is recorded" in rows["embed"].reason
    with library.without_kernels():
        rows = {row.op: row for row in serving("cpu")}
    assert rows["rg_lru"].kernel == "PyTorch: a loop over time"
    assert rows["rg_lru"].reason == "turned off by without_kernels()"
    assert all(row.kernel != "ours" and "no kernels for mps" in row.reason for row in serving("mps"))
    available, reason = device.status(torch.device("cuda"))
    rows = {row.op: row for row in serving("cuda:1")}
    assert (rows["rg_lru"].kernel == "ours") == available
    assert rows["rg_lru"].reason == reason


def test_the_kernels_of_the_table_are_there() -> None:
    """Under their ops' names, but for some."""
    functions = {
        "linear": "linear",
        "output_linear": "wide_linear",
        "product": "wide_linear",
        "dequantize": "widen_int8",
    }
    functions |= {"quantized_linear": "linear_int4", "quantized_linear_many": "linear_int8_many"}
    for name, op in device.OPS.items():
        if op.cpu is not None:
            module = importlib.import_module(f"griffin.ops.{op.cpu.file}")
            assert callable(getattr(module, functions.get(name, name)))
