"""Questions in any script: letters that the built-in font lacks come from another font, or are counted in words."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tokprune.viz import style

NO_FONT = "\U000f1234"  # private use: no font of a test machine has it


def drawn(text: str) -> np.ndarray:
    page = Image.new("RGB", (600, 40), "white")
    style.write(ImageDraw.Draw(page), (2, 4), text, 20, (0, 0, 0))
    return np.asarray(page.convert("L"))


def test_latin_words_are_one_run_of_the_built_in_font() -> None:
    assert style.runs("What colour is it?") == [("What colour is it?", "")]


@pytest.mark.parametrize("words", ["Что это?", "τι είναι;"])
def test_other_alphabets_are_drawn_in_letters_not_boxes(words: str) -> None:
    pytest.importorskip("matplotlib", reason="its font has these alphabets")
    assert any(name for _, name in style.runs(words))
    assert not any("no font" in part for part, _ in style.runs(words))
    first, second = drawn(words[0]), drawn(words[1])
    assert (first < 128).any()
    assert not np.array_equal(first, second)  # two boxes would be alike


def test_letters_without_a_font_are_said_in_words() -> None:
    parts = style.runs(f"see {NO_FONT * 3} here")
    assert [p.strip() for p, _ in parts] == ["see", "[3 letters that no font here has]", "here"]
    assert style.text_size(NO_FONT, 20)[0] > style.text_size("[", 20)[0]


def test_what_is_measured_is_what_is_drawn() -> None:
    for text in ("abc", f"abc {NO_FONT} xyz", "a Что b"):
        columns = np.flatnonzero((drawn(text) < 128).any(0))
        assert columns.max() - 2 <= style.text_size(text, 20)[0] + 2
