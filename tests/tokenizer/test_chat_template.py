from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from griffin.errors import GriffinError
from griffin.tokenizer import template_process, template_source
from griffin.tokenizer.chat_template import GEMMA, ChatTemplate, Rendered
from griffin.tokenizer.template_process import TemplateProcess

# As in the folders of recurrentgemma-2b-it, Qwen1.5-Chat and zephyr-7b-beta.
HF_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LOCAL = {
    "gemma": GEMMA,
    "gemma of the Hub": HF_GEMMA,
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "places": (
        "{{ messages[0].content | length }}{%- for m in messages -%}{#- messages -#}["
        "{{ loop.index % 2 == 1 and 'odd' }}"
        "{% if loop.index0 == 0 %}first{% endif %}{{ 'messages loop namespace()' }}"
        "{% generation %}{{ m.content.strip() }}"
        "{% endgeneration %}{% for part in m.content.split(' ') %}{{ loop.last }}{% endfor %}]{% endfor %}"
        "{% if add_generation_prompt %}[{% endif %}"
    ),
}
BOS = {"bos_token": "<bos>", "eos_token": "<eos>"}
HI = [{"role": "user", "content": "hi"}]


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(contents)]


def reference(template: str, messages: Sequence[Mapping[str, str]], prompt: bool = True) -> str:
    """What transformers renders."""
    return render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **BOS)[0][0]


@pytest.fixture(scope="module")
def process() -> TemplateProcess:
    return TemplateProcess()


# What a template means


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{%- for m in messages -%}{%- generation -%} {{ m.content }} {%- endgeneration -%}{%- endfor -%}",
        "{% for m in messages %}\n {% generation %}\n {{ m.role }}{{ loop.last }}\n {%+ endgeneration %}\n{% endfor %}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{# {% generation %} #}{{ '{% generation %}' }}{{ \"it's {% endgeneration %}\" }}",
        "{% set generation = 3 %}{{ generation }}{{ {'generation': [1]}['generation'][0] }}",
        "{% raw %}{% generation %}{{ x }}{% endraw %}{{ {'a': {'b': 1}} | tojson }}",
        "{{ strftime_now('%Y') }}",
        "{{ messages[0] | tojson(indent=2) }}",
        "{{ messages | tojson(ensure_ascii=True) }}{{ {'b': 'é', 'a': [1, none, true]} | tojson(sort_keys=true) }}",
        "{{ messages | tojson(separators=(',', ':')) }}{{ messages[0] | tojson(true, 4) }}{{ '<&>' | tojson }}",
        *LOCAL.values(),
    ],
)
def test_templates_render_as_in_transformers(template: str) -> None:
    for messages in (HI, turns(" é\n", "b <c>", "d")):
        for prompt in (True, False):
            assert ChatTemplate(template, BOS).whole(messages, prompt).text == reference(template, messages, prompt)


def test_one_chat_has_one_time() -> None:
    template = "{{ strftime_now('%f') }}{% for m in messages %}{{ m.content }}|{% endfor %}"
    assert ChatTemplate(template, {}).turn(turns("a", "b", "c"), True).text == "|c|"  # three renderings agree


# Templates that do harm

ENDLESS = (
    "{% set ns = namespace(s=[1]) %}{% for a in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s|length }}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% set n = namespace() %}{% set n.a = n %}{{ n }}", "crashed"),
        ("{% set n = namespace() %}{% set n.a = n %}{{ n | tojson }}", "crashed"),
        *((f"{{{{ {many * 100_000}1 }}}}", "crashed") for many in ("not ", "-", "1 ~ ")),
        *((f"{{{{ x{many * 100_000} }}}}", "crashed") for many in ("|string", ".b")),
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "failed: syntax error"),
        ("{{ 'x' | trim(3) }}", "the chat template failed: TypeError"),
        ("{{ raise_exception() }}", "the chat template failed: TypeError"),
        ("{{ raise_exception('x' * 5000) }}", "refuses the messages: x+$"),
        ("{{ 'x' * 20000000 }}", "it writes 20000015 bytes about"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "ran out of fuel"),
        pytest.param(
            ENDLESS,
            "took longer than 5 s",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_template_cannot_take_the_process_along(process: TemplateProcess, template: str, message: str) -> None:
    with pytest.raises(GriffinError, match=message) as caught:
        process.render(template, [{"x": 1}])
    assert len(str(caught.value)) < 600
    assert process.render("{{ x }}", [{"x": "well"}, {"x": "again"}]) == ["well", "again"]


def test_an_interrupted_rendering_ends_and_leaves_nothing(process: TemplateProcess) -> None:
    process.render("", [{}])
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        process.render(ENDLESS, [{}])
    assert time.monotonic() - began < 4
    assert process.render("{{ x }}", [{"x": "next"}]) == ["next"]


def test_the_wall_clock_counts_too(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "WALL_SECONDS", 0.3)
    with pytest.raises(GriffinError, match=r"took longer than 0\.3 s"):
        process.render(ENDLESS, [{}])
    assert process.render("{{ x }}", [{"x": "next"}]) == ["next"]


def test_threads_take_turns(process: TemplateProcess) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(30):
            text = f"{number} {turn} " * 50
            if process.render("{{ x }}!", [{"x": text}]) != [text + "!"]:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_and_forks_have_processes_of_their_own(process: TemplateProcess) -> None:
    process.render("", [{}])
    child = process._child
    assert child is not None
    for other in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert other.render("{{ x }}", [{"x": 2}]) == ["2"]
        assert other._child.pid != child.pid
    script = (
        "import os\nfrom griffin.tokenizer.template_process import TemplateProcess\n"
        "p = TemplateProcess()\np.render('', [{}])\n"
        "p._lock.acquire()\n"  # as another thread may hold it at the time of the fork
        "if os.fork() == 0:\n    print(p.render('{{ x }}', [{'x': 1}]), flush=True)\n    raise SystemExit\n"
        "os.wait()\np._lock.release()\nprint(p.render('{{ x }}', [{'x': 2}]))\n"
    )
    # Newer Pythons warn of forks beside threads.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("['1']\n['2']\n", "")


def test_the_process_ends_with_its_object() -> None:
    own = TemplateProcess()
    own.render("", [{}])
    assert own._child is not None
    child = own._child
    del own
    assert child.returncode is not None
    script = (
        "import os, signal\nfrom griffin.tokenizer.template_process import TemplateProcess\np = TemplateProcess()\n"
        "p.render('', [{}])\nprint(p._child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {done.stdout} outlives the one that started it")


def test_the_process_imports_nothing_of_ours() -> None:
    script = (
        "import sys\nfrom griffin.tokenizer import template_child, template_process\n"
        "assert not {'torch', 'minijinja'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert "griffin" not in Path(template_process.template_child.__file__).read_text().partition('"""\n')[2]


# Turns

# `.strip()` in a template does not take these four for blanks, as Python does; `| trim` does.
TEXT = st.characters(codec="utf-8", exclude_characters="\x1c\x1d\x1e\x1f")


@pytest.mark.parametrize("name", LOCAL)
@settings(deadline=None, max_examples=30)
@given(contents=st.lists(st.text(TEXT, max_size=8), min_size=1, max_size=13))
def test_a_turn_of_a_local_template_is_the_end_of_the_whole(name: str, contents: list[str]) -> None:
    messages = turns(*contents, *(["last"] if len(contents) % 2 == 0 else []))
    template, full = ChatTemplate(LOCAL[name], BOS), ChatTemplate(LOCAL[name], BOS)
    assert template._is_local
    full._is_local = False
    template._process = full._process = SHARED
    wanted = outcome(full, messages)
    assert outcome(template, messages) == wanted
    assert isinstance(wanted, str) or reference(LOCAL[name], messages).endswith(wanted.text)


def outcome(template: ChatTemplate, messages: list[dict[str, str]]) -> Rendered | str:
    try:
        return template.turn(messages, True)
    except GriffinError as error:
        return str(error)


SHARED = TemplateProcess()  # starts its process when first used


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{% endfor %}",
        "{% for m in messages %}{{ loop.index0 }}{% endfor %}",
        "{% for m in messages %}{{ loop.length }}{{ loop.revindex }}{% endfor %}",
        "{% for m in messages %}{{ loop.previtem.content }}{% endfor %}",
        "{% for m in messages %}{{ 2 ** loop.index0 % 2 }}{% endfor %}",
        "{% for m in messages %}{{ loop.index0 % 2 ** 3 }}{{ loop.index0 % 2.5 }}{% endfor %}",
        "{% for m in messages %}{{ loop.index0 == 0 + m.content | length }}{% endfor %}",
        "{% for m in messages %}{{ loop.index0 == 02 }}{{ loop.cycle('a', 'b', 'c') }}{% endfor %}",
        "{% for m in messages %}{{ messages | length }}{% endfor %}",
        "{% for m in messages %}{{ messages[-1].content }}{% endfor %}",
        "{% for m in messages %}{{ messages[0:].content }}{% endfor %}",
        "{% for m in messages if m.content %}{{ loop.first }}{% endfor %}",
        "{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{% for m in messages recursive %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for a in [1, 2] %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% if m.content == 'x' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{% endfor %}",
        "{% for m in messages %}{{ messages[0].update({'content': m.content}) }}{% endfor %}",
        "{% for m in messages %}{{ messages[0]['update'](m) }}{% endfor %}",
        "{% set messages = messages %}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% set all = messages %}{% for m in messages %}{{ all | length }}{% endfor %}",
        "{% filter upper %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfilter %}",
        "{% set x %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ x | length }}",
        "{% macro f() %}{% endmacro %}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ debug() }}{{ not debug() }}{{ self }}{% endfor %}",
        "{% for loop in messages %}{{ loop.first }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}",
        "{% for m in messages %}{{ 'open }}{% endfor %}",
        "{% for m in messages %}{# open {% endfor %}",
        "{% raw %}{% for m in messages %}{% endfor %}",
        "",
    ],
)
def test_what_looks_back_is_not_called_local(template: str) -> None:
    assert not template_source.is_local(template)


@pytest.mark.parametrize("name", ["gemma", "gemma of the Hub", "chatml"])
def test_a_turn_costs_the_same_however_long_the_past(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(LOCAL[name], BOS)
    template._process = SHARED
    sizes: list[int] = []
    render = TemplateProcess.render

    def counting(self: TemplateProcess, source: str, *messages: Any) -> list[str]:
        sizes.append(len(json.dumps(messages)))
        return render(self, source, *messages)

    monkeypatch.setattr(TemplateProcess, "render", counting)
    texts = {template.turn(turns(*["a question", "an answer"] * length, "?"), True).text for length in (3, 10, 1000)}
    assert len(texts) == 1
    assert len(set(sizes)) == 1
    assert len(sizes) == 3


def test_a_message_that_is_none_is_named() -> None:
    template = ChatTemplate(GEMMA, BOS)
    with pytest.raises(GriffinError, match="message 1 is a str, not a role and a content"):
        template.whole([HI[0], "x"], True)  # type: ignore[list-item]
    with pytest.raises(GriffinError, match=r"message 0: content has a lone surrogate '\\ud800' at character 1"):
        template.whole([{"role": "user", "content": "a\ud800"}], True)
    long = [*turns(*"abcdefgh"), {"role": "user"}]
    with pytest.raises(GriffinError, match="message 8: content is NoneType"):
        template.turn(long, True)


def test_a_template_longer_than_any_is_refused() -> None:
    with pytest.raises(GriffinError, match=r"the chat template has 1,000,001 characters, more than 1,000,000"):
        ChatTemplate("x" * 1_000_001, BOS)
    for source in ("{{ '" * 250_000, "{#" * 500_000, "{% raw %}" * 110_000, "{{ not " + "not " * 240_000 + "1 }}"):
        began = time.process_time()
        template = ChatTemplate(source, BOS)
        assert not template._is_local
        assert template._plain == source
        assert time.process_time() - began < 10  # one pass; a second for each of its parts would take hours
