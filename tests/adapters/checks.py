"""What a decision must hold to, and how near logits must be."""

from __future__ import annotations

from typing import Any

import torch

from tests.adapters.reference import (
    HYBRID,
    Prompt,
    newlines,
)
from tokprune.budget import kept

TOLERANCE = 1e-4


# The chunked kernel of recurrent layers sums in float32 over chunks of 64 columns, and filler moves the chunk borders:
# 4.4e-4 was measured. `test_hybrid_models_are_exact_but_for_their_chunked_kernel` takes that kernel out.
HYBRID_TOLERANCE = 1e-3


def tolerance(family: str) -> float:
    return HYBRID_TOLERANCE if family in HYBRID else TOLERANCE


def check_decision(case: Prompt, last: Any, ratio: float) -> None:
    """The counts and columns of a decision, from the unpruned prompt alone."""
    line_breaks = newlines(case.tiny, case.generate)
    assert torch.equal(last.keep & ~case.visual, case.real & ~case.visual), "text was dropped or padding kept"
    claimed = torch.zeros_like(case.visual)
    for record in last.streams:
        columns = record.columns.tolist()
        assert sorted(set(columns)) == columns, "columns of a stream ascend"
        assert not claimed[record.row, columns].any(), "two streams claim a column"
        claimed[record.row, columns] = True
        breaks = line_breaks[record.row, columns]
        assert (record.total, record.separators) == (int((~breaks).sum()), int(breaks.sum()))
        assert record.kept == kept(record.total, ratio)
        stay = last.keep[record.row, columns]
        assert int(stay[~breaks].sum()) == record.kept
        assert int(stay[breaks].sum()) == record.separators_kept
    assert torch.equal(claimed, case.visual), "every visual token belongs to a stream"
    assert last.length == int(last.keep.sum(1).max())
