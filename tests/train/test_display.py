"""What is only shown cannot stop a run: its reader may leave, its terminal have no such character, its sampler fail."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import griffin
from griffin import PRESETS
from griffin.cli.main import run as command
from griffin.errors import GriffinError
from griffin.train import loop
from griffin.train.config import TrainConfig
from griffin.train.display import going_on
from griffin.train.loop import train
from griffin.train.metrics import Metrics, read_metrics

ROOT = Path(griffin.__file__).parents[1]


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
        steps=3,
        validation_rows=2,
        log_every=1,
        threads=1,
    )


class Failing(io.StringIO):
    """A file that takes `after` writes."""

    def __init__(self, error: Exception, after: int, terminal: bool) -> None:
        super().__init__()
        self.error, self.left, self.terminal = error, after, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.left < 0:
            raise self.error


def sampler(*_: object) -> str:
    return "text \ufffd and \x1b]0;title\x07"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EBADF, "Bad file descriptor"),
        ValueError("I/O operation on closed file"),
        RuntimeError("reentrant call inside <_io.BufferedWriter>"),
    ],
)
def test_a_run_outlives_its_reader(
    tmp_path: Path, config: TrainConfig, error: Exception, after: int, terminal: bool
) -> None:
    file = Failing(error, after, terminal)
    console = Console(file=file, force_terminal=terminal)
    assert train(config, tmp_path / "run", sampler=sampler, console=console).finished
    assert console.file is file
    assert file.left < 0
    assert griffin.load(tmp_path / "run" / "model").config == config.model


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_a_run_shows_what_its_terminal_has_not(tmp_path: Path, config: TrainConfig, encoding: str) -> None:
    data = io.BytesIO()
    console = Console(file=io.TextIOWrapper(data, encoding=encoding), width=80)
    assert train(config, tmp_path / "run", sampler=sampler, console=console).finished
    console.file.flush()
    assert b"the loss curve needs a UTF-8 terminal" in data.getvalue()
    assert b"text \\ufffd and \\x1b]0;title\\x07" in data.getvalue()  # nor does a sample drive the terminal


class PanicException(BaseException):
    __module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PanicException("backtrack limit"), "no sample after 1 steps: PanicException: backtrack limit"),
        (GriffinError("row 0: the largest logit is nan"), "no sample after 1 steps: row 0: the largest logit is nan"),
        (KeyError("oops"), "no sample after 1 steps: KeyError: 'oops'"),
        (MemoryError(), "no sample after 1 steps: MemoryError: MemoryError"),
        (OSError(28, "No space left on device"), "no sample after 1 steps: OSError: "),
    ],
)
def test_a_sampler_that_fails_costs_its_sample(
    tmp_path: Path, config: TrainConfig, error: BaseException, said: str
) -> None:
    def fail(*_: object) -> str:
        raise error

    console = Console(file=io.StringIO(), width=200)
    assert train(replace(config, sample_every=1), tmp_path / "run", sampler=fail, console=console).finished
    assert isinstance(console.file, io.StringIO)
    assert said in console.file.getvalue()
    assert console.file.getvalue().count("no sample ") == 4  # before, after 1 and 2, after


def test_a_diverged_run_says_so_itself(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from griffin.cli.train import sample

    monkeypatch.setattr(loop, "MOST_SKIPPED", 4)
    config = replace(config, steps=30, learning_rate=1e30, sample_every=1)
    with pytest.raises(GriffinError, match=r"the run has diverged; lower learning_rate=1e\+30"):
        train(config, tmp_path / "run", sampler=sample, console=Console(file=io.StringIO()))
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] >= 3


def test_ctrl_c_and_errors_of_the_run_itself_do_end_it(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "a", sampler=interrupt, console=Console(file=io.StringIO()))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop, "save_snapshot", full)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path / "b", console=Console(file=io.StringIO()))
    with pytest.raises(KeyError), going_on(Console(file=io.StringIO())):
        raise KeyError("a mistake")


def test_a_curve_or_board_that_fails_is_said(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    import torch.utils.tensorboard as board

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(loop, "curve", fail)
    monkeypatch.setattr(board.SummaryWriter, "add_scalar", fail)
    console = Console(file=io.StringIO(), width=200)
    assert train(replace(config, tensorboard=True), tmp_path / "run", console=console).finished
    assert isinstance(console.file, io.StringIO)
    assert "no loss curve: RuntimeError: no such thing" in console.file.getvalue()
    assert console.file.getvalue().count("TensorBoard is given up: no such thing") == 1
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 5


class Disk:
    """A raw file on a disk that has `room` bytes left."""

    def __init__(self, room: int) -> None:
        self.room, self.data = room, b""

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = data[: self.room]
        self.room -= len(taken)
        self.data += taken
        return len(taken)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_lines_that_find_no_room_are_written_later(tmp_path: Path, room: int) -> None:
    said: list[str] = []
    metrics = Metrics(tmp_path, -1, False, said.append)
    metrics._file.close()
    metrics._file = disk = Disk(room)  # type: ignore[assignment]
    lines = [{"step": step, "loss": 2.5} for step in range(6)]
    for line in lines[:4]:
        metrics.write(line)
    assert len(said) == 1
    assert "cannot be written now, and will be later: [Errno 28] No space left on device" in said[0]
    disk.room = 10**6
    for line in lines[4:]:
        metrics.write(line)
    metrics.close()
    assert [json.loads(line) for line in disk.data.splitlines()] == lines
    assert len(said) == 1


def test_lines_that_never_find_room_are_counted(tmp_path: Path) -> None:
    said: list[str] = []
    metrics = Metrics(tmp_path, -1, False, said.append)
    metrics._file.close()
    metrics._file = Disk(0)  # type: ignore[assignment]
    for step in range(3):
        metrics.write({"step": step})
    metrics.close()
    assert said[1:] == ["metrics.jsonl lacks its last 3 lines"]


def settings(config: TrainConfig) -> list[str]:
    values = ["steps=3", "tokenizer=bytes", "model.vocab_size=259", "threads=1", "row_tokens=16", "batch_rows=2"]
    values += [f"model.{name}=16" for name in ("width", "mlp_width", "lru_width")]
    values += ["model.num_heads=2", "model.num_gate_blocks=2", "validation_rows=2"]
    return [config.train_data, *(argument for value in values for argument in ("--set", value))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_training_has_the_status_of_its_signal(
    tmp_path: Path,
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    def stop(*_: object) -> str:
        if not raised:
            raised.append(1)
            signal.raise_signal(number)
        return ""

    raised: list[int] = []
    monkeypatch.setattr("griffin.cli.train.sample", stop)
    arguments = ["train", *settings(config), "--run", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["griffin", *arguments])
    assert command(arguments) == 128 + number
    out, err = capsys.readouterr()
    assert "stopped at step 0 of 3; go on with\n  griffin train " in out
    assert out.endswith(" --resume\n")
    assert err == ""
    assert command([*arguments, "--resume"]) == 0


@pytest.mark.parametrize("where", ["| true; exit ${PIPESTATUS[0]}", ">&-", "> /dev/full"])
def test_a_training_outlives_its_stdout(tmp_path: Path, config: TrainConfig, where: str) -> None:
    """As a process: its buffers and its exit are part of it."""
    code = "from griffin.cli.main import main; main()"
    arguments = [sys.executable, "-c", code, "train", *settings(config), "--run", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {where}', "bash", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_vocabulary_without_bos_is_sampled_from_all_the_same(tmp_path: Path, config: TrainConfig) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from griffin.cli.train import sample

    for special in (["<|endoftext|>"], []):
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=259, special_tokens=special, initial_alphabet=alphabet)
        backend.train_from_iterator(["hello world"], trainer)
        backend.save(str(tmp_path / "tokenizer.json"))
        console = Console(file=io.StringIO(), width=200)
        config = replace(config, tokenizer=str(tmp_path / "tokenizer.json"))
        assert train(config, tmp_path / f"run{len(special)}", sampler=sample, console=console).finished
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        if special:
            assert "--- a sample after training ---" in shown
        else:
            assert "no sample before training: sample_prompt='' has no tokens" in shown
