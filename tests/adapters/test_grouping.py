"""Rows of different length in groups: the same numbers as padded, in prefill and decode, and refusals with reasons."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import tokprune
from tests.adapters.reference import HYBRID, shared, slow_unless
from tests.spelling import with_cache
from tokprune import PruneConfig, get_method
from tokprune.adapters.dialect import cache_of
from tokprune.errors import OptionError
from tokprune.runtime.grouping import like_lengths
from tokprune.testing import FAMILIES, Part, picture

QUICK = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
CLOSE = 1e-4

RAGGED: list[list[Part]] = [
    ["Hello ", ("image", picture(60, 40, 1)), " what is this?"],
    ["Longer words before ", ("image", picture(40, 40, 2)), " and ", ("image", picture(90, 60, 3)), " compare them."],
    ["only words"],
    [
        "a ",
        ("image", picture(90, 160, 4)),
        " b ",
        ("image", picture(90, 90, 5)),
        " c ",
        ("image", picture(60, 60, 6)),
        "?",
    ],
]


@torch.no_grad()
def ask(model: Any, inputs: Any, packing: str, **given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """Logits of a forward at the kept columns of each row and of a step by hand on its cache, those of generated steps,
    what they said, what was noted.
    """
    config = PruneConfig.build("divprune", **(given or {"ratio": 0.3}), packing=packing)
    with tokprune.apply(model, config) as pruning:
        read = model(**inputs, use_cache=True)
        keep, note = pruning.last.keep, pruning.last.note
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": mask, **with_cache(cache_of(read))}
        logits = torch.cat([read.logits[keep], model(**step).logits[:, 0]])
        out = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
        return logits, torch.stack(out.logits, 1), out.sequences, note


@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in FAMILIES])
def test_groups_give_what_padding_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokprune.runtime.grouping.like_lengths", lambda n: like_lengths(n, overhead=1))
    tiny = shared(family)
    inputs = tiny.inputs(RAGGED)
    padded = ask(tiny.model, inputs, "padded")
    assert padded[3] == ""
    if family in HYBRID:
        with pytest.raises(OptionError, match='packing="grouped"'):
            ask(tiny.model, inputs, "grouped")
        return
    grouped = ask(tiny.model, inputs, "grouped")
    assert "groups of like length" in grouped[3] or "rows ran padded: " in grouped[3]
    assert family not in QUICK or "4 rows ran in" in grouped[3]
    for a, b in zip(padded[:2], grouped[:2], strict=True):
        assert float((a - b).abs().max()) < CLOSE
    assert torch.equal(padded[2], grouped[2])
    plain = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "divprune", ratio=1, packing="grouped"):
        assert torch.equal(tiny.model(**inputs).logits, plain)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_eager_attention_right_padding_and_any_order_of_rows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokprune.runtime.grouping.like_lengths", lambda n: like_lengths(n, overhead=1))
    tiny = shared(family)
    for attention, side, order in product(("sdpa", "eager"), ("left", "right"), ([0, 1, 2, 3], [3, 1, 0, 2])):
        inputs = tiny.inputs([RAGGED[i] for i in order], side)
        before = tiny.model.config._attn_implementation
        tiny.model.set_attn_implementation(attention)
        try:
            with torch.no_grad(), tokprune.apply(tiny.model, "divprune", ratio=0.3) as pruning:
                wanted = tiny.model(**inputs).logits[pruning.last.keep]
            with torch.no_grad(), tokprune.apply(tiny.model, "divprune", ratio=0.3, packing="grouped") as pruning:
                got = tiny.model(**inputs).logits[pruning.last.keep]
                assert "rows ran in" in pruning.report().notes[-1]
        finally:
            tiny.model.set_attn_implementation(before)
        assert float((wanted - got).abs().max()) < CLOSE


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_later_turn_on_the_cache_that_groups_filled(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    monkeypatch.setattr("tokprune.runtime.grouping.like_lengths", lambda n: like_lengths(n, overhead=1))
    tiny = shared(family)
    inputs, found = tiny.inputs(RAGGED[:2]), []
    more = tiny.inputs(
        [[" now ", ("image", picture(90, 90, 8)), " and ", ("image", picture(40, 60, 7)), " ok?"], [" or not?"]]
    )
    for packing in ("padded", "grouped"):
        cache = DynamicCache(config=tiny.model.config.get_text_config())
        with torch.no_grad(), tokprune.apply(tiny.model, "divprune", ratio=0.3, packing=packing) as pruning:
            tiny.model(**inputs, **with_cache(cache), use_cache=True)
            mask = torch.cat([inputs["attention_mask"], more["attention_mask"]], 1)
            logits = tiny.model(**{**more, "attention_mask": mask}, **with_cache(cache), use_cache=True).logits
            found.append(logits[pruning.last.keep])
            assert packing == "padded" or "the cache holds earlier turns" in pruning.last.note
    assert float((found[0] - found[1]).abs().max()) < CLOSE


def test_an_error_in_the_middle_of_the_groups_leaves_model_and_cache_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    monkeypatch.setattr("tokprune.runtime.grouping.like_lengths", lambda n: like_lengths(n, overhead=1))
    tiny = shared("llava")
    inputs, cache, calls = tiny.inputs(RAGGED), DynamicCache(), []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle")

    plain = tiny.model(**inputs).logits
    with tokprune.apply(tiny.model, "divprune", ratio=0.3, packing="grouped"):
        wanted = tiny.model(**inputs).logits
        hook = tiny.model.base_model.language_model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            tiny.model(**inputs, **with_cache(cache), use_cache=True)
        hook.remove()
        assert cache.get_seq_length() == 0
        assert torch.equal(tiny.model(**inputs).logits, wanted)
    assert torch.equal(tiny.model(**inputs).logits, plain)


def test_what_runs_padded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokprune.runtime.grouping.like_lengths", lambda n: like_lengths(n, overhead=1))
    tiny = shared("llava")
    inputs = tiny.inputs(RAGGED)
    with torch.no_grad(), tokprune.apply(tiny.model, "divprune", ratio=0.3, packing="grouped") as pruning:
        tiny.model(**inputs, output_attentions=True)
        assert "output_attentions" in pruning.last.note
        tiny.model.train()
        try:
            tiny.model(**inputs)
        finally:
            tiny.model.eval()
        assert "training" in pruning.last.note
        tiny.model(**tiny.inputs(RAGGED[:1]))
        assert pruning.last.note == ""


def test_what_can_never_be_grouped_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match="layers that are no attention"):
        tokprune.apply(shared("qwen3_5").model, "divprune", ratio=0.3, packing="grouped")
    tiny = shared("llava")
    methods = [get_method("divprune"), get_method("fastv", layer=1)]
    with pytest.raises(OptionError, match="fastv works on all rows"):
        tokprune.apply(tiny.model, methods, ratio=0.3, packing="grouped")
    with pytest.raises(OptionError, match="Did you mean 'grouped'"):
        PruneConfig.build("divprune", ratio=0.3, packing="group")
    config = PruneConfig.build("divprune", ratio=0.3, packing="auto")
    assert PruneConfig.from_dict(config.to_dict()) == config
    with tokprune.apply(shared("qwen3_5").model, config) as pruning:
        assert pruning.active


def test_auto_groups_where_it_pays_alone() -> None:
    tiny = shared("llava")
    alike = [RAGGED[0], [*RAGGED[0], " More"]]
    for rows, expected in ((alike, ""), ([*RAGGED, ["many words " * 200]], "rows ran in")):
        *_, note = ask(tiny.model, tiny.inputs(rows), "auto")
        assert expected in note
        assert bool(note) == bool(expected)


def brute(lengths: list[int], overhead: int) -> int:
    """The least cost over all ways to cut the sorted rows."""
    ordered, best = sorted(lengths), 10**9
    for cuts in product([False, True], repeat=len(lengths) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(lengths)]
        starts = [0, *ends[:-1]]
        best = min(best, sum(ordered[e - 1] * (e - s) + overhead for s, e in zip(starts, ends, strict=True)))
    return best


def test_groups_are_the_cheapest_ones() -> None:
    torch.manual_seed(0)
    for overhead in (0, 10, 100):
        for _ in range(30):
            lengths = torch.randint(1, 500, (int(torch.randint(1, 8, ())),)).tolist()
            groups = like_lengths(lengths, overhead)
            assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
            cost = sum(max(lengths[r] for r in rows) * len(rows) + overhead for rows in groups)
            assert cost == brute(lengths, overhead)
