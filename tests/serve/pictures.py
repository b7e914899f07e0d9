"""Take the chat page's pictures: python -m tests.serve.pictures URL docs (of a `griffin serve` of the demo's model)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.serve.browser import chromium

MOST_BYTES = 150_000
SETTINGS = '{"max_tokens": 90, "temperature": 0.7, "seed": ""}'


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#stop:not([hidden])")
    page.wait_for_selector("#send:not([hidden])", timeout=60_000)


def main(url: str, folder: Path) -> None:
    with chromium() as browser:
        for name, width, height, scheme in (("wide", 1280, 800, "light"), ("phone", 390, 844, "dark")):
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=1
            )
            context.add_init_script(f"localStorage['griffin.settings.1'] = {SETTINGS!r}")
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#starters button", state="attached")
            say(page, "JULIET.\nGood night.")
            page.click("#new-chat" if name == "wide" else "#open-sidebar")
            if name == "phone":
                page.click("#new-chat")
            say(page, "ROMEO.\n")
            page.click("[aria-label^='Another answer']")
            page.wait_for_selector("#send:not([hidden])", timeout=60_000)
            say(page, "\n\nJULIET.\n")
            if name == "wide":
                page.click("#map-open")
            page.mouse.move(5, 400)
            page.wait_for_timeout(400)
            file = folder / f"page-{name}.png"
            page.screenshot(path=file)
            if file.stat().st_size > MOST_BYTES:
                raise SystemExit(f"{file} has {file.stat().st_size:,} bytes, more than {MOST_BYTES:,}")
            context.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
