"""Model folders: exact round trips, every way a folder can be wrong, and the memory that loading takes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import griffin
from griffin import Griffin, GriffinError
from griffin.checkpoint import read, write
from griffin.checkpoint.describe import describe
from griffin.checksums import write_sums
from griffin.fingerprint import of as fingerprint_of
from tests.fuzz import attack

MakeModel = Callable[..., Griffin]


@pytest.fixture
def folder(tmp_path: Path, make_model: MakeModel) -> Path:
    griffin.save(make_model(), tmp_path / "model", griffin.Tokenizer.bytes())
    return tmp_path / "model"


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    write_sums(folder)


@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(tmp_path: Path, make_model: MakeModel, preset: str, dtype: torch.dtype) -> None:
    model = make_model(preset, dtype=dtype)
    griffin.save(model, tmp_path / "model")
    back = griffin.load(tmp_path / "model")
    assert back.config == model.config
    assert not back.training
    assert back.activation_dtype == dtype
    assert fingerprint_of(back) == fingerprint_of(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert griffin.load(tmp_path / "model", dtype=torch.bfloat16).embedding.dtype == torch.bfloat16
    assert back.double().activation_dtype == torch.float64  # nothing but the parameters said it


def test_every_tensor_keeps_its_own_dtype(folder: Path) -> None:
    name = "model.layers.0.temporal_block.rg_lru.recurrent_param"

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            if key != name:
                tensors[key] = tensors[key].bfloat16()

    edit_weights(folder, narrow)
    model = griffin.load(folder)
    assert dict(model.named_parameters())[name].dtype == torch.float32
    assert model.embedding.dtype == model.activation_dtype == torch.bfloat16


def test_sharded_folders(tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(write, "_SHARD_BYTES", 60_000)
    monkeypatch.setattr(read, "_SLAB_BYTES", 1000)
    griffin.save(model, tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    seen: list[tuple[int, int]] = []
    back = griffin.load(tmp_path / "model", progress=lambda done, total: seen.append((done, total)))
    assert fingerprint_of(back) == fingerprint_of(model)
    assert seen[-1][0] == seen[-1][1] == sum(p.nbytes for p in model.parameters())
    shards[1].unlink()
    with pytest.raises(GriffinError, match=f"{shards[1].name} does not exist"):
        griffin.load(tmp_path / "model")


def test_an_lm_head_is_accepted_only_if_it_is_the_embedding(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in griffin.load(folder).state_dict()
    edit_weights(folder, lambda t: t["lm_head.weight"][3, 3].add_(1e-3))
    with pytest.raises(GriffinError, match=r"lm_head\.weight differs from the embedding"):
        griffin.load(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "config.json").write_text('{"a": '), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "holds a list"),
        (lambda f: edit_config(f, strange=1), "does not understand: strange"),
        (lambda f: edit_config(f, hidden_size=64), "(is|says)"),
        (
            lambda f: edit_config(f, vocab_size=260),
            r"embed_tokens.weight is \(259, 32\), but config.json says \(260, 32\)",
        ),
        (lambda f: edit_config(f, num_hidden_layers=4), "lacks model.layers.3"),
        (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin is not read"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "cut short"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cut short"),
        (lambda f: edit_weights(f, lambda t: t.pop("model.final_norm.weight")), "lacks model.final_norm.weight"),
        (lambda f: edit_weights(f, lambda t: t.update(extra=torch.zeros(1))), "has extra, which the model does not"),
        (
            lambda f: edit_weights(f, lambda t: t.update({"model.final_norm.weight": torch.zeros(32).int()})),
            "model.final_norm.weight is I32",
        ),
    ],
)
def test_a_wrong_folder_is_refused_with_the_reason(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(GriffinError, match=message):
        griffin.load(folder)


def test_an_index_that_points_elsewhere_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    for name in ("../weights.safetensors", "/etc/passwd"):
        index = {"weight_map": {"model.final_norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(GriffinError, match="a file of the same folder is needed"):
            griffin.load(folder)


def test_names_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match="does not exist; give a model folder or a Hugging Face id"):
        griffin.load(tmp_path / "nothing" / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(GriffinError, match="is a file"):
        griffin.load(tmp_path / "file")


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(name: str, **_: object) -> str:
        raise OSError(f"401 for {name}\nmany\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(GriffinError, match=r"did not give it: 401 for org/name$"):
        griffin.load("org/name")


def test_nothing_is_overwritten_unasked(folder: Path, tmp_path: Path, make_model: MakeModel) -> None:
    other = make_model(seed=5)
    with pytest.raises(GriffinError, match="already holds a model"):
        griffin.save(other, folder)
    griffin.save(other, folder, overwrite=True)
    assert fingerprint_of(griffin.load(folder)) == fingerprint_of(other)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["thesis.tex"], "exists and is not a model folder"),
        (["config.json", "src/main.c"], "exists and is not a model folder"),
        (["config.json"], "exists and is not a model folder"),  # of some other program
        (["config.json", "model.safetensors", "notes.txt"], "also holds notes.txt, which replacing .* would delete"),
        (["config.json", "model.safetensors", "src/main.c"], "also holds src, which"),
        (["config.json", "model.safetensors", ".git/HEAD", "README.md"], "also holds .git, README.md, which"),
        (["config.json", "model.safetensors", "tokenizer.json/x"], "also holds tokenizer.json, which"),
        (["config.json", "model.safetensors", "optimizer.safetensors"], "also holds optimizer.safetensors, which"),
    ],
)
def test_only_a_model_is_ever_replaced(tmp_path: Path, make_model: MakeModel, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / "papers" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "papers" / name).write_text("years of work")
    with pytest.raises(GriffinError, match=message):
        griffin.save(make_model(), tmp_path / "papers", overwrite=True)
    assert all((tmp_path / "papers" / name).read_text() == "years of work" for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["papers"]


def test_all_that_is_written_may_be_replaced(
    folder: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_SHARD_BYTES", 60_000)
    griffin.save(make_model(seed=5), folder, griffin.Tokenizer.bytes(), overwrite=True)
    assert len(list(folder.iterdir())) == 6 + len(list(folder.glob("model-*-of-*.safetensors")))
    monkeypatch.undo()
    griffin.save(make_model(seed=6), folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "config.json", "model.safetensors"]
    (folder.parent / "empty").mkdir()
    griffin.save(make_model(seed=6), folder.parent / "empty")


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated")  # of torch.compile
def test_a_compiled_model_is_saved_as_the_model_in_it(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model()
    griffin.save(torch.compile(model, backend="eager"), tmp_path / "model")  # type: ignore[arg-type]
    assert fingerprint_of(griffin.load(tmp_path / "model")) == fingerprint_of(model)


def test_sums_are_those_of_sha256sum(folder: Path) -> None:
    assert (folder / "SHA256SUMS").read_text().count("\n") == 5
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, check=True)
    assert b"model.safetensors: OK" in done.stdout


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("model.safetensors", None, None),  # one bit of the last weight
        ("config.json", b'"rope_theta": 10000.0', b'"rope_theta": 10000.1'),
        ("tokenizer.json", b'"add_prefix_space":false', b'"add_prefix_space":true '),
        ("generation_config.json", b"257", b"256"),
    ],
)
def test_damage_that_leaves_a_file_readable(folder: Path, name: str, before: bytes | None, after: bytes | None) -> None:
    file, data = folder / name, (folder / name).read_bytes()
    if before is None or after is None:
        before, after = data, data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]
    assert before in data
    file.write_bytes(data.replace(before, after))
    read = griffin.load_tokenizer if name.startswith(("token", "gener")) else griffin.load
    with pytest.raises(GriffinError, match=rf"{name} is damaged or was changed: .*another copy, or remove its line"):
        read(folder)
    if name == "config.json":
        with pytest.raises(GriffinError, match=f"{name} is damaged or was changed"):
            describe(str(folder))
    sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in sums if name not in line))  # as the message says
    griffin.load(folder)
    griffin.load_tokenizer(folder)
    (folder / "SHA256SUMS").unlink()  # a folder that others made
    griffin.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text[:-3] + "\n",
            "cut",
        ),
        (lambda text: "x" + text[1:], "SHA256SUMS, line 1, is no sha256 and name"),
        (lambda text: text.replace("  config.json", "  ../config.json"), r"line \d, is no sha256 and name"),
        (lambda text: text + "0" * 64 + "  config.json\n", r"line 6, is no sha256 and name"),
        (lambda text: text.replace("  model.safetensors", " *model.safetensors"), None),  # the other form there is
    ],
)
def test_sums_that_are_damaged_themselves(folder: Path, change: Callable[[str], str], message: str | None) -> None:
    (folder / "SHA256SUMS").write_text(change((folder / "SHA256SUMS").read_text()))
    if message is None:
        griffin.load(folder)
    elif message == "cut":
        names = {line.split()[-1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        assert not names <= {path.name for path in folder.iterdir()}
    else:
        with pytest.raises(GriffinError, match=message):
            griffin.load(folder)


def test_a_reason_goes_before_a_sum(folder: Path) -> None:
    """What was edited by hand and does not fit is said as that."""
    edit_config(folder, strange=1)
    with pytest.raises(GriffinError, match="does not understand: strange"):
        griffin.load(folder)


HOSTILE: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: edit_config(f, num_hidden_layers=9_999), r"lacks model\.layers\.9998, the last of 9999"),
    (lambda f: edit_config(f, num_hidden_layers=10**9), "num_hidden_layers=1000000000 is more than 10000"),
    (lambda f: edit_config(f, vocab_size=2**30, hidden_size=2**16, head_dim=2**14), "but config.json says"),
    (lambda f: replace_by_pipe(f / "config.json"), "config.json is a pipe, not a file"),
    (lambda f: replace_by_pipe(f / "model.safetensors"), "model.safetensors is a pipe, not a file"),
    (lambda f: replace_by_zeros(f / "config.json"), "config.json is a device, not a file"),
    (lambda f: replace_by_zeros(f / "model.safetensors"), "model.safetensors is a device, not a file"),
    (lambda f: (f / "config.json").write_text("[" * 200_000), "nested more than 100 deep"),
    (lambda f: edit_weights(f, lambda t: t.update({NORM: torch.zeros(32).int()})), "final_norm.weight is I32"),
    (lambda f: edit_weights(f, lambda t: t.update({NORM: torch.zeros(32).to(torch.int8)})), "weight is int8; it must"),
    (lambda f: edit_weights(f, lambda t: t.update({NORM: torch.zeros(32).double()})), "final_norm.weight is F64"),
    (
        lambda f: edit_weights(f, lambda t: t.update({NORM: torch.zeros(33)})),
        r"is \(33,\), but config.json says",
    ),
    (lambda f: edit_weights(f, lambda t: t.update({HEAD: torch.zeros(2)})), "lm_head.weight is"),
    (lambda f: edit_weights(f, lambda t: t.pop(NORM)), "lacks model.final_norm.weight"),
    (lambda f: edit_weights(f, lambda t: t.update(extra=torch.zeros(1))), "has extra, which the model does not"),
]
NORM, HEAD = "model.final_norm.weight", "lm_head.weight"


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_zeros(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(("spoil", "message"), HOSTILE)
def test_info_refuses_what_loading_refuses(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    """With the same words, and at once."""
    spoil(folder)
    for look in (griffin.load, lambda folder: describe(str(folder))):
        with pytest.raises(GriffinError, match=message):
            look(folder)


def test_info_and_loading_read_a_link_to_a_file(folder: Path) -> None:
    """The cache of a Hugging Face hub is made of these."""
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)
    griffin.load(folder)
    describe(str(folder))


def test_a_failed_save_leaves_nothing(folder: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        griffin.save(make_model(seed=5), folder, overwrite=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_disk_that_fills_while_weights_are_written(folder: Path, make_model: MakeModel) -> None:
    """A limit on the size of files stands for the full disk: the write itself fails, within safetensors."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(GriffinError, match=r"model\.safetensors cannot be written: .*make room"):
            griffin.save(make_model(seed=5), folder, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.slow
def test_loading_takes_the_size_of_the_model(tmp_path: Path) -> None:
    """A 286M-parameter bf16 folder (572 MB): the peak above the imports is at most 1.15 times that, and 130 MB."""
    model = Griffin(griffin.PRESETS["griffin-100m"], dtype=torch.bfloat16)
    griffin.save(model, tmp_path / "model")
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    code = (
        "import re, sys, griffin, torch\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\n"
        "model = griffin.load(sys.argv[1])\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 1.15 * size + 130e6


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renamed away and removed, it would leave the shell nowhere."""
    griffin.save(make_model(), tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(GriffinError, match="the current folder"):
        griffin.save(make_model(), ".", overwrite=True)


@pytest.mark.slow
def test_fuzz_a_model_folder(tmp_path: Path, make_model: MakeModel) -> None:
    """What was saved, or one line."""
    model = make_model()
    griffin.save(model, tmp_path / "model", griffin.Tokenizer.bytes())
    wanted = model.state_dict()

    def read() -> dict[str, torch.Tensor]:
        griffin.load_tokenizer(tmp_path / "model")
        return griffin.load(tmp_path / "model").state_dict()

    def same(found: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())

    assert attack(sorted((tmp_path / "model").iterdir()), read, same)["refused"] > 10


@pytest.mark.slow
def test_fuzz_a_config_that_nothing_vouches_for(tmp_path: Path, make_model: MakeModel) -> None:
    griffin.save(make_model(), tmp_path / "model")
    (tmp_path / "model" / "SHA256SUMS").unlink()
    counts = attack([tmp_path / "model" / "config.json"], lambda: griffin.load(tmp_path / "model"), bool)
    assert counts["refused"] > 10
