"""Google's checkpoints become ours: every name once, every bit the same, and no pickle ever runs here."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

import griffin.convert
from griffin.checkpoint import load, load_tokenizer
from griffin.cli.convert import convert as convert_command
from griffin.cli.unwind import unwinding
from griffin.config import GriffinConfig
from griffin.convert import child
from griffin.convert.google import (
    convert,
    flax_to_google,
    google_to_griffin,
    griffin_to_google,
    read_flax_checkpoint,
    read_torch_checkpoint,
)
from griffin.errors import GriffinError
from griffin.files import whole_folder
from griffin.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("recurrentgemma", "griffin", "hawk", "attention_last")


def recorded(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Google's config and weights of one recorded model."""
    with safe_open(GOLDEN / f"google_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["recording"])["config"]
        names = [key for key in file.keys() if key.startswith("weights.")]  # noqa: SIM118
        return config, {key.removeprefix("weights."): file.get_tensor(key) for key in names}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_is_read_off_the_weights(name: str) -> None:
    google, weights = recorded(name)
    config, _ = google_to_griffin(
        weights,
        window=google["attention_window_size"],
        logits_soft_cap=google["logits_soft_cap"],
        embedding_scale="bf16" if google["embeddings_scale_by_sqrt_dim"] else "none",
    )
    assert config == GriffinConfig(
        vocab_size=google["vocab_size"],
        width=google["width"],
        mlp_width=google["mlp_expanded_width"],
        lru_width=google["lru_width"],
        num_heads=google["num_heads"],
        num_gate_blocks=google["num_heads"],
        block_types=tuple(google["block_types"]),
        window=google["attention_window_size"],
        logits_soft_cap=google["logits_soft_cap"] or None,
        embedding_scale="bf16" if google["embeddings_scale_by_sqrt_dim"] else "none",
    )
    assert config.num_parameters() == sum(value.numel() for value in weights.values())


def test_defaults_are_those_of_the_released_models() -> None:
    config, _ = google_to_griffin(recorded("recurrentgemma")[1])
    assert (config.window, config.logits_soft_cap, config.embedding_scale) == (2048, 30.0, "bf16")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_exact(name: str, dtype: torch.dtype) -> None:
    weights = {key: value.to(dtype) for key, value in recorded(name)[1].items()}
    config, ours = google_to_griffin(weights)
    assert all(value.is_contiguous() and value.dtype == dtype for value in ours.values())
    assert sum(value.numel() for value in ours.values()) == config.num_parameters()
    assert_same(griffin_to_google(config, ours), weights)


def test_what_changes_shape_computes_the_same() -> None:
    """The transposes, checked by what the weights compute: the two branches of the MLP, the taps of the convolution."""
    _, weights = recorded("griffin")
    _, ours = google_to_griffin(weights)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    both = torch.einsum("td,cde->cte", x, weights["blocks.1.mlp_block.ffw_up.w"])
    both = both + weights["blocks.1.mlp_block.ffw_up.b"][:, 0]
    for google, name in zip(both, ("gate_proj", "up_proj"), strict=True):
        prefix = f"model.layers.1.mlp_block.{name}"
        mine = torch.nn.functional.linear(x, ours[f"{prefix}.weight"], ours[f"{prefix}.bias"])
        torch.testing.assert_close(mine, google)
    signal = torch.randn(1, 48, 9, generator=torch.Generator().manual_seed(1))
    taps = weights["blocks.0.recurrent_block.conv_1d.w"]
    mine = torch.nn.functional.conv1d(
        torch.nn.functional.pad(signal, (3, 0)), ours["model.layers.0.temporal_block.conv_1d.weight"], groups=48
    )
    padded = torch.nn.functional.pad(signal, (3, 0))
    google = sum(taps[k][None, :, None] * padded[..., k : k + 9] for k in range(4))  # the last tap is the current token
    torch.testing.assert_close(mine, google)


def test_every_name_is_known_on_both_sides() -> None:
    config, ours = google_to_griffin(recorded("recurrentgemma")[1])
    recurrent, attention = (
        {name.removeprefix(f"model.layers.{i}.") for name in ours if name.startswith(f"model.layers.{i}.")}
        for i in (0, 2)
    )
    mlp = {f"mlp_block.{p}_proj.{kind}" for p in ("gate", "up", "down") for kind in ("weight", "bias")}
    norms = {"temporal_pre_norm.weight", "channel_pre_norm.weight"}
    gates = {f"rg_lru.{gate}_gate_{kind}" for gate in ("recurrent", "input") for kind in ("weight", "bias")}
    linears = {f"{p}.{kind}" for p in ("linear_x", "linear_y", "linear_out", "conv_1d") for kind in ("weight", "bias")}
    temporal = gates | linears | {"rg_lru.recurrent_param"}
    assert recurrent == mlp | norms | {f"temporal_block.{name}" for name in temporal}
    projections = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "o_proj.bias"}
    assert attention == mlp | norms | {f"temporal_block.{name}" for name in projections}
    assert {name for name in ours if ".layers." not in name} == {"model.embed_tokens.weight", "model.final_norm.weight"}
    assert len(ours) == 4 * 21 + 13 + 2
    assert config.num_layers == 5


Change = Callable[[dict[str, Tensor]], Any]


def rename_layer(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if name.startswith("blocks.3.")]:
        weights[name.replace("blocks.3.", "blocks.7.")] = weights.pop(name)


CHANGES: dict[str, tuple[Change, list[str]]] = {
    "one missing": (
        lambda w: w.pop("blocks.3.mlp_block.ffw_down.bias"),
        ["missing", "blocks.3.mlp_block.ffw_down.bias"],
    ),
    "two missing": (
        lambda w: (w.pop("final_norm.scale"), w.pop("blocks.2.attention_block.proj_v.weight")),
        ["missing", "final_norm.scale", "blocks.2.attention_block.proj_v.weight"],
    ),
    "no embedding": (lambda w: w.pop("embedder.input_embedding"), ["embedder.input_embedding is missing"]),
    "one more": (lambda w: w.update({"blocks.0.extra": torch.ones(2)}), ["unknown", "blocks.0.extra"]),
    "one more, elsewhere": (lambda w: w.update({"lm_head": torch.ones(2)}), ["unknown", "lm_head"]),
    "leading zero": (
        lambda w: w.update({"blocks.01.temporal_pre_norm.scale": torch.ones(32)}),
        ["unknown", "blocks.01.temporal_pre_norm.scale"],
    ),
    "missing layer": (rename_layer, ["blocks.3 is missing"]),
    "two kinds in a layer": (
        lambda w: w.update({"blocks.0.attention_block.proj_q.weight": torch.ones(32, 32)}),
        ["blocks.0", "not both"],
    ),
    "wrong shape": (
        lambda w: w.update({"blocks.1.mlp_block.ffw_down.weight": torch.ones(96, 32)}),
        ["another shape", "blocks.1.mlp_block.ffw_down.weight [96, 32], expected [32, 96]"],
    ),
    "gate not square": (
        lambda w: w.update({"blocks.0.recurrent_block.rg_lru.a_gate.w": torch.ones(4, 8, 9)}),
        ["blocks.0.recurrent_block.rg_lru.a_gate.w [4, 8, 9], expected [4, 8, 8]"],
    ),
    "heads and gates differ": (
        lambda w: w.update({"blocks.2.attention_block.proj_k.weight": torch.ones(16, 32)}),
        ["2 heads", "4 blocks"],
    ),
    "transposed key": (
        lambda w: w.update({"blocks.2.attention_block.proj_k.weight": torch.ones(32, 8)}),
        ["1 heads", "4 blocks"],
    ),
    "scalar": (lambda w: w.update({"embedder.input_embedding": torch.tensor(1.0)}), ["[], expected 2 axes"]),
    "integers": (
        lambda w: w.update({"final_norm.scale": torch.ones(32, dtype=torch.int8)}),
        ["not float32", "final_norm.scale"],
    ),
    "empty": (lambda w: w.clear(), ["it holds nothing"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_listed(change: str) -> None:
    _, weights = recorded("recurrentgemma")
    apply, expected = CHANGES[change]
    apply(weights)
    with pytest.raises(GriffinError) as error:
        google_to_griffin(weights)
    for part in expected:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_the_way_back_is_total_too() -> None:
    config, ours = google_to_griffin(recorded("griffin")[1])
    with pytest.raises(GriffinError, match=r"missing: model\.final_norm\.weight; unknown: lm_head\.weight"):
        griffin_to_google(
            config, {("lm_head.weight" if k == "model.final_norm.weight" else k): v for k, v in ours.items()}
        )
    name = "model.layers.0.temporal_block.conv_1d.weight"
    with pytest.raises(GriffinError, match=r"conv_1d\.weight \[48, 4\], expected \[48, 1, 4\]"):
        griffin_to_google(config, ours | {name: ours[name][:, 0]})


@pytest.mark.parametrize(
    ("rows", "vocab_size", "kept"),
    [(256_128, None, 256_000), (256_000, None, 256_000), (256_513, None, 256_513), (300, None, 300), (300, 257, 257)],
)
def test_padding_of_the_embedding_is_dropped(rows: int, vocab_size: int | None, kept: int) -> None:
    _, weights = recorded("attention_last")
    weights["embedder.input_embedding"] = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 24)
    config, ours = google_to_griffin(weights, vocab_size=vocab_size)
    assert config.vocab_size == kept
    embedding = ours["model.embed_tokens.weight"]
    assert embedding.shape == (kept, 24)
    assert embedding[-1, 0] == kept - 1
    assert embedding.untyped_storage().nbytes() == kept * 24 * 4  # nothing of the padding is written


def test_a_vocabulary_beyond_the_rows_is_refused() -> None:
    with pytest.raises(GriffinError, match="vocab_size=68 is more than the embedding's 67 rows"):
        google_to_griffin(recorded("recurrentgemma")[1], vocab_size=68)


def flax_tree(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Google's Flax layout: `blocks.0` is one key, a Dense has `kernel` [in, out]."""
    tree: dict[str, Any] = {}
    for name, value in weights.items():
        *folders, leaf = name.split(".")
        if folders[0] == "blocks":
            folders[:2] = [f"blocks.{folders[1]}"]
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at["kernel" if leaf == "weight" else leaf] = (value.T if leaf == "weight" else value).numpy()
    return tree


def joined(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= joined(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "form", [lambda t: t, lambda t: {"params": t}, joined, lambda t: joined({"params": t})], ids=["", "p", "j", "pj"]
)
def test_flax_parameters_are_the_same_model(name: str, form: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    _, weights = recorded(name)
    assert_same(flax_to_google(form(flax_tree(weights))), weights)


def test_a_flax_bfloat16_leaf_keeps_its_bits() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes comes with griffin-lm[convert]")
    bits = np.arange(-(2**15), 2**15, dtype=np.int16).reshape(256, 256)
    out = flax_to_google({"a": {"kernel": bits.view(ml_dtypes.bfloat16)}})["a.weight"]
    assert out.dtype == torch.bfloat16
    assert np.array_equal(out.T.contiguous().view(torch.int16).numpy(), bits)


def test_flax_leaves_that_are_no_arrays_are_named() -> None:
    with pytest.raises(GriffinError, match="a/b in the Flax checkpoint is a str"):
        flax_to_google({"a": {"b": "text"}})
    with pytest.raises(GriffinError, match="twice"):
        flax_to_google({"a": {"b": np.ones(2)}, "a/b": np.ones(2)})


def test_an_orbax_folder_is_read_exactly(tmp_path: Path) -> None:
    orbax = pytest.importorskip("orbax.checkpoint", reason="reading Flax checkpoints needs griffin-lm[convert]")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    _, weights = recorded("griffin")
    rounded = {name: value.bfloat16() for name, value in weights.items()}

    def low(tree: dict[str, Any]) -> dict[str, Any]:
        return {k: low(v) if isinstance(v, dict) else v.astype(ml_dtypes.bfloat16) for k, v in tree.items()}

    tree = low(flax_tree(weights))
    orbax.PyTreeCheckpointer().save(tmp_path / "flax", {"params": tree})
    assert_same(read_flax_checkpoint(tmp_path / "flax"), rounded)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(GriffinError, match="is not a Flax"):
        read_flax_checkpoint(tmp_path)
    (tmp_path / "2b").mkdir()
    (tmp_path / "2b" / "_METADATA").write_text("{}")
    with pytest.raises(GriffinError, match=r"give the folder in it that is one: .*2b$"):
        read_flax_checkpoint(tmp_path)
    with pytest.raises(GriffinError, match=r"griffin-lm\[convert\]|cannot be read as an orbax checkpoint"):
        read_flax_checkpoint(tmp_path / "2b")


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_read_exactly(tmp_path: Path, wrapper: str | None, zipped: bool) -> None:
    _, weights = recorded("hawk")
    mixed = {name: value.bfloat16() if value.ndim > 1 else value for name, value in weights.items()}
    mixed["embedder.input_embedding"] = torch.full((3, 2), float("nan"), dtype=torch.bfloat16)
    saved: Any = mixed if wrapper is None else {wrapper: mixed, "step": 7}
    torch.save(saved, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    read = read_torch_checkpoint(tmp_path / "model.pt")
    assert read.pop("embedder.input_embedding").isnan().all()
    del mixed["embedder.input_embedding"]
    assert_same(read, mixed)


def test_tied_and_overlapping_tensors_are_read(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    torch.save({"a": base, "b": base.T, "c": base[1:], "d": base}, tmp_path / "model.pt")
    read = read_torch_checkpoint(tmp_path / "model.pt", scratch=tmp_path)
    assert_same(read, {"a": base, "b": base.T, "c": base[1:], "d": base})
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.command = f"touch {mark}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_hostile_pickle_does_not_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, path = tmp_path / "it-ran", tmp_path / "model.pt"
    content = {"embedder.input_embedding": Hostile(mark)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(GriffinError, match=r"model\.pt cannot be read: it (is not|asks to run)") as error:
        read_torch_checkpoint(path)
    assert not mark.exists()
    assert kind == "bare pickle" or f"{os.name if os.name == 'nt' else 'posix'}.system" in str(error.value)
    assert "weights_only" not in str(error.value)  # torch advises to switch it off
    pickle.loads(pickle.dumps(content))  # the same pickle, opened carelessly, does run: the test can fail
    assert mark.exists()


def save_stretched(path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(2**40)}, path)


def save_half(path: Path) -> None:
    torch.save(recorded("hawk")[1], path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_half, "cannot be read"),
        (save_stretched, "claim"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(os.urandom(1000)), "cannot be read"),
        (lambda path: torch.save([torch.ones(2)], path), "it holds a list"),
        (lambda path: torch.save({"a": 3}, path), "entry 'a' is a int"),
        (lambda path: torch.save({"a": torch.ones(2).to_sparse()}, path), "dense"),
        (lambda path: None, "is not a file"),
    ],
    ids=["truncated", "stretched", "empty", "noise", "list", "number", "sparse", "absent"],
)
def test_what_is_no_state_dict_is_refused_in_one_line(
    tmp_path: Path, save: Callable[[Path], Any], message: str
) -> None:
    save(tmp_path / "model.pt")
    with pytest.raises(GriffinError, match=message) as error:
        read_torch_checkpoint(tmp_path / "model.pt")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_becomes_a_folder_that_loads_with_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    _, weights = recorded("griffin")
    weights = {name: value.to(dtype) for name, value in weights.items()}
    torch.save(weights, tmp_path / "model.pt")
    lines: list[str] = []
    config = convert(
        tmp_path / "model.pt",
        tmp_path / "new" / "model",
        window=5,
        logits_soft_cap=0,
        embedding_scale="none",
        report=lines.append,
    )
    model = load(tmp_path / "new" / "model")
    assert model.config == config
    assert (config.window, config.logits_soft_cap, config.embedding_scale) == (5, None, "none")
    assert_same(griffin_to_google(config, model.state_dict()), weights)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["model"]  # no scratch left
    assert any(f"{config.num_parameters():,} parameters in {str(dtype)[6:]}" in line for line in lines)
    with pytest.raises(GriffinError, match="already holds a model"):
        convert(tmp_path / "model.pt", tmp_path / "new" / "model")
    convert(tmp_path / "model.pt", tmp_path / "new" / "model", overwrite=True)
    assert load(tmp_path / "new" / "model").config.window == 2048


def test_the_tokenizer_goes_along_and_must_fit(tmp_path: Path) -> None:
    Tokenizer.bytes().save(tmp_path / "words")
    _, weights = recorded("griffin")
    torch.save(weights, tmp_path / "small.pt")
    with pytest.raises(GriffinError, match="ids and the model 61"):
        convert(tmp_path / "small.pt", tmp_path / "model", tokenizer=tmp_path / "words")
    weights["embedder.input_embedding"] = torch.randn(300, 32)
    torch.save(weights, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "model", tokenizer=tmp_path / "words")
    assert load_tokenizer(tmp_path / "model").encode("héllo") == Tokenizer.bytes().encode("héllo")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    _, weights = recorded("hawk")
    del weights["final_norm.scale"]
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(GriffinError, match=r"missing: final_norm\.scale"):
        convert(tmp_path / "model.pt", tmp_path / "model")
    with pytest.raises(GriffinError, match=r"folder with a PyTorch checkpoint in it; give the file: .*model\.pt"):
        convert(tmp_path, tmp_path / "model")
    with pytest.raises(GriffinError, match="does not exist"):
        convert(tmp_path / "absent", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(GriffinError, match="is not a model folder"):
        convert(tmp_path / "model.pt", tmp_path / "model", overwrite=True)


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(convert_command)
    torch.save(recorded("recurrentgemma")[1], tmp_path / "model.pt")
    run = CliRunner().invoke(app, [str(tmp_path / "model.pt"), str(tmp_path / "my model"), "--window", "8"])
    assert run.exit_code == 0, run.output
    assert "68,032 parameters in float32: 5 layers (4 recurrent, 1 attention)" in run.output
    assert "window 8" in run.output
    assert f"griffin generate '{tmp_path / 'my model'}'" in run.output
    assert load(tmp_path / "my model").config.window == 8


def test_the_reader_of_pickles_ends_with_its_parent_and_leaves_nothing(tmp_path: Path) -> None:
    """However the parent ended: its end of the pipe closes."""
    scratch, source = tmp_path / "scratch", tmp_path / "weights.pt"
    scratch.mkdir()
    os.mkfifo(source)  # reading it waits for ever
    child = Path(griffin.convert.__file__).with_name("child.py")
    command = [sys.executable, "-P", str(child), str(source), str(scratch)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    time.sleep(0.1)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=60) == 1
    assert not scratch.exists()


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    _, weights = recorded("hawk")
    spoiled = {name: value.clone() for name, value in weights.items()}
    next(value for name, value in spoiled.items() if name.endswith("a_param")).fill_(torch.nan)
    torch.save(spoiled, tmp_path / "model.pt")
    with pytest.raises(GriffinError, match=r"holds NaN or infinity, .*recurrent_param"):
        convert(tmp_path / "model.pt", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_blocks_without_end_are_refused_at_once() -> None:
    many = {f"blocks.{index}.x": torch.empty(0) for index in range(20_001)}
    with pytest.raises(GriffinError, match=r"20001 blocks, more than"):
        google_to_griffin(recorded("hawk")[1] | many)


def test_tensors_without_end_are_refused_by_their_number() -> None:
    with pytest.raises(ValueError, match="it holds 200001 tensors, more than 200000"):
        child.weights(dict.fromkeys(map(str, range(200_001)), torch.zeros(1)), 10**9)


def test_a_refused_conversion_makes_no_folder(tmp_path: Path) -> None:
    (tmp_path / "g.pt").write_bytes(b"noise")
    with pytest.raises(GriffinError, match="cannot be read"):
        convert(tmp_path / "g.pt", tmp_path / "new" / "deeper" / "out")
    assert os.listdir(tmp_path) == ["g.pt"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_reader_of_pickles_does_not_outlive_its_parent(tmp_path: Path, number: int) -> None:
    """Killed with a real parent in between; Ctrl-C comes to that alone here, which then kills the reader."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    os.mkfifo(tmp_path / "weights.pt")  # reading it waits for ever
    code = (
        "import signal, sys\nfrom griffin.convert.files import _run_to_its_end\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "_run_to_its_end([sys.executable, '-P', *sys.argv[1:]])\n"
    )
    script = Path(griffin.convert.__file__).with_name("child.py")
    arguments = [str(script), str(tmp_path / "weights.pt"), str(scratch)]
    root = Path(griffin.convert.__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=root, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: children(arguments[1]) == 2)  # it names them, too
        parent.send_signal(number)
        parent.wait(20)
        wait_until(lambda: children(arguments[1]) == 0)
        assert scratch.exists() == (number == signal.SIGINT)  # removed by a parent that lives, else by the reader
    finally:
        parent.kill()
        parent.wait()


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "nothing happened in a minute"
        time.sleep(0.05)


def children(argument: str) -> int:
    done = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True)
    return sum(argument in line and not line.startswith("ps") for line in done.stdout.splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_told_to_end_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended, unwinding(), whole_folder(tmp_path / "model"):
            signal.raise_signal(number)
        assert ended.value.code == 128 + number
        assert os.listdir(tmp_path) == []
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # nohup
        with unwinding():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
