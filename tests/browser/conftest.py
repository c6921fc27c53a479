"""One browser for the tests of a file: no page is blamed for what another leaves behind. Without one on the machine
they are skipped, and say why.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import NAMES, Browser, find


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A page in headless Chromium."""
    program = find()
    if program is None:
        pytest.skip(f"no browser on this machine (looked for {', '.join(NAMES)}); apt-get install chromium")
    folder: Path = tmp_path_factory.mktemp("profile")
    with Browser(program, folder) as opened:
        yield opened
