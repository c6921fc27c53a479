"""A later turn's picture on a cache that a pruned prefill made, against the whole conversation by brute force.

The second picture may keep all its tokens, or some: either way the cache's columns and keys differ, and the turn has to
be translated.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.conversations import conversation
from tests.adapters.reference import HYBRID, QUICK, apart, reference, shared
from tokprune.testing import FAMILIES

SECOND: dict[str, dict[str, Any]] = {
    "ratio 1": {"ratio": 1.0},
    "budget above": {"budget": 100000},
    "pruned, too": {"ratio": 0.3},
}


# Their prompts are read both ways from end to end, so that a turn in two steps is another thing than in one, natively
# too.
ONE_GO = ("paligemma", "molmo2")


def every(*quick: str) -> list[Any]:
    return [pytest.param(f, marks=[] if f in quick else [pytest.mark.slow]) for f in FAMILIES if f not in ONE_GO]


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", every(*QUICK, "gemma3", "glm4v"))
@torch.no_grad()
def test_second_picture_on_a_pruned_cache(family: str, rows: int, second: str) -> None:
    if rows == 2 and family in HYBRID:
        pytest.skip("ragged turns of recurrent models are refused")
    tiny = shared(family)
    talk = conversation(tiny, rows)
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, "random", ratio=0.2, positions=positions) as pruning:
            cache = talk.forward_first()
            first = pruning.last.keep
        with tokprune.apply(tiny.model, "random", positions=positions, **SECOND[second]) as pruning:
            logits = talk.forward_second(cache).logits
            keep = torch.cat([first, pruning.last.keep], 1)
        none = torch.zeros(rows, 0, dtype=torch.long)
        wanted = reference(tiny, talk.native, keep, positions, none).prompt
        got = [logits[row][keep[row, talk.start :]] for row in range(rows)]
        wanted = [w[-len(g) :] for w, g in zip(wanted, got, strict=True)]
        assert apart(got, wanted) < (1e-3 if family in HYBRID else 1e-4)
        assert cache.get_seq_length() == talk.native.ids.shape[1]
