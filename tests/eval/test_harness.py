"""lm-evaluation-harness: our adapter against the harness's own transformers model on the same folder and tasks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import griffin
from griffin import Griffin
from griffin.cli.main import run
from griffin.errors import GriffinError
from griffin.eval import harness
from griffin.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the harness, and of what it brings

TEXT = "the cat sat on the mat and the dog sat on the log while it rained. "
CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
"""


@pytest.fixture(scope="module", autouse=True)
def _needs_the_harness() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (griffin-lm[eval])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that transformers opens too, with a vocabulary of its own, and a window shorter than the texts."""
    tokenizer = Tokenizer.train([TEXT * 20], 300)
    from dataclasses import replace

    from griffin import PRESETS

    config = replace(PRESETS["griffin-tiny"], vocab_size=tokenizer.vocab_size, lru_width=32, window=8)
    model = Griffin(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("harness") / "model"
    griffin.save(model, path, tokenizer)
    # Of a saved window of W, transformers sees one key less than Google's code.
    shutil.copytree(path, path.with_name("theirs"))
    config_file = path.with_name("theirs") / "config.json"
    config_file.write_text(config_file.read_text().replace('"attention_window_size": 8', '"attention_window_size": 9'))
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Three tasks of our own: multiple choice, perplexity, generation."""
    place = tmp_path / "tasks"
    place.mkdir()
    data = tmp_path / "data.jsonl"
    rows = [
        {
            "q": f"the {a} sat on the",
            "choices": ["mat", "log and it rained", "cat"],
            "label": i % 3,
            "text": TEXT * (i + 1),
        }
        for i, a in enumerate(("cat", "dog", "cat and the dog", "mat"))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in {
        "ours_choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "ours_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n",
        "ours_generate": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: ' mat'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 12, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n",
    }.items():
        head = CHOICES.format(name=name, data=data, cache=tmp_path / "cache")
        (place / f"{name}.yaml").write_text(head + rest)
    return place


def _asked(model: Any, kind: str, arguments: list[tuple[Any, ...]]) -> Any:
    return getattr(model, kind)(_instances(arguments, kind), disable_tqdm=True)


def _instances(args: list[tuple[Any, ...]], kind: str) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=index) for index, each in enumerate(args)]


def _both(folder: Path, **options: Any) -> tuple[Any, Any]:
    from lm_eval.models.huggingface import HFLM

    ours = harness.model_class()(str(folder), device="cpu", batch_size=3, **options)
    theirs = HFLM(pretrained=str(folder.with_name("theirs")), device="cpu", dtype="float32", batch_size=1, **options)
    return ours, theirs


def test_log_likelihoods_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = _both(folder)
    pairs = [
        *((TEXT * times, end) for times in (1, 3) for end in (" the", " the cat sat on the mat", " rained")),
        ("the cat ", "sat"),
        ("", "dog and cat"),  # (of "the cat sat" beside "the cat", " sat" the harness mixes up the two: one key to it)
        ("<bos>the cat", " sat"),
    ]
    found, expected = (_asked(model, "loglikelihood", pairs) for model in (ours, theirs))
    for (value, greedy), (other, other_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, abs=1e-4)
        assert greedy == other_greedy


@pytest.mark.parametrize("max_length", [None, 16])
def test_rolling_log_likelihoods_are_those_of_transformers(folder: Path, max_length: int | None) -> None:
    ours, theirs = _both(folder, max_length=max_length)
    texts = [(TEXT,), (TEXT * 4,), ("the",)]
    found, expected = (_asked(model, "loglikelihood_rolling", texts) for model in (ours, theirs))
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-6)


def test_greedy_generation_is_that_of_transformers(folder: Path) -> None:
    ours, theirs = _both(folder)
    settings = {"until": [" the"], "max_gen_toks": 10, "do_sample": False}
    prompts = [(TEXT + end, settings) for end in ("the", "the cat sat", "a")] + [
        (TEXT, {**settings, "max_gen_toks": 3})
    ]
    found, expected = (_asked(model, "generate_until", prompts) for model in (ours, theirs))
    assert found == expected


def test_tasks_of_our_own_give_the_same_numbers(folder: Path, tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ["ours_choice", "ours_text", "ours_generate"]
    model, tokenizer = griffin.load(folder), griffin.load_tokenizer(folder)
    found = harness.run_tasks(model, tokenizer, names, include=tasks)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder.with_name("theirs")), "dtype": "float32"},
        tasks=names,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    for name in names:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    assert "ours_choice" in harness.table(found)


def test_the_commands(folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--harness", "ours_choice", "--include", str(tasks), "--device", "cpu", "--limit", "2"]
    assert run(["eval", str(folder), *arguments, "--json", str(tmp_path / "out.json")]) == 0
    assert "acc_norm" in capsys.readouterr().out
    ours = json.loads((tmp_path / "out.json").read_text())["harness"]["ours_choice"]["acc,none"]
    command = [sys.executable, "-m", "griffin.eval.harness", "run", "--model", "griffin", "--tasks", "ours_choice"]
    options = ["--include_path", str(tasks), "--limit", "2", "--output_path", str(tmp_path / "theirs")]
    done = subprocess.run(
        [*command, "--model_args", f"pretrained={folder}", "--device", "cpu", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = (tmp_path / "theirs").rglob("results*.json")
    assert json.loads(file.read_text())["results"]["ours_choice"]["acc,none"] == ours
    assert run(["eval", str(folder), "--harness", "no_such_task"]) == 2
    assert "no task 'no_such_task'" in capsys.readouterr().err


def test_chat_templates(folder: Path) -> None:
    tokenizer = griffin.load_tokenizer(folder)
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} [model]{% endif %}"
    )
    chatty = Tokenizer(tokenizer.backend, bos="<bos>", eos="<eos>", chat_template=template)
    ours = harness.model_class()(griffin.load(folder), chatty)
    messages = [{"role": "user", "content": "the cat"}]
    text = ours.apply_chat_template(messages)
    assert text == "<bos>[user] the cat [model]"
    assert ours.tok_encode(text) == chatty.encode_chat(messages)
    assert ours.chat_template(True) == template
    assert ours.chat_template(False) is None


def test_what_is_not_known_is_refused(folder: Path, make_model: Callable[..., Griffin]) -> None:
    ours = harness.model_class()(griffin.load(folder), griffin.load_tokenizer(folder))
    request = _instances([("the", {"until": ["."], "max_gen_toks": 2, "penalty": 3})], "generate_until")
    with pytest.raises(GriffinError, match="generation option penalty"):
        ours.generate_until(request)
    with pytest.raises(GriffinError, match="give its tokenizer"):
        harness.model_class()(make_model())
