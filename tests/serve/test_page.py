"""The chat page in a real browser: what a person does, and what a model's text may not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import griffin
from griffin.serve.settings import Settings, digests
from tests.serve.browser import chromium
from tests.serve.conftest import Served, running

pytestmark = pytest.mark.slow
SETTINGS = {"max_tokens": 24, "temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as each:
        yield each


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the page of a server in a browser that knows nothing yet; at the end, nothing went wrong in it."""
    contexts, faults, asked = [], [], []

    def open_page(served: Served, *, width: int = 1280, height: int = 800, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        values = json.dumps({**SETTINGS, **settings})
        context.add_init_script(
            f"if (!localStorage['griffin.settings.1']) localStorage['griffin.settings.1'] = {values!r}"
        )
        page = context.new_page()
        page.route("**/v1/*completions", _unending)
        page.route("**/v1/chat/completions", _unending)
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.url)
        page.wait_for_selector("#starters button, #key-dialog[open]", state="attached")
        assert all(url.startswith((served.url, "data:", "blob:")) for url in asked), asked
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults, faults


def _unending(route: Any) -> None:
    """A model of random weights may end at once: let it not."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    done(page)


def done(page: Any) -> None:
    page.wait_for_selector("#send:not([hidden])")


def texts(page: Any, role: str) -> list[str]:
    return [each.strip() for each in page.locator(f".message.{role} .text").all_inner_texts()]


def test_a_conversation_is_streamed_kept_and_found_again(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served)
    assert page.inner_text("#memory").startswith("memory ")
    say(page, "To be, or not")
    assert texts(page, "user") == ["To be, or not"]
    (first,) = texts(page, "assistant")
    assert first
    stats = page.inner_text(".message.assistant .stats")
    assert "tokens/s" in stats
    assert "24 tokens" in stats
    say(page, "the mind")
    before = texts(page, "user"), texts(page, "assistant")
    assert len(before[0]) == len(before[1]) == 2
    page.reload()
    page.wait_for_selector(".message")
    assert (texts(page, "user"), texts(page, "assistant")) == before
    assert page.locator("#conversations li").count() == 1
    page.click("#new-chat")
    assert page.locator(".message").count() == 0
    page.click("#conversations .open")
    assert (texts(page, "user"), texts(page, "assistant")) == before
    # What the page asks is what the conversation was: the model saw the first answer.
    page.fill("#search", "not in there")
    assert page.locator("#conversations li").count() == 0
    page.fill("#search", "MIND")
    assert page.locator("#conversations li").count() == 1


def test_stop_keeps_what_there_is_and_frees_the_slot(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served, max_tokens=100_000, stop="never said")
    cancelled = served.engine.stats().cancelled
    for way in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        page.fill("#prompt", "To be")
        page.press("#prompt", "Enter")
        served.until(lambda: len(texts(page, "assistant")) == 1 and len(texts(page, "assistant")[0]) > 20)
        way()
        done(page)
        cancelled += 1
        served.until(lambda cancelled=cancelled: served.engine.stats().cancelled == cancelled)
        assert "stopped" in page.locator(".stats").last.inner_text()
        assert len(texts(page, "assistant")[-1]) > 20
        page.click("#new-chat")


def test_versions_edits_forks_and_the_map(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served, seed="")
    say(page, "To be")
    (first,) = texts(page, "assistant")
    page.click(".message.assistant [aria-label^='Another answer']")
    done(page)
    (second,) = texts(page, "assistant")
    assert page.inner_text(".versions span") == "2/2"
    say(page, "the mind")
    assert page.locator(".message").count() == 4
    page.locator(".message.assistant .back").first.click()
    assert texts(page, "assistant") == [first]
    assert page.locator(".message").count() == 2
    page.locator(".message.assistant .on").first.click()
    assert texts(page, "assistant")[0] == second
    assert page.locator(".message").count() == 4

    # An edit is a version of the message, with an answer of its own.
    page.locator(".message.user").last.hover()
    page.locator(".message.user [aria-label^='Edit']").last.click()
    page.fill(".editor textarea", "the sea")
    page.press(".editor textarea", "Enter")
    done(page)
    assert texts(page, "user") == ["To be", "the sea"]

    # A fork from the first answer: what is said next stands beside what came next.
    page.locator(".message.assistant").first.hover()
    page.locator("[aria-label^='Go on from here']").first.click()
    assert page.locator(".message").count() == 2
    assert "beside" in page.inner_text("#branching-text")
    say(page, "to sleep")
    assert texts(page, "user") == ["To be", "to sleep"]
    assert page.locator(".message.user .versions span").last.inner_text() == "3/3"

    page.click("#map-open")
    shown = page.locator("#map .node").all_inner_texts()
    assert len(shown) == 9  # 1 + 2 answers + 3 x (message, answer)
    page.locator("#map .node", has_text="the mind").click()
    assert texts(page, "user") == ["To be", "the mind"]
    page.reload()
    page.wait_for_selector(".message")
    assert texts(page, "user") == ["To be", "the mind"]


def test_by_keyboard(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served, seed="")
    page.keyboard.press("/")
    page.keyboard.type("To be")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("or not")
    page.keyboard.press("Enter")
    done(page)
    assert texts(page, "user") == ["To be\nor not"]
    page.keyboard.press("Alt+r")
    page.wait_for_selector(".versions")
    done(page)
    page.keyboard.press("Alt+ArrowLeft")
    assert page.inner_text(".versions span") == "1/2"
    page.focus("#prompt")
    page.keyboard.press("ArrowUp")
    assert page.input_value(".editor textarea") == "To be\nor not"
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+b")
    assert page.is_visible("#map")
    page.keyboard.press("Alt+,")
    assert page.is_visible("#settings")
    assert not page.is_visible("#map")
    page.keyboard.press("Alt+n")
    assert page.locator(".message").count() == 0


def test_settings_reach_the_server(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served)
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.click("#settings-open")
    page.fill("#settings [name=system]", "be brief")
    page.fill("#settings [name=max_tokens]", "5")
    page.fill("#settings [name=top_k]", "7")
    page.fill("#settings [name=stop]", "zzz\nyyy")
    say(page, "To be")
    (body,) = sent
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "To be"}]
    assert (body["max_tokens"], body["top_k"], body["stop"], body["seed"]) == (5, 7, ["zzz", "yyy"], 3)
    assert "repetition_penalty" not in body
    page.reload()
    page.click("#settings-open")
    assert page.input_value("#settings [name=max_tokens]") == "5"


def test_delete_and_undo(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served)
    say(page, "To be")
    page.hover("#conversations li")
    page.click("#conversations [aria-label^='Delete']")
    assert page.locator("#conversations li").count() == 0
    page.click("#notice button")
    assert page.locator("#conversations li").count() == 1
    assert texts(page, "user") == ["To be"]


def test_on_a_phone(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served, width=390, height=844)
    assert not page.is_visible("#sidebar")
    say(page, "To be " + "x" * 300)
    for each in ("#open-sidebar", "#map-open", "#settings-open"):
        page.click(each)
        page.wait_for_timeout(250)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), each
        if each == "#open-sidebar":
            page.click("#close-sidebar")
        else:
            page.click(each.replace("-open", "-close"))
    assert page.evaluate("document.querySelector('#scroll').scrollWidth <= innerWidth")


def test_the_page_asks_for_the_key(folder: Path, visit: Callable[..., Any]) -> None:
    settings = Settings(model=str(folder), slots=2, keys=digests(["the-right-key"], "test"))
    with running(settings, key="the-right-key") as locked:
        page = visit(locked)
        page.fill("#key", "wrong-key")
        page.click("#key-dialog .filled")
        page.wait_for_selector("#key-error:not([hidden])")
        page.fill("#key", "the-right-key")
        page.click("#key-dialog .filled")
        page.wait_for_selector("#starters button", state="attached")
        say(page, "To be")
        assert texts(page, "assistant")[0]
        assert "the-right-key" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_model_without_a_template_goes_on_with_the_text(
    folder: Path, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    plain = tmp_path / "plain"
    tokenizer = griffin.load_tokenizer(folder)
    tokenizer._chat = None
    griffin.save(griffin.load(folder), plain, tokenizer)
    with running(Settings(model=str(plain), slots=2)) as served:
        page = visit(served, temperature=0, seed="")
        say(page, "To be, or not")
        say(page, " the mind")
        first, second = page.locator(".message.assistant .text").all_text_contents()
        body = {"prompt": "To be, or not", "max_tokens": 24, "temperature": 0, "top_p": 0.95, "ignore_eos": True}
        assert served.call("/v1/completions", body)[1]["choices"][0]["text"] == first
        page.press("#prompt", "Enter")  # an empty box lets it go on
        done(page)
        assert page.locator(".message.assistant").count() == 3
        body["prompt"] = f"To be, or not{first} the mind"
        assert served.call("/v1/completions", body)[1]["choices"][0]["text"] == second


def test_a_server_that_is_full_or_gone_is_said_and_can_be_asked_again(
    served: Served, visit: Callable[..., Any]
) -> None:
    page = visit(served)
    error = {"message": "64 requests wait already", "type": "rate_limit_error", "param": None, "code": None}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, headers={"retry-after": "7"}, json={"error": error}),
    )
    say(page, "To be")
    assert "64 requests wait already. Try again in 7 s." in page.inner_text(".message .error")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click(".error button")
    page.wait_for_selector("text=cannot be reached")
    page.unroute("**/v1/chat/completions")
    done(page)
    page.click(".error button")
    page.wait_for_selector(".stats")
    assert page.locator(".message .error").count() == 0
    assert page.locator(".message").count() == 2


MARKDOWN = {
    "# A *b*": "<h3>A <em>b</em></h3>",
    "a **b** `c*d*` ~~e~~": "<p>a <strong>b</strong> <code>c*d*</code> <s>e</s></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "- a\n- b\n  - c\n\n1. d\n2. e": "<ul><li>a</li><li><p>b</p><ul><li>c</li></ul></li></ul>"
    "<ol><li>d</li><li>e</li></ol>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a\nb\n\n---\nc": "<p>a<br>b</p><hr><p>c</p>",
    "| a | b |\n|---|--:|\n| 1 | 2 |": '<div class="table"><table>'
    '<thead><tr><th>a</th><th class="right">b</th></tr></thead>'
    '<tbody><tr><td>1</td><td class="right">2</td></tr></tbody></table></div>',
    "\\*a\\* <b>c</b> &amp;": "<p>*a* &lt;b&gt;c&lt;/b&gt; &amp;amp;</p>",
}
HOSTILE = [
    "<img src=x onerror='window.ran=1'><script>window.ran=1</script><svg onload=window.ran=1>",
    "[x](javascript:window.ran=1) [y](JaVaScRiPt:window.ran=1) [z](data:text/html,<script>1</script>) [w](vbscript:1)",
    "![x](http://192.0.2.1/x.png) ![y](javascript:window.ran=1)",
    "```html\n<script>window.ran=1</script>\n```",
    "<iframe src='http://192.0.2.1'></iframe> <style>*{display:none}</style> <a href=javascript:1>",
    '[a](http://x.example" onclick="window.ran=1)',
    "# <script>window.ran=1</script>\n- <img src=x onerror=window.ran=1>\n> <object data=x>",
    "*" * 3000 + "_" * 3000 + "`" * 3001 + "[" * 3000 + ">" * 3000,
    "\n".join("> " * depth + "- a" for depth in range(200)),
    "a" * 200_000 + "**" * 10_000,
]


def test_markdown_is_read_and_nothing_of_it_runs(served: Served, visit: Callable[..., Any]) -> None:
    page = visit(served)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    read = """async (text) => {
        const {render} = await import('/page/markdown.js');
        const box = document.createElement('div');
        const began = performance.now();
        box.append(render(text));
        document.body.append(box);
        const found = {html: box.innerHTML, text: box.textContent, ms: performance.now() - began,
            names: [...new Set([...box.querySelectorAll('*')].map((each) => each.localName))],
            links: [...box.querySelectorAll('a')].map((each) => [each.protocol, each.rel]),
            handlers: [...box.querySelectorAll('*')].flatMap((each) => each.getAttributeNames())
                .filter((name) => name.startsWith('on'))};
        box.remove();
        return found;
    }"""
    for text, html in MARKDOWN.items():
        assert page.evaluate(read, text)["html"] == html, text
    for text in HOSTILE:
        found = page.evaluate(read, text)
        assert not {"img", "script", "svg", "iframe", "object", "style", "form"} & set(found["names"]), text
        assert all(protocol in ("http:", "https:", "mailto:") for protocol, _ in found["links"])
        assert all("noopener" in rel for _, rel in found["links"])
        assert not found["handlers"]
        assert found["ms"] < 3000, (text[:50], found["ms"])
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    assert not [url for url in asked if not url.startswith(served.url)]
    # Were a script to get in all the same, the browser refuses it.
    policy = served.call("/")[2]["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
