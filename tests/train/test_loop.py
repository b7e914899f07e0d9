"""A run from end to end: what it writes, how it stops, how it goes on, what it refuses."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import griffin
from griffin import PRESETS, Griffin
from griffin.checksums import write_sums
from griffin.data.batches import Rows
from griffin.data.packing import count_rows
from griffin.data.shards import open_shard
from griffin.errors import GriffinError
from griffin.train import loop, source
from griffin.train.config import TrainConfig
from griffin.train.flops import flops_per_token
from griffin.train.loop import Result, train
from griffin.train.metrics import curve, read_metrics
from griffin.train.optim import learning_rate
from griffin.train.snapshot import STATE, latest

CLOCK = {"seconds", "tokens_per_s"}  # differ from run to run


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} is the number after {number - 1}.\n" for number in range(1, 60)))
    return TrainConfig(
        model=replace(PRESETS["griffin-tiny"], width=16, mlp_width=16, lru_width=24, num_heads=2),
        train_data=str(text),
        tokenizer="bytes",
        batch_rows=2,
        row_tokens=16,
        steps=12,
        warmup_steps=2,
        validate_every=4,
        validation_rows=3,
        checkpoint_every=5,
        log_every=3,
        threads=1,
    )


def run(config: TrainConfig, folder: Path, **options: Any) -> tuple[Result, str]:
    console = Console(file=io.StringIO(), width=80)
    result = train(config, folder, console=console, **options)
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def numbers(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_compiled_blocks_train_alike(tmp_path: Path, config: TrainConfig) -> None:
    """The same losses but for the rounding of sums, and the share of the device's peak where that is given."""
    plain, _ = run(config, tmp_path / "plain")
    compiled, _ = run(replace(config, compile=True, recompute="cheap", peak_flops=1e9), tmp_path / "compiled")
    assert plain.finished
    assert compiled.finished
    lines = [numbers(tmp_path / name) for name in ("plain", "compiled")]
    for a, b in zip(*lines, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3)
    rates = [line for line in read_metrics(tmp_path / "compiled" / "metrics.jsonl") if "mfu" in line]
    assert len(rates) == 4
    perfect = 1e9 / flops_per_token(config.model, config.row_tokens)
    for line in rates:
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] / perfect, abs=1e-4)


def test_what_a_run_writes(tmp_path: Path, config: TrainConfig) -> None:
    prompts: list[str] = []

    def sampler(model: Griffin, tokenizer: griffin.Tokenizer, prompt: str) -> str:
        prompts.append(prompt)
        return "[Exeunt.]"  # not markup

    result, shown = run(replace(config, sample_every=5, sample_prompt="Who"), tmp_path / "run", sampler=sampler)
    assert result.finished
    assert result.model_folder == tmp_path / "run" / "model"
    assert prompts == 4 * ["Who"]  # before, at 5 and 10, after
    assert shown.count("[Exeunt.]") == 4
    lines = numbers(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 4, 8, 12]
    assert lines[-1]["validation_bits_per_byte"] == result.validation_bits_per_byte
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step_00000010",
        "step_00000012",
    ]
    model = griffin.load(tmp_path / "run" / "model")
    other = griffin.load(tmp_path / "run" / "checkpoints" / "step_00000012")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert griffin.load_tokenizer(tmp_path / "run" / "model").fingerprint() == griffin.Tokenizer.bytes().fingerprint()
    assert "step     12  validation" in shown


def signals_on(call: int, number: int, times: int = 1) -> Any:
    """A sampler that sends a signal when it is called for the `call`-th time."""
    calls = []

    def sampler(model: Griffin, tokenizer: griffin.Tokenizer, prompt: str) -> str:
        calls.append(prompt)
        for _ in range(times if len(calls) == call else 0):
            signal.raise_signal(number)
        return ""

    return sampler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, config: TrainConfig, number: int) -> None:
    run(config, tmp_path / "whole")
    sampled = replace(config, sample_every=7)
    before = signal.getsignal(number)
    result, shown = run(sampled, tmp_path / "broken", sampler=signals_on(2, number))
    assert signal.getsignal(number) is before
    assert not result.finished
    assert result.signal == number
    assert result.model_folder is None
    assert "stopping after this step" in shown
    assert result.step == 7
    assert sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()) == [
        "step_00000005",
        "step_00000007",
    ]
    result, shown = run(sampled, tmp_path / "broken", resume=True)
    assert result.finished
    assert "going on from step 7" in shown
    assert "not bit for bit" not in shown
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "broken" / "model") == weights(tmp_path / "whole" / "model")


def test_the_second_ctrl_c_stops_at_once(tmp_path: Path, config: TrainConfig) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run", sampler=signals_on(1, signal.SIGINT, times=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert latest(tmp_path / "run") is None
    assert run(config, tmp_path / "run", resume=True)[0].finished  # from the beginning


def test_a_terminal_and_its_shell_may_both_hang_up(tmp_path: Path, config: TrainConfig) -> None:
    result, _ = run(config, tmp_path / "run", sampler=signals_on(1, signal.SIGHUP, times=3))
    assert (result.step, result.signal) == (0, signal.SIGHUP)


def test_a_run_under_nohup_does_not_stop(tmp_path: Path, config: TrainConfig) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(config, tmp_path / "run", sampler=signals_on(1, signal.SIGHUP))[0].finished
    finally:
        signal.signal(signal.SIGHUP, before)


KILLED = """
import json, os, random, signal, sys, time
import torch._dynamo  # which making a model imports: once here, not in every child
from pathlib import Path
from griffin.train.config import config_from_json
from griffin.train.loop import train
from griffin.train.metrics import read_metrics
from griffin.train.snapshot import STATE, latest
import griffin.train.snapshot as snapshot
from rich.console import Console

folder, seed, in_checkpoint = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "yes"
config = config_from_json((folder / "config.json").read_text(), "config")
random.seed(seed)

def start(run, die_in_checkpoint=False):
    child = os.fork()
    if child == 0:
        if die_in_checkpoint:
            def save_tensors(*arguments, **options):
                os.kill(os.getpid(), signal.SIGKILL)
            snapshot.save_tensors = save_tensors
        with open(os.devnull, "w") as nowhere:
            train(config, folder / run, resume=True, console=Console(file=nowhere))
        os._exit(0)
    return child

assert os.waitpid(start("whole"), 0)[1] == 0
seen = []
for low, high in ((3, 20), (25, 40)):
    child, step = start("broken", in_checkpoint), random.randint(low, high)
    while not in_checkpoint and not any(line["step"] >= step for line in read_metrics(folder / "broken/metrics.jsonl")):
        time.sleep(0.001)
    if not in_checkpoint:
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    newest = latest(folder / "broken")
    seen.append([status, step, None if newest is None else newest.name])
assert os.waitpid(start("broken"), 0)[1] == 0
print(json.dumps(seen))
"""


@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, config: TrainConfig, in_checkpoint: bool) -> None:
    config = replace(config, steps=60, checkpoint_every=12, validate_every=20, log_every=1)
    (tmp_path / "config.json").write_text(config.to_json())
    seed = int.from_bytes(os.urandom(2))
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(seed), "yes" if in_checkpoint else "no"]
    root = Path(griffin.__file__).parents[1]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, (seed, done.stderr)
    kills = json.loads(done.stdout)
    assert kills[0][0] == signal.SIGKILL, (seed, kills)  # a busy machine may let the second one finish first
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole"), (seed, kills)
    assert weights(tmp_path / "broken" / "model") == weights(tmp_path / "whole" / "model"), (seed, kills)
    last = "step_00000060"
    assert weights(tmp_path / "broken" / "checkpoints" / last) == weights(tmp_path / "whole" / "checkpoints" / last)
    for place in (tmp_path / "broken", tmp_path / "broken" / "checkpoints"):
        assert [path.name for path in place.glob(".*") if path.name != ".lock"] == []  # nothing is left lying about


def test_a_run_reads_every_row_once_per_epoch(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, grad_accumulation=3, sample_every=7)
    read: list[int] = []

    rows_of = source.rows_of

    def recording(config: TrainConfig, shard: Any, *arguments: Any) -> Any:
        rows, lost = rows_of(config, shard, *arguments)

        def batch(numbers: list[int]) -> Any:
            if shard.folder.name == "train":
                read.extend(numbers)
            return rows.batch(numbers)

        return Rows(rows.count, batch), lost

    monkeypatch.setattr(source, "rows_of", recording)
    run(config, tmp_path / "run", sampler=signals_on(2, signal.SIGINT))
    run(config, tmp_path / "run", resume=True)
    num_rows = count_rows(open_shard(tmp_path / "run" / "data" / "train"), config.row_tokens)
    assert len(read) == 12 * 3 * 2
    assert len(read) < num_rows  # so that none comes twice
    assert len(set(read)) == len(read)


def test_a_run_is_not_overwritten(tmp_path: Path, config: TrainConfig) -> None:
    run(config, tmp_path / "run")
    with pytest.raises(GriffinError, match=r"has a run, at step_00000012: .*--resume.*--run DIR"):
        run(config, tmp_path / "run")
    before = weights(tmp_path / "run" / "model")
    result, _ = run(config, tmp_path / "run", resume=True)  # finished already
    assert result.finished
    assert weights(tmp_path / "run" / "model") == before


def test_one_process_per_folder(tmp_path: Path, config: TrainConfig) -> None:
    def sampler(model: Griffin, tokenizer: griffin.Tokenizer, prompt: str) -> str:
        with pytest.raises(GriffinError, match="another process is training in"):
            run(config, tmp_path / "run", resume=True)
        return ""

    run(config, tmp_path / "run", sampler=sampler)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"row_tokens": 8}, "row_tokens was 16, is 8"),
        ({"model": replace(PRESETS["griffin-tiny"], width=32)}, "model.width was 16, is 32"),
        ({"train_data": "another text"}, "was trained on other data"),
    ],
)
def test_another_run_is_not_gone_on_with(
    tmp_path: Path, config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    run(config, tmp_path / "run")
    if "train_data" in changes:
        changes = {"train_data": str(tmp_path / "other.txt")}
        (tmp_path / "other.txt").write_text("another text\n" * 100)
    before = contents(tmp_path / "run")
    with pytest.raises(GriffinError, match=message):
        run(replace(config, **changes), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before  # checked first, written after


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path, config: TrainConfig) -> None:
    run(config, tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(GriffinError, match=r"has done 12 steps, more than steps=8: give as many or more"):
        run(replace(config, steps=8), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


def test_another_schedule_is_said_with_the_jump_it_makes(tmp_path: Path, config: TrainConfig) -> None:
    run(config, tmp_path / "run")
    _, shown = run(replace(config, steps=24, betas=(0.8, 0.9)), tmp_path / "run", resume=True)
    assert "not bit for bit the unbroken run: steps was 12, is 24\n" in shown
    then, now = learning_rate(11, config), learning_rate(12, replace(config, steps=24))
    assert now > 5 * then
    assert f"betas was [0.9, 0.95], is [0.8, 0.9]; the learning rate goes on from {then:.3g} with {now:.3g}" in shown


def test_more_steps_are_another_schedule_but_the_same_run(tmp_path: Path, config: TrainConfig) -> None:
    run(config, tmp_path / "run")
    result, _ = run(replace(config, steps=15), tmp_path / "run", resume=True)
    assert result.step == 15
    assert [line["step"] for line in numbers(tmp_path / "run") if "loss" in line] == [3, 6, 9, 12, 15]


def spoil(file: Path, damage: str) -> None:
    """Damage a file of a checkpoint."""
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-10])
    elif damage == "missing":
        file.unlink()
    elif damage == "foreign":
        file.write_text("{}")
    elif damage == "swapped":
        shutil.copy(file.parent.with_name("step_00000010") / file.name, file)
    elif damage == "bit":
        at = len(data) // 2
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        tensors = load_file(file)
        first = min(tensors)
        value = tensors.pop(first)
        save_file(tensors | ({"exp_avg.a": value} if damage == "rename" else {first: torch.zeros(3)}), file)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("model.safetensors", "optimizer.safetensors", "train_state.json", "config.json")
        for damage in ("bit", "cut", "missing", "swapped")
        if (name, damage) != ("config.json", "swapped")  # every checkpoint of a run has the same one
    ],
)
def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, config: TrainConfig, name: str, damage: str) -> None:
    """The one before is, and it is said; so the run ends as one that was never broken."""
    config = replace(config, keep_checkpoints=3)
    run(config, tmp_path / "run")
    unbroken = weights(tmp_path / "run" / "model")
    newest = tmp_path / "run" / "checkpoints" / "step_00000012"
    spoil(newest / name, damage)
    result, shown = run(config, tmp_path / "run", resume=True)
    assert result.finished
    lines = " ".join(shown.split())
    assert name in lines
    assert "going on from the one before" in lines
    assert "going on from step 10 " in lines
    assert (newest.parent / "step_00000012.damaged").is_dir()
    assert weights(tmp_path / "run" / "model") == unbroken


MISLEADING = {
    "empty sums": lambda place: os.truncate(place / "step_00000012" / "SHA256SUMS", 0),
    "a line of the sums lost": lambda place: lose_a_line(place / "step_00000012" / "SHA256SUMS", "model.safe"),
    "the other's files": lambda place: shutil.copytree(
        place / "step_00000010", place / "step_00000012", dirs_exist_ok=True
    ),
    "another step's name": lambda place: (place / "step_00000012").rename(place / "step_00000013"),
}


def lose_a_line(sums: Path, name: str) -> None:
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if name not in line))


@pytest.mark.parametrize("spoil", MISLEADING.values(), ids=[name.replace(" ", "-") for name in MISLEADING])
def test_a_checkpoint_that_is_not_what_its_name_says_is_not_used(
    tmp_path: Path, config: TrainConfig, spoil: Any
) -> None:
    """Each file may be whole by itself."""
    run(config, tmp_path / "run")
    unbroken = weights(tmp_path / "run" / "model")
    spoil(tmp_path / "run" / "checkpoints")
    result, shown = run(config, tmp_path / "run", resume=True)
    assert result.finished
    assert "going on from step 10 " in " ".join(shown.split())
    assert weights(tmp_path / "run" / "model") == unbroken


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "griffin-train-0"}, "is not of format 'griffin-train-1'"),
        ({"threads": None}, "'threads' is missing or is not of type int"),
        ({"data": 5}, "'data' is missing or is not of type str"),
        ({"fixed": []}, "'fixed' is missing or is not of type str"),
        ({"config": "x"}, "'config' is missing or is not of type dict"),
        ({"progress": {}}, "'progress' does not have logged_nats"),
        ({"progress": {"step": "12"}}, "step of 'progress' is not a number from 0 up"),
        ({"progress": {"seconds": float("nan")}}, "seconds of 'progress' is not a number from 0 up"),
        ({"progress": {"tokens": -1}}, "tokens of 'progress' is not a number from 0 up"),
        ({"fixed": "0", "config": {}}, "is of another run"),
    ],
)
def test_a_state_that_is_vouched_for_and_wrong(
    tmp_path: Path, config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    """A sum has no secret."""
    run(replace(config, keep_checkpoints=1), tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_00000012" / STATE
    state = json.loads(file.read_text())
    if changes.get("progress"):
        changes = {"progress": state["progress"] | changes["progress"]}
    file.write_text(json.dumps(state | changes))
    write_sums(file.parent)
    with pytest.raises(GriffinError, match=message):
        run(config, tmp_path / "run", resume=True)


def test_what_lies_beside_the_model_is_found_before_training(tmp_path: Path, config: TrainConfig) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "thesis.tex").write_text("years of work")
    with pytest.raises(GriffinError, match="model exists and is not a model folder"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path, config: TrainConfig) -> None:
    run(replace(config, keep_checkpoints=1), tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoints" / "step_00000012" / "model.safetensors", "bit")
    with pytest.raises(GriffinError, match=r"no whole checkpoint: .*model\.safetensors is damaged or was changed"):
        run(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("optimizer.safetensors", "cut", r"optimizer\.safetensors cannot be read .*; remove .*step_00000012"),
        ("optimizer.safetensors", "rename", r"'exp_avg.a' is not one of this model|is not in it"),
        ("optimizer.safetensors", "reshape", r"is \(3,\) torch.float32, the model needs"),
        ("model.safetensors", "cut", r"model\.safetensors"),
    ],
)
def test_damage_in_a_checkpoint_that_nothing_vouches_for_is_refused(
    tmp_path: Path, config: TrainConfig, name: str, damage: str, message: str
) -> None:
    """As in runs of before there were sums."""
    run(config, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_00000012" / name
    (file.parent / "SHA256SUMS").unlink()
    spoil(file, damage)
    with pytest.raises(GriffinError, match=message):
        run(config, tmp_path / "run", resume=True)
    shutil.rmtree(file.parent)  # as the message says
    assert run(config, tmp_path / "run", resume=True)[0].finished


def test_a_run_that_diverges_ends(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MOST_SKIPPED", 4)
    take = loop.take_step

    def broken_from_step_3(model: Griffin, *arguments: Any) -> Any:
        if len(steps) >= 3:
            model.model.final_norm.weight.data.fill_(torch.nan)
        steps.append(1)
        return take(model, *arguments)

    steps: list[int] = []
    monkeypatch.setattr(loop, "take_step", broken_from_step_3)
    with pytest.raises(GriffinError, match=r"4 steps in a row .*up to step 7: .*lower learning_rate=0.002"):
        run(config, tmp_path / "run")
    last = numbers(tmp_path / "run")[-1]
    assert (last["step"], last["skipped"], last["grad_norm"]) == (6, 3, None)


def test_bf16_keeps_fp32_weights_and_learns(tmp_path: Path, config: TrainConfig) -> None:
    run(replace(config, dtype="bf16", learning_rate=1e-2), tmp_path / "run")
    assert {p.dtype for p in griffin.load(tmp_path / "run" / "model").parameters()} == {torch.float32}
    losses = [line["validation_loss"] for line in numbers(tmp_path / "run") if "validation_loss" in line]
    assert losses[-1] < losses[0] - 0.5


def test_going_on_from_a_model_takes_its_config_and_tokenizer(tmp_path: Path, config: TrainConfig) -> None:
    run(config, tmp_path / "first")
    start = tmp_path / "first" / "model"
    again = replace(config, model=None, tokenizer=None, init_from=str(start), learning_rate=1e-9, weight_decay=0.0)
    run(again, tmp_path / "second")
    a, b = griffin.load(start), griffin.load(tmp_path / "second" / "model")
    assert a.config == b.config
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    other = replace(again, model=replace(a.config, window=3), tokenizer="bytes")
    with pytest.raises(GriffinError, match="is of another config than model="):
        run(other, tmp_path / "third")
    assert not (tmp_path / "third").exists()
    shutil.rmtree(start)
    assert run(again, tmp_path / "second", resume=True)[0].finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_tokens": 4000}, r"text\.txt: \d+ tokens to train on are less than one row"),
        ({"device": "nonsense"}, "device='nonsense': there is no such device here; there are auto, cpu"),
        ({"tokenizer": "bpe:300"}, r"the tokenizer has 3\d\d|the tokenizer has 2\d\d ids, the model only"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, config: TrainConfig, changes: Any, message: str) -> None:
    with pytest.raises(GriffinError, match=message):
        run(replace(config, **changes), tmp_path / "made" / "run")
    # Data that was prepared is whole, and of use for the next try.
    assert not (tmp_path / "made").exists() or (tmp_path / "made" / "run" / "data" / "sources.json").exists()
    assert not (tmp_path / "made" / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "meta"}, "device='meta': there is no such device"),
        ({"threads": 1_000_000}, rf"threads=1000000: this machine has {os.cpu_count()} CPUs"),
        (
            {"batch_rows": 10**9},
            r"a step of batch_rows=1000000000 x row_tokens=16 tokens.* takes 1,408 GB",
        ),
        ({"grad_accumulation": 10**12}, r"grad_accumulation=1000000000000 takes .* GB, and cpu has"),
        ({"model": "vocab_size"}, r"training a model of 32,000,\d+,\d+ parameters takes 512 GB, and cpu has \d"),
        ({"train_data": "no.txt"}, "no such file or folder"),
        ({"validation_data": "no.txt"}, "no such file or folder"),
        ({"tokenizer": "nowhere"}, "nowhere"),
    ],
)
def test_what_the_machine_has_not_is_refused_and_leaves_nothing(
    tmp_path: Path, config: TrainConfig, changes: Any, message: str
) -> None:
    if "model" in changes:
        assert config.model is not None
        changes = {"model": replace(config.model, vocab_size=2 * 10**9)}
        config = replace(config, batch_rows=1)
    with pytest.raises(GriffinError, match=message):
        run(replace(config, **changes), tmp_path / "made" / "run")
    assert not (tmp_path / "made").exists()


def test_tensorboard(tmp_path: Path, config: TrainConfig) -> None:
    pytest.importorskip("tensorboard")
    run(replace(config, tensorboard=True), tmp_path / "run")
    assert [path.name[:6] for path in (tmp_path / "run" / "tensorboard").iterdir()] == ["events"]


def test_tensorboard_that_is_not_there_is_said_before_anything_is_made(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GriffinError, match="tensorboard=true needs a package"):
        run(replace(config, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_curve_or_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": step, "loss": 4 - step / 100} for step in range(100)]
    drawn = curve(lines, 80)
    assert "loss, nats per token" in drawn
    assert "\x1b" not in drawn
    assert max(map(len, drawn.splitlines())) <= 80
    assert curve([], 80) == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert curve(lines, 80) == 'for the loss curve here: pip install "griffin-lm[train]"'


@pytest.mark.parametrize("damage", [b"\xff", b"\x00", b"{", b"\r", b"[" * 200_000])
def test_a_damaged_line_of_metrics_costs_that_line(tmp_path: Path, config: TrainConfig, damage: bytes) -> None:
    """A flipped bit in the middle: what stands behind it is not lost for good on resuming."""
    run(config, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    before = read_metrics(file)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:5] + damage + lines[2][6:]
    file.write_bytes(b"".join(lines))
    _, shown = run(config, tmp_path / "run", resume=True)
    assert "metrics.jsonl: line 3 is damaged and left out" in shown.replace("\n", "")
    assert read_metrics(file) == [line for number, line in enumerate(before) if number != 2]


def test_metrics_cut_short_by_a_kill_are_read_up_to_there(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(file)] == [1, 2]
