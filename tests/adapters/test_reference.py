"""The proof that pruning computes what it claims: every family against brute force."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.checks import TOLERANCE, check_decision, tolerance
from tests.adapters.reference import (
    HYBRID,
    MAIN,
    QUICK,
    VIDEO,
    apart,
    cases,
    newlines,
    prompt,
    prompt_of,
    reference,
    run,
    samples,
    slow_unless,
)
from tokprune.methods.connector.divprune import divprune
from tokprune.testing import FAMILIES, build

OTHERS = [f for f in FAMILIES if f not in MAIN]


def matrix() -> Iterator[Any]:
    for family, kind in cases(MAIN):
        for method in ("random", "divprune", "hired"):
            for positions in ("keep", "compact"):
                quick = family in QUICK or (kind == "image" and method == "random")
                yield slow_unless(quick, family, kind, method, positions)
    for family, kind in cases(OTHERS):
        for positions in ("keep", "compact"):
            yield slow_unless(kind == "image" or positions == "keep", family, kind, "random", positions)


# -- the reference itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"), [slow_unless(f in QUICK or k == "image", f, k) for f, k in cases(FAMILIES)]
)
def test_reference_with_everything_kept_is_the_unpruned_model(family: str, kind: str) -> None:
    case = prompt(family, kind)
    assert case.distance(case.real, "keep", case.unpruned) < tolerance(family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "molmo2"])
def test_reference_tells_right_from_wrong(family: str) -> None:
    case = prompt(family)
    with tokprune.apply(case.tiny.model, "random", ratio=0.2, positions="keep") as pruning:
        got = run(case.tiny, case.inputs)
        keep = pruning.last.keep
    other = keep.clone()
    column = int((keep[0] & case.visual[0]).nonzero()[-1])
    free = int((~keep[0] & case.visual[0]).nonzero()[-1])
    other[0, column], other[0, free] = False, True
    blind = 100 * TOLERANCE
    assert case.distance(keep, "keep", got) < TOLERANCE
    assert case.distance(keep, "compact", got) > blind, "the two ways to number positions must differ"
    first = apart(
        got.steps[:1, 0], [reference(case.tiny, case.generate, other, "keep", got.tokens[:, :0]).prompt[0][-1]]
    )
    assert first > blind, "one exchanged token must show"
    assert apart(got.steps[:, 0], case.unpruned.steps[:, 0]) > blind, "pruning must show"


# -- pruned models against brute force ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind", "method", "positions"), matrix())
def test_pruned_model_equals_brute_force(family: str, kind: str, method: str, positions: str) -> None:
    case = prompt(family, kind)
    with tokprune.apply(case.tiny.model, method, ratio=0.2, positions=positions) as pruning:
        got = run(case.tiny, case.inputs)
        check_decision(case, pruning.last, 0.2)
    assert case.distance(pruning.last.keep, positions, got) < tolerance(family)


@pytest.mark.parametrize(("family", "kind"), [slow_unless(f in QUICK, f, k) for f, k in cases(MAIN)])
def test_the_choice_is_the_methods_own(family: str, kind: str) -> None:
    """DivPrune by hand, on the embeddings that the unpruned language model is given."""
    case = prompt(family, kind)
    line_breaks = newlines(case.tiny, case.generate)
    with tokprune.apply(case.tiny.model, "divprune", ratio=0.2) as pruning:
        case.tiny.model(**case.inputs)
    for record in pruning.last.streams:
        columns = record.columns[~line_breaks[record.row, record.columns]]
        chosen = divprune(case.generate.embeds[record.row, columns][None], record.kept)[0]
        kept_columns = columns[pruning.last.keep[record.row, columns]]
        assert torch.equal(columns[chosen].sort().values, kept_columns)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "llava_next", "internvl"])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.6])
def test_positions_at_other_ratios(family: str, ratio: float) -> None:
    kind = "video" if family in VIDEO else "image"
    case = prompt(family, kind)
    for positions in ("keep", "compact"):
        with tokprune.apply(case.tiny.model, "random", ratio=ratio, positions=positions) as pruning:
            got = run(case.tiny, case.inputs)
            check_decision(case, pruning.last, ratio)
        assert case.distance(pruning.last.keep, positions, got) < TOLERANCE


@pytest.mark.parametrize("family", QUICK)
def test_automatic_positions(family: str) -> None:
    case = prompt(family)
    with tokprune.apply(case.tiny.model, "random", ratio=0.1) as pruning:
        got = run(case.tiny, case.inputs)
    wanted = "keep" if case.forward.mrope else "compact"
    assert pruning.last.policy == wanted
    assert case.distance(pruning.last.keep, wanted, got) < TOLERANCE


def test_absolute_budget() -> None:
    case = prompt("llava_next")
    with tokprune.apply(case.tiny.model, "random", budget=100) as pruning:
        got = run(case.tiny, case.inputs)
    assert [r.kept for r in pruning.last.streams] == [min(r.total, 100) for r in pruning.last.streams]
    assert case.distance(pruning.last.keep, "compact", got) < TOLERANCE


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("family", HYBRID)
def test_hybrid_models_are_exact_but_for_their_chunked_kernel(
    family: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", module.torch_recurrent_gated_delta_rule)
    tiny = build(family)
    case = prompt_of(tiny, samples("image"))
    with tokprune.apply(tiny.model, "random", ratio=0.2, positions=positions) as pruning:
        got = run(tiny, case.inputs)
    assert case.distance(pruning.last.keep, positions, got) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, k) for f, k in cases(("llava_next", "llava_next_video", "llava_onevision")) if k != "mixed"],
)
def test_newline_stays_iff_a_token_of_its_line_does(family: str, kind: str) -> None:
    case = prompt(family, kind)
    line_breaks = newlines(case.tiny, case.generate)
    if (family, kind) == ("llava_next_video", "video"):
        assert not line_breaks.any()
        return
    tiles = kind == "image"
    kept_breaks = dropped_breaks = 0
    with tokprune.apply(case.tiny.model, "random", ratio=0.05) as pruning:
        case.tiny.model(**case.inputs)
    for record in pruning.last.streams:
        columns = record.columns.tolist()
        breaks = [c for c in columns if line_breaks[record.row, c]]
        assert breaks
        if tiles and len(breaks) > 1:
            columns = columns[64:]  # the thumbnail comes first and has no newlines
        for end in breaks:
            line = columns[: columns.index(end)]
            columns = columns[columns.index(end) + 1 :]
            assert len(line) > 1
            stays = bool(pruning.last.keep[record.row, end])
            assert stays == bool(pruning.last.keep[record.row, line].any())
            kept_breaks, dropped_breaks = kept_breaks + stays, dropped_breaks + (not stays)
        assert not columns, "a stream ends with a newline"
    if kind == "image":
        assert kept_breaks > 2
        assert dropped_breaks > 2
