"""generate() on prompts padded on the right: no row is answered from padding, whichever keeps more tokens.

The longest prompt is answered as alone, as it is natively. A shorter one gets its first token from its own last token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.reference import HYBRID, QUICK, shared
from tokprune.testing import FAMILIES, TinyVLM, picture

NEW = 5
ONE_PICTURE = ("paligemma",)  # its prompt takes pictures in front only


def batch(tiny: TinyVLM) -> list[list[Any]]:
    """The first prompt is the longer one as written, the second once both are pruned."""
    pictures = [("image", picture(40, 40, i)) for i in range(3)]
    longer = (
        [*pictures, "what?"] if tiny.family in ONE_PICTURE else ["x", *(p for q in pictures for p in (q, " ")), "what?"]
    )
    length = tiny.inputs([longer])["input_ids"].shape[1]
    other = [("image", picture(30, 30, 4)), "y"]
    text = length - tiny.inputs([other])["input_ids"].shape[1] - 2
    return [longer, [*other, "y" * text]]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 16}], ids=["greedy", "beam", "chunks"]
)
@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in FAMILIES])
def test_rows_padded_on_the_right_answer_as_alone(family: str, options: dict[str, int]) -> None:
    if family in HYBRID:
        pytest.skip("padding behind a prompt goes into the recurrent state, natively too")
    if "prefill_chunk_size" in options and family in (
        "ovis2",
        "fast_vlm",
        "perception_lm",
        "gemma3",
        "paligemma",
        "molmo2",
    ):
        pytest.skip("chunks of it fail natively, or cut its blocks of pictures that see each other")
    if "num_beams" in options and family == "glm4v":
        pytest.skip("mixes up pictures of beams, natively too")
    tiny = shared(family)
    parts = batch(tiny)
    right = tiny.inputs(parts, "right")
    assert int(right["attention_mask"][0].sum()) > int(right["attention_mask"][1].sum())
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "divprune", ratio=0.2, positions=positions) as pruning:
            got = tiny.model.generate(**right, max_new_tokens=NEW, **options)[:, -NEW:]
            kept = pruning.last.keep.sum(1)
            assert kept[0] < kept[-1], "the case that the test is about"
            alone = [tiny.model.generate(**tiny.inputs([p]), max_new_tokens=NEW, **options)[0, -NEW:] for p in parts]
        assert torch.equal(got[0], alone[0])
        if not options.get("num_beams"):  # transformers numbers what follows a shorter prompt from its padding
            assert got[1, 0] == alone[1][0]
