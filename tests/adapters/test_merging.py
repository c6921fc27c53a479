"""Merged features and counts that a method chooses reach the language model as they should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.checks import TOLERANCE, check_decision, tolerance
from tests.adapters.pairs import Pairs, pair_weights
from tests.adapters.reference import (
    QUICK,
    VIDEO,
    Change,
    Prompt,
    cases,
    newlines,
    prompt,
    run,
    slow_unless,
)
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import ConnectorMethod
from tokprune.registry import MethodInfo
from tokprune.testing import FAMILIES
from tokprune.tokens import Selection, VisualTokens


def columns_of(case: Prompt, record: Any, features: Tensor) -> Tensor:
    """(N,) prompt column of each of a stream's candidates, found again by comparing features with the unpruned
    prompt's.

    A stream may order its candidates otherwise than the prompt does (thumbnail first). Models may scale features on the
    way to the embedding, and Molmo 2 adds them to the placeholder's.
    """
    native = case.generate
    columns = record.columns[~newlines(case.tiny, native)[record.row, record.columns]]
    embeds = native.embeds[record.row, columns]
    if case.tiny.family == "molmo2":
        embeds = embeds - case.tiny.model.get_input_embeddings()(native.ids[record.row, columns]).detach()
    alike = torch.nn.functional.normalize(features, dim=-1) @ torch.nn.functional.normalize(embeds, dim=-1).T
    best, place = alike.max(-1)
    assert (best > 1 - 1e-5).all(), "the method saw features that the language model never gets"
    assert place.unique().numel() == len(columns), "two candidates share a column"
    return columns[place]


def merge_pairs(case: Prompt, last: Any, seen: list[Tensor]) -> Change:
    """The same merge on full-length embeddings, by column."""
    where = [columns_of(case, record, features) for record, features in zip(last.streams, seen, strict=True)]

    def change(row: int, plane: Tensor) -> Tensor:
        out = plane.clone()
        for record, columns in zip(last.streams, where, strict=True):
            if record.row == row:
                out[columns[0 : 2 * record.kept : 2]] = pair_weights(len(columns), record.kept) @ plane[columns]
        return out

    return change


@pytest.mark.parametrize(
    ("family", "kind", "form"),
    [
        slow_unless(f in QUICK and (k == "mixed" or f not in VIDEO), f, k, form)
        for f, k in cases(FAMILIES)
        for form in (("target", "rows", "sparse", "features") if f in QUICK else ("target",))
        if not (form == "features" and f == "qwen3_vl")
    ],
)
def test_merged_features_reach_the_language_model(family: str, kind: str, form: str) -> None:
    case = prompt(family, kind)
    for positions in ("keep", "compact"):
        method = Pairs(form)
        with tokprune.apply(case.tiny.model, method, ratio=0.3, positions=positions) as pruning:
            got = run(case.tiny, case.inputs)
            check_decision(case, pruning.last, 0.3)
        change = merge_pairs(case, pruning.last, method.seen[-len(pruning.last.streams) :])
        assert case.distance(pruning.last.keep, positions, got, change) < tolerance(family)
    assert case.distance(pruning.last.keep, positions, got) > 100 * TOLERANCE, "the merge must show"


def test_explicit_features_are_refused_where_deepstack_planes_exist() -> None:
    case = prompt("qwen3_vl")
    pruning = tokprune.apply(case.tiny.model, Pairs("features"), ratio=0.3)
    with pytest.raises(UnsupportedModelError, match="weights"):
        case.tiny.model(**case.inputs)
    pruning.remove()
    assert torch.equal(run(case.tiny, case.inputs).logits, case.unpruned.logits)


@dataclass(frozen=True)
class Uneven(ConnectorMethod):
    """An adaptive method: the content sets the count."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Keep the tokens whose features sum to more than zero, whatever was asked for."""
        return Selection((tokens.features.sum(-1) > 0.5).nonzero().flatten())


Uneven.info = MethodInfo("uneven", "test", adaptive=True)


@pytest.mark.parametrize("family", QUICK)
def test_adaptive_counts(family: str) -> None:
    case = prompt(family, "mixed" if family in VIDEO else "image")
    for positions in ("keep", "compact"):
        with tokprune.apply(case.tiny.model, Uneven(), ratio=0.5, positions=positions) as pruning:
            got = run(case.tiny, case.inputs)
        assert len({r.kept / r.total for r in pruning.last.streams}) > 1
        assert case.distance(pruning.last.keep, positions, got) < TOLERANCE
