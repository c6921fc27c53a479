"""examples/app.py in a real browser: a click compares methods, another ratio compares anew."""

from __future__ import annotations

import runpy
import time
from collections.abc import Iterator

import pytest

import tokprune.demo
from tests.browser.chromium import Browser
from tests.docs.blocks import ROOT
from tokprune.demo.asking import Asker

pytestmark = pytest.mark.slow
KEPT = "document.querySelector('#kept img')?.src ?? ''"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("gradio", reason="pip install '.[app]'")
    example = tokprune.demo.held_out(1)[0]
    asker = Asker(*tokprune.demo.load(), scorer=tokprune.demo.load_scorer())
    page = runpy.run_path(str(ROOT / "examples" / "app.py"))["build"](asker, example.image, example.question)
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


def wait(browser: Browser, expression: str, other_than: str = "", seconds: float = 60) -> str:
    """What the page says once it says something else."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = str(browser.ask(expression) or "")
        if value != other_than:
            return value
        time.sleep(0.2)
    raise AssertionError(f"{expression} stayed {other_than!r}: {browser.complaints()}")


def test_the_page_compares(browser: Browser, address: str) -> None:
    browser.open_address(address, width=1300, height=900)
    wait(browser, "document.querySelector('#compare') ? 'there' : ''")
    browser.click("#compare")
    first = wait(browser, KEPT)
    size = "(() => { const i = document.querySelector('#kept img'); return i.naturalWidth + ' ' + i.naturalHeight; })()"
    width, height = map(int, wait(browser, size, "0 0").split())
    assert width > 2 * height  # the picture and two methods beside each other
    browser.ask(
        "(() => { const r = document.querySelector('input[type=range]'); r.value = 0.5;"
        "for (const e of ['input', 'change', 'pointerup']) r.dispatchEvent(new Event(e, {bubbles: true})); })()"
    )
    browser.click("#compare")
    assert wait(browser, KEPT, first) != first


def test_the_names_are_methods_that_run_alone(address: str) -> None:
    names = runpy.run_path(str(ROOT / "examples" / "app.py"))["names"]()
    assert {"divprune", "random", "visionzip"} <= set(names)
    assert not {"none", "per_tile", "dycoke", "tome"} & set(names)
