"""What the pages show of methods of one's own works as it stands, in a model."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tokprune
from tests.methods.streams import LAYOUTS, stream
from tokprune import registry
from tokprune.errors import OptionError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.frames_base import FramesMethod, PerFrame
from tokprune.testing import build, picture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_names() -> Iterator[None]:
    """Forget what a test registers."""
    tokprune.list_methods()
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.usefixtures("own_names")
@torch.no_grad()
def test_a_method_that_scores_tokens() -> None:
    code = (ROOT / "examples" / "own_method.py").read_text(encoding="utf-8")
    assert blocks("extending.md")[0] in code, "the page shows another method than examples/own_method.py"
    runpy.run_path(str(ROOT / "examples" / "own_method.py"))
    method = tokprune.get_method("brightest", mix=1)
    assert isinstance(method, ConnectorMethod)
    with pytest.raises(OptionError, match=r"brightest: mix=2 is not a number in \[0, 1\]"):
        tokprune.get_method("brightest", mix=2)
    for where in ("image", "unpadded", "video"):
        tokens = stream(LAYOUTS[where], method.needs, seed=1)
        best = tokens.signals["cls_attention"].topk(9).indices.sort().values
        assert torch.equal(method.select(tokens, 9).indices, best)
    tiny = build("llava")
    inputs = tiny.inputs([["what is this? ", ("image", picture(60, 40, 1))]])
    plain = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "brightest", ratio=0.2) as pruning:
        tiny.model(**inputs)
        assert pruning.last.streams[0].kept == round(0.2 * pruning.last.streams[0].total)
    assert torch.equal(tiny.model(**inputs).logits, plain)
    with tokprune.apply(
        tiny.model, tokprune.get_method("protect", method="brightest"), ratio=0.5
    ):  # wrappers take it by its name
        tiny.model(**inputs)


@pytest.mark.usefixtures("own_names")
def test_a_method_that_shares_out_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(b for b in blocks("frames.md") if "class FirstMinute" in b)
    module = ModuleType("own_frames")
    monkeypatch.setitem(sys.modules, "own_frames", module)
    exec(compile(code, "docs/frames.md", "exec"), vars(module))
    method = tokprune.get_method("first_minute", until=2.0)
    assert isinstance(method, FramesMethod)
    tokens = stream(LAYOUTS["video"], method.needs, seed=1)
    assert method.allocate(tokens, 20) == [10, 10, 0, 0, 0]
    assert len(PerFrame(method).select(tokens, 30).indices) == 30
