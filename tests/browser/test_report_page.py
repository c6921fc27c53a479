"""The HTML report in a real browser: it renders, sorts by mouse and keyboard, stays silent, and fits a phone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser.chromium import Browser
from tokprune.viz import html
from tokprune.viz.html import Page, PagePicture, Section, Table, Value

pytestmark = pytest.mark.slow

COMMAND = "tokprune profile --model demo --methods divprune,hired --ratios 0.5,0.1 --html report.html  # <b>&'\""


def page() -> Page:
    rows = [
        ["plain", 64, "100.0 ± 0.4", Value("1.2 GiB", 1.2 * 2**30), "1"],
        ["divprune 0.1", 6, "9.5 ± 0.3", Value("900 MiB", 900 * 2**20), "2.5 x"],
        ["hired 0.1", 7, "12.25 ± 0.3", None, "2.25 x"],
        ["divprune 0.5", 32, "55.0 ± 1", Value("1.1 GiB", 1.1 * 2**30), "1.5 x"],
    ]
    wide = Table(
        [f"column {i}" for i in range(14)],
        [[f"some words {i}" for i in range(14)]],
        caption="A table wider than a phone",
    )
    table = Table(
        ["run", "visual tokens", "TTFT", "peak", "faster"], rows, "Medians.\nTwo lines.", ("", "", "ms", "", "")
    )
    picture = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (300, 6, 3)))
    return Page(
        "Profile of <demo> & more",
        COMMAND,
        {"torch": "2", "device_name": "x86 " + "very long " * 30, "note": None},
        [
            Section("Time", "First paragraph.\n\nSecond:\n- one\n- two", [table, wide]),
            Section("Pictures", pictures=[PagePicture(picture, "A ramp, 1536 pixels wide", "grey ramp")]),
            Section("<script>alert(1)</script>", "<img src=x onerror=alert(1)>"),
        ],
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return html.write(page(), tmp_path_factory.mktemp("report") / "report.html")


def column(browser: Browser, number: int) -> list[str]:
    rows = f"[...document.querySelector('table.sortable').tBodies[0].rows].map(r => r.cells[{number}].textContent)"
    return list(browser.ask(rows))


def test_it_renders_what_was_given_and_stays_silent(browser: Browser, file: Path) -> None:
    browser.open(file)
    assert browser.ask("document.title") == "Profile of <demo> & more"
    assert browser.ask("document.getElementById('command').textContent") == COMMAND
    assert browser.ask("[...document.querySelectorAll('h2')].map(h => h.textContent)") == [
        "Time",
        "Pictures",
        "<script>alert(1)</script>",
        "Environment",
    ]
    assert browser.ask("document.querySelectorAll('section img').length") == 1
    assert browser.ask("document.querySelector('img').naturalWidth") == 1536
    assert (
        browser.ask("getComputedStyle(document.querySelector('table')).borderCollapse") == "collapse"
    )  # style applied
    assert browser.complaints() == []
    assert browser.requests() == []


@pytest.mark.parametrize(
    ("number", "rising"),
    [
        (0, ["divprune 0.1", "divprune 0.5", "hired 0.1", "plain"]),
        (1, ["6", "7", "32", "64"]),
        (2, ["9.5 ± 0.3", "12.25 ± 0.3", "55.0 ± 1", "100.0 ± 0.4"]),
        (3, ["900 MiB", "1.1 GiB", "1.2 GiB", ""]),
        (4, ["1", "1.5 x", "2.25 x", "2.5 x"]),
    ],
)
def test_a_click_sorts_by_value(browser: Browser, file: Path, number: int, rising: list[str]) -> None:
    browser.open(file)
    before = column(browser, number)
    state = f"document.querySelectorAll('th[aria-sort]')[{number}].getAttribute('aria-sort')"
    browser.click("thead button", number)
    assert column(browser, number) == rising
    assert browser.ask(state) == "ascending"
    browser.click("thead button", number)
    assert column(browser, number) == [x for x in rising[::-1] if x] + [
        x for x in rising if not x
    ]  # empty ones stay last
    assert browser.ask(state) == "descending"
    browser.click("thead button", number)
    assert column(browser, number) == before
    assert browser.ask(state) == "none"
    assert browser.complaints() == []


def test_the_keyboard_sorts_too(browser: Browser, file: Path) -> None:
    browser.open(file)
    browser.ask("document.querySelectorAll('thead button')[1].focus()")
    browser.press("Enter", 13, "\r")
    assert column(browser, 1) == ["6", "7", "32", "64"]
    browser.press(" ", 32, " ")
    assert column(browser, 1) == ["64", "32", "7", "6"]
    browser.press("Tab", 9)
    assert browser.ask("document.activeElement.textContent").startswith("TTFT")


def test_the_command_can_be_copied(browser: Browser, file: Path) -> None:
    browser.open(file)
    assert browser.ask("document.getElementById('copy').hidden") is False
    browser.click("#copy")
    said = "new Promise(r => setTimeout(() => r(document.getElementById('copy').textContent), 300))"
    assert browser.ask(said) == "Copied"


def test_it_fits_a_phone(browser: Browser, file: Path) -> None:
    browser.open(file, 390, 844, phone=True)
    assert browser.ask("document.documentElement.scrollWidth") <= 390  # the page itself never scrolls sideways
    wide = (
        "[...document.querySelectorAll('.table .scroll')].map(s => [s.scrollWidth > s.clientWidth, s.clientWidth "
        "<= 390])"
    )
    assert browser.ask(wide)[1] == [True, True]  # the wide table scrolls inside its frame
    assert browser.ask("document.querySelector('img').getBoundingClientRect().width") <= 390
    shot = np.asarray(browser.screenshot(), dtype=int)
    assert shot.shape[1] == 780
    assert shot.std() > 10  # something is on it
    assert (shot[:8] > 200).all()  # light paper
    browser.click(".picture .scroll")
    assert browser.ask("document.querySelector('img').getBoundingClientRect().width") == 1536
    assert browser.ask("document.documentElement.scrollWidth") <= 390
    assert browser.complaints() == []


def test_dark_mode_is_dark_and_legible(browser: Browser, file: Path) -> None:
    browser.open(file, dark=True)
    shot = np.asarray(browser.screenshot(), dtype=int)
    assert (shot[:8] < 60).all()
    assert shot.max() > 180  # text stands out
    browser.open(file, dark=False)
    assert (np.asarray(browser.screenshot(), dtype=int)[:8] > 200).all()
