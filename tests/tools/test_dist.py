"""The archives build, the wheel is whole and small, and answers a question where nothing else of the repository is."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tools import dist


@pytest.mark.slow
def test_the_wheel_installs_and_answers(tmp_path: Path) -> None:
    pytest.importorskip("build", reason="pip install build")
    wheel = dist.build(tmp_path / "dist")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    dist.check(wheel)
    dist.attempt(wheel, bare=False)


def test_a_wheel_that_is_not_right_is_told(tmp_path: Path) -> None:
    wheel = tmp_path / "tokprune-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tests/test_it.py", "")
    with pytest.raises(SystemExit, match=r"no tokprune/py.typed.*tests/test_it.py is in it.*tag v9 is not version"):
        dist.check(wheel, "v9")
