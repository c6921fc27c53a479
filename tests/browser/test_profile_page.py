"""The page that `tokprune profile --html` writes, in a real browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser.chromium import Browser
from tests.profiling.test_pages import report
from tokprune.profiling.pages import profile_page
from tokprune.viz import html
from tokprune.viz.html import PagePicture

pytestmark = pytest.mark.slow
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    picture = PagePicture(Image.new("RGB", (900, 600), (200, 120, 40)), "what each method keeps", "kept tokens")
    return html.write(profile_page(report(), [picture]), tmp_path_factory.mktemp("profile") / "p.html")


def test_it_renders_in_silence(browser: Browser, file: Path) -> None:
    browser.open(file)
    assert browser.ask("document.title") == "Profile of llava <7b>"
    widths = browser.ask("[...document.images].map(i => { i.loading = 'eager'; return i.width; })")
    assert len(widths) == 3
    assert browser.ask("document.querySelectorAll('table').length") == 5
    assert browser.complaints() == []
    assert browser.requests() == []


def test_runs_sort_by_their_time(browser: Browser, file: Path) -> None:
    browser.open(file)
    heads = browser.ask("[...document.querySelector('table').tHead.rows[0].cells].map(c => c.innerText.trim())")
    total = next(i for i, head in enumerate(heads) if head.startswith("total") and "ms" in head)
    browser.click("#section-2 thead button", total)
    names = browser.ask(
        "[...document.querySelector('#section-2 table').tBodies[0].rows].map(r => r.cells[0].innerText)"
    )
    expected = sorted(report().cells, key=lambda c: c.times["total"].median)
    assert names == [c.name for c in expected]


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(browser: Browser, file: Path, dark: bool) -> None:
    browser.open(file, 390, 844, phone=True, dark=dark)
    assert browser.ask("document.documentElement.scrollWidth") <= 390
    shot = np.asarray(browser.screenshot(), dtype=int)
    assert shot.std() > 10
    assert (shot[:8].mean() < 60) == dark
