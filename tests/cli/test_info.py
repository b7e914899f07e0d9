from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import griffin
from griffin import PRESETS, Griffin
from griffin.cli.main import run
from griffin.infer.describe import describe
from griffin.ops.cpu import library
from griffin.ops.kernels import CPU_KERNELS, DEFINITIONS, TRITON_KERNELS, serving
from griffin.ops.triton import serve


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
    assert len(found["kernels"]) == len(DEFINITIONS)


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


def test_the_kernels_that_serve_are_shown() -> None:
    ours = {row.op for row in serving("cpu") if row.kernel == "ours"}
    assert ours == (set(CPU_KERNELS) if library.status()[0] else set())
    with library.without_kernels():
        rows = {row.op: row for row in serving("cpu")}
    assert rows["rg_lru"].kernel == "PyTorch, a loop over time"
    assert rows["rg_lru"].reason == "turned off by without_kernels()"
    assert all(row.kernel != "ours" and "no kernels for mps" in row.reason for row in serving("mps"))
    available, reason = serve.status()
    rows = {row.op: row for row in serving("cuda:1")}
    assert {row.op for row in rows.values() if row.kernel == "ours"} == (set(TRITON_KERNELS) if available else set())
    assert rows["rg_lru"].reason == reason
