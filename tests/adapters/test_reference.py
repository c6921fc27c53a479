"""The proof that pruning computes what it claims: every family against brute force, and the model unharmed afterwards."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import (
    HYBRID,
    MAIN,
    QUICK,
    VIDEO,
    Change,
    Prompt,
    Run,
    apart,
    cases,
    language_model,
    newlines,
    prompt,
    prompt_of,
    reference,
    run,
    samples,
)
from tests.spelling import with_cache
from tokprune.budget import kept
from tokprune.errors import UnsupportedModelError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.connector.divprune import divprune
from tokprune.registry import MethodInfo
from tokprune.testing import FAMILIES, TinyVLM, build, picture
from tokprune.tokens import Merge, Selection, VisualTokens

TOLERANCE = 1e-4
# The chunked kernel of recurrent layers sums in float32 over chunks of 64 columns, and filler moves the chunk borders:
# 4.4e-4 was measured. `test_hybrid_models_are_exact_but_for_their_chunked_kernel` takes that kernel out.
HYBRID_TOLERANCE = 1e-3
OTHERS = [f for f in FAMILIES if f not in MAIN]


def tolerance(family: str) -> float:
    return HYBRID_TOLERANCE if family in HYBRID else TOLERANCE


def slow_unless(quick: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=[] if quick else [pytest.mark.slow])


def matrix() -> Iterator[Any]:
    for family, kind in cases(MAIN):
        for method in ("random", "divprune", "hired"):
            for positions in ("keep", "compact"):
                quick = family in QUICK or (kind == "image" and method == "random")
                yield slow_unless(quick, family, kind, method, positions)
    for family, kind in cases(OTHERS):
        for positions in ("keep", "compact"):
            yield slow_unless(kind == "image" or positions == "keep", family, kind, "random", positions)


used: dict[str, TinyVLM] = {}


@pytest.fixture(autouse=True)
def unpruned_afterwards() -> Iterator[None]:
    """The models are shared: a failing test must not leave its pruning behind for the next one."""
    yield
    for tiny in used.values():
        tokprune.remove(tiny.model)


def given(family: str, kind: str = "image") -> Prompt:
    case = prompt(family, kind)
    used[family] = case.tiny
    return case


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


# -- the reference itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"), [slow_unless(f in QUICK or k == "image", f, k) for f, k in cases(FAMILIES)]
)
def test_reference_with_everything_kept_is_the_unpruned_model(family: str, kind: str) -> None:
    case = given(family, kind)
    assert case.distance(case.real, "keep", case.unpruned) < tolerance(family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "molmo2"])
def test_reference_tells_right_from_wrong(family: str) -> None:
    case = given(family)
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


# -- pruned models against brute force -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind", "method", "positions"), matrix())
def test_pruned_model_equals_brute_force(family: str, kind: str, method: str, positions: str) -> None:
    case = given(family, kind)
    with tokprune.apply(case.tiny.model, method, ratio=0.2, positions=positions) as pruning:
        got = run(case.tiny, case.inputs)
        check_decision(case, pruning.last, 0.2)
    assert case.distance(pruning.last.keep, positions, got) < tolerance(family)


@pytest.mark.parametrize(("family", "kind"), [slow_unless(f in QUICK, f, k) for f, k in cases(MAIN)])
def test_the_choice_is_the_methods_own(family: str, kind: str) -> None:
    """DivPrune by hand, on the embeddings that the unpruned language model is given."""
    case = given(family, kind)
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
    case = given(family, kind)
    for positions in ("keep", "compact"):
        with tokprune.apply(case.tiny.model, "random", ratio=ratio, positions=positions) as pruning:
            got = run(case.tiny, case.inputs)
            check_decision(case, pruning.last, ratio)
        assert case.distance(pruning.last.keep, positions, got) < TOLERANCE


@pytest.mark.parametrize("family", QUICK)
def test_automatic_positions(family: str) -> None:
    case = given(family)
    with tokprune.apply(case.tiny.model, "random", ratio=0.1) as pruning:
        got = run(case.tiny, case.inputs)
    wanted = "keep" if case.forward.mrope else "compact"
    assert pruning.last.policy == wanted
    assert case.distance(pruning.last.keep, wanted, got) < TOLERANCE


def test_absolute_budget() -> None:
    case = given("llava_next")
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
    case = given(family, kind)
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


# -- merging ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs(ConnectorMethod):
    """Averages neighbours: token 2k becomes the weighted mean of 2k and 2k+1. `form` says how the merge is written.

    seen: collects the features of the streams, so that a test can find their columns again.
    """

    form: str = "target"
    seen: list[Tensor] = field(default_factory=list, compare=False)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Keep the first `keep` even tokens; an odd one out goes alone."""
        self.seen.append(tokens.features)
        weights = pair_weights(len(tokens), keep)
        indices = torch.arange(keep) * 2
        if self.form == "features":
            return Selection(indices, features=weights @ tokens.features)
        if self.form == "rows":
            return Selection(indices, Merge(rows=weights))
        if self.form == "sparse":
            return Selection(indices, Merge(rows=weights.to_sparse()))
        into = weights.sum(0) > 0
        return Selection(indices, Merge(target=torch.where(into, weights.argmax(0), -1), scale=weights.sum(0)))


Pairs.info = MethodInfo("pairs", "test", merges=True)


def pair_weights(n: int, keep: int) -> Tensor:
    """(keep, n) weights of `Pairs`: 0.75 and 0.25, or 1 for a token without neighbour."""
    weights = torch.zeros(keep, n)
    for k in range(keep):
        weights[k, 2 * k] = 0.75 if 2 * k + 1 < n else 1.0
        weights[k, 2 * k + 1 : 2 * k + 2] = 0.25
    return weights


def columns_of(case: Prompt, record: Any, features: Tensor) -> Tensor:
    """(N,) prompt column of each of a stream's candidates, found again by comparing features with the unpruned prompt's.

    A stream may order its candidates otherwise than the prompt does (thumbnail first). Models may scale features on the way
    to the embedding, and Molmo 2 adds them to the placeholder's.
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
    case = given(family, kind)
    for positions in ("keep", "compact"):
        method = Pairs(form)
        with tokprune.apply(case.tiny.model, method, ratio=0.3, positions=positions) as pruning:
            got = run(case.tiny, case.inputs)
            check_decision(case, pruning.last, 0.3)
        change = merge_pairs(case, pruning.last, method.seen[-len(pruning.last.streams) :])
        assert case.distance(pruning.last.keep, positions, got, change) < tolerance(family)
    assert case.distance(pruning.last.keep, positions, got) > 100 * TOLERANCE, "the merge must show"


def test_explicit_features_are_refused_where_deepstack_planes_exist() -> None:
    case = given("qwen3_vl")
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
    case = given(family, "mixed" if family in VIDEO else "image")
    for positions in ("keep", "compact"):
        with tokprune.apply(case.tiny.model, Uneven(), ratio=0.5, positions=positions) as pruning:
            got = run(case.tiny, case.inputs)
        assert len({r.kept / r.total for r in pruning.last.streams}) > 1
        assert case.distance(pruning.last.keep, positions, got) < TOLERANCE


# -- the model unharmed ------------------------------------------------------------------------------------------------------


def traces(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything that patching could leave on the modules: instance attributes, hooks, exchanged classes."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            [len(value) for key, value in sorted(module.__dict__.items()) if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }


def same(a: Run, b: Run) -> bool:
    """Whether two runs are equal bit for bit."""
    return torch.equal(a.logits, b.logits) and torch.equal(a.tokens, b.tokens) and torch.equal(a.steps, b.steps)


@pytest.mark.parametrize(
    ("family", "kind"), [slow_unless(f in QUICK or k == "image", f, k) for f, k in cases(FAMILIES)]
)
def test_keeping_all_and_removing_are_bit_identical(family: str, kind: str) -> None:
    case = given(family, kind)
    model = case.tiny.model
    before = traces(model)
    for method in ("random", Pairs()):
        with tokprune.apply(model, method, ratio=1) as pruning:
            assert same(run(case.tiny, case.inputs), case.unpruned)
            assert torch.equal(pruning.last.keep, case.real)
    pruning = tokprune.apply(model, "random", ratio=0.3)
    assert not same(run(case.tiny, case.inputs), case.unpruned)
    pruning.remove()
    assert same(run(case.tiny, case.inputs), case.unpruned)
    assert traces(model) == before
    pruning.remove()
    tokprune.remove(model)
    assert traces(model) == before


def test_applying_twice_replaces() -> None:
    case = given("llava_next")
    model = case.tiny.model
    before = traces(model)
    first = tokprune.apply(model, "random", ratio=0.5)
    once = traces(model)
    second = tokprune.apply(model, "random", ratio=0.1)
    assert traces(model) == once, "the first pruning should be gone"
    assert (first.active, second.active) == (False, True)
    model(**case.inputs)
    assert first.last is None
    check_decision(case, second.last, 0.1)
    first.remove()
    assert second.active, "a replaced handle must not take its successor away"
    model(**case.inputs)
    check_decision(case, second.last, 0.1)
    second.remove()
    assert traces(model) == before


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt: nothing that catches Exception sees it."""


PLACES = ("tower", "method", "language model", "decode step")


@contextlib.contextmanager
def failing(model: Any, method: Any, place: str, error: type[BaseException]) -> Iterator[None]:
    """Raise `error` somewhere inside the next forward (in the third forward for "decode step")."""
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if place != "decode step" or calls == 3:
            raise error("on purpose")

    if place == "method":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(method), "scores", fail)
            yield
        return
    base = model.base_model
    tower = base.visual if hasattr(base, "visual") else base.vision_tower
    where = tower if place == "tower" else language_model(model).layers[1]
    hook = where.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [RuntimeError, Interrupt])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_exception_inside_generate_leaves_the_model_clean(family: str, place: str, error: type[BaseException]) -> None:
    from transformers import DynamicCache

    case = given(family)
    model = case.tiny.model
    before = traces(model)
    pruning = tokprune.apply(model, "random", ratio=0.2)
    pruned = run(case.tiny, case.inputs)
    during = traces(model)
    cache = DynamicCache(config=model.config.get_text_config())
    held = weakref.ref(cache)
    with failing(model, pruning.config.methods[0], place, error):
        try:
            model.generate(**case.inputs, max_new_tokens=5, **with_cache(cache))
        except error as raised:
            assert str(raised) == "on purpose"  # noqa: PT017 - pytest.raises would keep the frames and the cache alive
        else:
            pytest.fail("nothing was raised")
        del cache
        if place != "decode step":
            with pytest.raises(error, match="on purpose"):
                model(**case.inputs)
    assert traces(model) == during
    assert same(run(case.tiny, case.inputs), pruned)
    gc.collect()
    assert held() is None, "the pruning still holds the cache of the generation that failed"
    pruning.remove()
    assert traces(model) == before
    assert same(run(case.tiny, case.inputs), case.unpruned)


# -- one result, however it is computed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in MAIN])
def test_eager_and_sdpa_agree(family: str) -> None:
    case = given(family)
    eager = build(family, attn="eager")
    for positions in ("keep", "compact"):
        answers = []
        for tiny in (case.tiny, eager):
            with tokprune.apply(tiny.model, "random", ratio=0.2, positions=positions) as pruning:
                answers.append(run(tiny, tiny.inputs(samples("image"))))
            keep = pruning.last.keep
        assert torch.equal(answers[0].tokens, answers[1].tokens)
        assert apart(answers[0].steps, answers[1].steps) < tolerance(family)
        assert apart(answers[0].logits[keep], answers[1].logits[keep]) < tolerance(family)


@pytest.mark.parametrize("family", QUICK)
def test_positions_hidden_from_attention_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention reads gaps in positions as packing, so under it only the rotary embedding sees kept positions."""
    case = given(family)
    monkeypatch.setattr("tokprune.runtime.prefill.Prefill._hide_positions", lambda self: True)
    text = case.tiny.inputs([["no picture here"]])
    wanted = run(case.tiny, text)
    with tokprune.apply(case.tiny.model, "random", ratio=0.2, positions="keep") as pruning:
        got = run(case.tiny, case.inputs)
        assert same(run(case.tiny, text), wanted), "the kept positions outlive their prompt"
        for error in (RuntimeError, Interrupt):
            with failing(case.tiny.model, None, "language model", error), pytest.raises(error):
                run(case.tiny, case.inputs)
            assert same(run(case.tiny, text), wanted), "the kept positions outlive a prompt that failed"
    assert case.distance(pruning.last.keep, "keep", got) < TOLERANCE


@pytest.mark.parametrize("method", ["random", "divprune"])
@pytest.mark.parametrize(
    ("family", "kind"), [slow_unless(f in QUICK and k == "image", f, k) for f, k in cases(FAMILIES)]
)
def test_a_row_depends_on_itself_alone(family: str, kind: str, method: str) -> None:
    """Neighbours, batch order and padding side change neither the choice nor the answer."""
    case, parts = given(family, kind), samples(kind)
    tiny = case.tiny
    for positions in ("keep", "compact"):
        with tokprune.apply(tiny.model, method, ratio=0.2, positions=positions) as pruning:
            batch, keep = run(tiny, case.inputs), pruning.last.keep
            wanted = [batch.logits[b][keep[b]] for b in range(2)]
            chosen = [keep[b][case.real[b]] for b in range(2)]
            for order, side in (([0], "left"), ([1], "left"), ([1, 0], "left"), ([0, 1], "right"), ([1, 0], "right")):
                inputs = tiny.inputs([parts[b] for b in order], padding_side=side)
                real = inputs["attention_mask"].bool()
                with torch.no_grad():
                    logits, here = tiny.model(**inputs).logits, pruning.last.keep
                for i, b in enumerate(order):
                    assert torch.equal(here[i][real[i]], chosen[b])
                    assert apart([logits[i][here[i]]], [wanted[b]]) < tolerance(family)
                if side == "left":
                    alone = run(tiny, inputs)
                    assert torch.equal(alone.tokens, batch.tokens[order])
                    assert apart(alone.steps, batch.steps[order]) < tolerance(family)


# These cannot take a prompt without picture beside one with, pruned or not.
NEED_PICTURES = ("paligemma", "idefics3", "smolvlm", "llava_onevision", "gemma3")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in NEED_PICTURES])
def test_text_only_prompts_are_untouched(family: str) -> None:
    tiny = given(family).tiny
    alone = tiny.inputs([["no picture here"]])
    wanted = run(tiny, alone)
    beside = tiny.inputs([["no picture here"], ["one ", ("image", picture(40, 40, 3)), " here"]])
    with tokprune.apply(tiny.model, "random", ratio=0.2) as pruning:
        assert same(run(tiny, alone), wanted)
        assert pruning.last is None
        got = run(tiny, beside)
    length = alone["input_ids"].shape[1]
    assert torch.equal(got.tokens[:1], wanted.tokens)
    assert apart(got.steps[:1], wanted.steps) < tolerance(family)
    assert apart(got.logits[0, -length:], wanted.logits[0]) < tolerance(family)
