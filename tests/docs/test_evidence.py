"""What the pages of methods show as measured is there for every method inside the LLM and of its cache."""

from __future__ import annotations

import pytest

from tokprune.registry import list_methods
from tools.site.curve import curve_svg
from tools.site.evidence import curve_of


@pytest.mark.parametrize("name", [*list_methods("decoder"), *list_methods("cache")])
def test_methods_inside_the_llm_have_a_curve_beside_random(name: str) -> None:
    curve = curve_of(name)
    assert curve is not None
    lines = dict(curve.lines)
    assert lines.pop("random")
    assert lines
    assert all(name in line for line in lines)
    assert all(0 < x <= 1 and 0 < y <= 1 for line in lines.values() for x, y in line)
    assert "random" in curve_svg(curve)
