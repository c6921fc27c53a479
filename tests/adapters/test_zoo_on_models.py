"""Every connector method in real models: exact budgets, exact references for merges, and rows that ignore their
neighbours."""

from __future__ import annotations

import functools

import pytest
import torch

import tokprune
from tokprune.budget import kept
from tokprune.registry import list_methods, method_class
from tokprune.testing import build, picture

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl")
METHODS = [n for n in list_methods("connector") if n not in ("none", "explain")]  # explain: trained for one model
QUESTION = "what is the colour of the car?"
TOLERANCE = 1e-4


@functools.lru_cache(None)
def given(family: str):
    """A tiny model with a batch of two prompts: one picture, and two pictures with more text."""
    tiny = build(family)
    rows = [
        ["Hello ", ("image", picture(60, 40, 1)), " what is this?"],
        ["Longer text before ", ("image", picture(40, 40, 2)), " and ", ("image", picture(40, 70, 3)), " compare."],
    ]
    return tiny, rows, tiny.inputs(rows)


def method_of(name: str):
    """The method with its defaults; wrappers need something to wrap."""
    if not method_class(name).info.wrapper:
        return tokprune.get_method(name)
    inner = "fastervlm" if name == "relevance" else "divprune"
    options = {"border": 1} if name == "protect" else {}
    return tokprune.get_method(name, method=tokprune.get_method(inner), **options)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_method_in_model(family, name):
    tiny, rows, inputs = given(family)
    with tokprune.apply(tiny.model, method_of(name), ratio=0.3, query=QUESTION, processor=tiny.processor) as pruning:
        logits = tiny.model(**inputs).logits
        last = pruning.last
        assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
        asked = [kept(s.total, 0.3) for s in last.streams]
        if method_class(name).info.wrapper or name == "catp":  # these may move tokens between the images of a prompt
            for row in (0, 1):
                members = [(s.kept, a) for s, a in zip(last.streams, asked, strict=True) if s.row == row]
                assert sum(k for k, _ in members) == sum(a for _, a in members)
        else:
            assert [s.kept for s in last.streams] == asked
        alone = tiny.inputs(rows[1:])
        single = tiny.model(**alone).logits
        real = inputs["attention_mask"][1].bool()
        assert (logits[1][real] - single[0]).abs().max() < TOLERANCE
        new = tiny.model.generate(**inputs, max_new_tokens=3)
        assert new.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("name", [n for n in METHODS if method_class(n).info.merges])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_merged_tokens_are_what_the_language_model_sees(family, name):
    """The LLM's input at kept image columns equals the selection applied by hand to the plain model's features."""
    tiny, _, inputs = given(family)
    seen = []

    def grab(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"])

    handle = tiny.model.base_model.language_model.register_forward_pre_hook(grab, with_kwargs=True)
    try:
        tiny.model(**inputs)
        with tokprune.apply(
            tiny.model, method_of(name), ratio=0.3, query=QUESTION, processor=tiny.processor
        ) as pruning:
            tiny.model(**inputs)
            last = pruning.last
    finally:
        handle.remove()
    full, pruned = seen
    for stream in last.streams:
        columns = stream.columns.tolist()
        keep = last.keep[stream.row]
        survivors = [c for c in columns if keep[c]]
        features = full[stream.row, columns]
        physical = pruned.shape[1] - int(keep.sum()) + keep.long().cumsum(0) - 1  # filler stands left
        got = pruned[stream.row, physical[survivors]]
        assert stream.separators == 0
        want = stream.selection.apply(features_in_stream_order(stream, features))
        order = torch.argsort(rows_of(stream)[stream.selection.indices])
        assert torch.allclose(got, want[order], atol=1e-5)


def rows_of(stream):
    """Encoder row of each candidate; single-group streams are in row order, InternVL's thumbnail comes last in the
    encoder."""
    layout = stream.layout
    if layout.kind == "tiles" and layout.thumbnail:
        first = layout.group_sizes[0]
        n = len(layout.group)
        return torch.cat([torch.arange(n - first, n), torch.arange(n - first)])
    return torch.arange(len(layout.group))


def features_in_stream_order(stream, features):
    """Features in encoder order -> in the stream's order."""
    return features[rows_of(stream)]
