"""Signals of blocks that the encoder stage has reduced, as connector methods get them, against dense forwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tokprune
from tests.encoder.all_towers import parts
from tests.encoder.test_vlm_towers import dense_qwen, encode, two_images
from tests.published.bipartite import unmerge
from tokprune.errors import MissingSignalError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.encoder.tome import ToMe
from tokprune.ops.merge import bipartite_matching, merge_weighted
from tokprune.registry import MethodInfo
from tokprune.testing import build
from tokprune.tokens import Selection, VisualTokens

close = torch.testing.assert_close
TIGHT = {"atol": 1e-5, "rtol": 1e-4}


@dataclass(frozen=True)
class Spy(ConnectorMethod):
    """Keeps what it was given, and the first tokens."""

    wanted: tuple[str, ...] = ()
    seen: list[VisualTokens] = field(default_factory=list)
    info: ClassVar[MethodInfo] = MethodInfo("spy", "a test")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.wanted

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        self.seen.append(tokens)
        return Selection(torch.arange(keep))


def spied(tiny: Any, inputs: Any, encoder: Any, *names: str) -> tuple[list[VisualTokens], Any]:
    """What a connector method sees behind `encoder`, image by image, and the trace."""
    spy = Spy(names)
    with tokprune.apply(tiny.model, [encoder, spy], ratio=0.1) as pruning:
        tiny.model(**inputs)
        return spy.seen, pruning.encoder.trace


def watched(tower: Any, run: Any) -> Tensor:
    """What enters the first block."""
    seen: dict[str, Tensor] = {}
    first = tower[0].register_forward_pre_hook(
        lambda m, a, kw: seen.update(x=a[0] if a else kw["hidden_states"]), with_kwargs=True
    )
    run()
    first.remove()
    return seen["x"]


@pytest.mark.parametrize("proportional", [True, False])
@torch.no_grad()
def test_a_clip_tower_tells_what_its_reduced_blocks_computed(proportional: bool) -> None:
    tiny = build("llava")
    inputs = two_images(tiny)
    blocks = list(tiny.model.base_model.vision_tower.encoder.layers)
    last = len(blocks) - 2  # vision_feature_layer=-2: the last block whose output is used
    assert last >= 1
    names = ("cls_attention", "cls_logits", f"keys:{last}", f"received_attention:{last}", f"value_norm:{last}")
    seen, trace = spied(tiny, inputs, ToMe(r=9, proportional=proportional), *names, "encoder_features")
    x = watched(blocks, lambda: encode(tiny, inputs))
    size, whole = None, lambda t: t
    for index, block in enumerate(blocks[: last + 1]):
        entry, qkv, project, middle, branch = parts(block)
        q, k, v = qkv(entry(x))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        raw = logits
        if size is not None and proportional:
            logits = logits + size.log()[:, None, None, :, 0]
        attention = logits.softmax(-1)
        if index == last:
            expected = {
                "cls_attention": whole(attention[:, :, 0].mean(1)[..., None])[:, 1:, 0],
                "cls_logits": whole(raw[:, :, 0].mean(1)[..., None])[:, 1:, 0],
                f"received_attention:{last}": whole(attention.mean((1, 2))[..., None])[:, 1:, 0],
                f"value_norm:{last}": whole(v.mean(1).abs().sum(-1)[..., None])[:, 1:, 0],
                f"keys:{last}": whole(k.transpose(1, 2).flatten(2))[:, 1:].unflatten(2, (q.shape[1], -1)),
            }
        x = x + project((attention @ v).transpose(1, 2).flatten(2))
        matching = bipartite_matching(k.mean(1), 9, 1)
        x, size = merge_weighted(matching, x, size)
        whole = (lambda inner, m: lambda t: inner(unmerge(m, t)))(whole, matching)
        x = x + branch(middle(x))
    expected["encoder_features"] = whole(x)[:, 1:]
    assert len(seen) == 2
    for image, tokens in enumerate(seen):
        there = trace.survivor[image]
        assert len(tokens) == int(there.sum()) < len(there)
        for name, values in expected.items():
            close(tokens.signals[name], values[image][there], **TIGHT)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_a_packed_tower_tells_what_its_reduced_blocks_computed(family: str) -> None:
    """Windows, images of different sizes, sizes that ride as a channel of the keys."""
    tiny = build(family)
    inputs = two_images(tiny)
    tower = tiny.model.base_model.visual
    calls: list[dict[str, Any]] = []
    watch = [
        b.register_forward_pre_hook(
            lambda m, a, kw: calls.append({**kw, "x": a[0] if a else kw["hidden_states"]}), with_kwargs=True
        )
        for b in tower.blocks
    ]
    encode(tiny, inputs)
    assert [h.remove() for h in watch]
    grid = inputs["image_grid_thw"]
    frames = [int(h * w) // 4 for _, h, w in grid.tolist()]
    looks: list[dict[str, Tensor]] = []
    dense_qwen(tower, calls, frames, 3, looks)
    for index in range(len(tower.blocks)):
        names = (f"received_attention:{index}", f"keys:{index}")
        seen, trace = spied(tiny, inputs, ToMe(r=3), *names)
        look = looks[index]
        queries = torch.bincount(look["frame"])[look["frame"]]  # of the frame, windows or not
        received = look["attention"].mean(0).sum(0) / queries
        units = received.view(-1, 4).mean(1)[look["group"]]
        keys = look["keys"].unflatten(0, (-1, 4)).mean(1)[look["group"]]
        order = tower_order(tiny, tower, grid)
        if order is not None:
            units, keys = (torch.empty_like(t).index_copy_(0, order, t) for t in (units, keys))
        start = 0
        for tokens, count in zip(seen, frames, strict=True):
            there = trace.survivor[start : start + count]
            close(tokens.signals[names[0]], units[start : start + count][there], **TIGHT)
            close(tokens.signals[names[1]], keys[start : start + count][there], **TIGHT)
            start += count


def tower_order(tiny: Any, tower: Any, grid: Tensor) -> Tensor | None:
    from tokprune.adapters.towers import find_tower

    found = find_tower(tiny.model)
    return None if found.grids is None else found.grids(grid, {})


@pytest.mark.parametrize("method", ["evit", "zerotprune", "ats", "pitome", "tofu"])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
@torch.no_grad()
def test_nothing_is_refused_and_dropped_tokens_are_no_candidates(family: str, method: str) -> None:
    tiny = build(family)
    options = {"r": 3} if method == "tofu" else {}
    encoder = tokprune.get_method(method, **options)
    seen, trace = spied(tiny, two_images(tiny), encoder, "cls_attention", "keys:0", "encoder_features")
    assert sum(len(t) for t in seen) == int(trace.survivor.sum())
    for tokens in seen:
        assert tokens.signals["cls_attention"].shape == (len(tokens),)
        assert (tokens.signals["cls_attention"] > 0).all()
        assert tokens.signals["encoder_features"].abs().sum(1).gt(0).all()


@pytest.mark.parametrize("name", ["hired", "fastervlm", "visionzip", "divprune"])
@torch.no_grad()
def test_real_connector_methods_run_behind_a_reduced_tower(name: str) -> None:
    for family in ("llava", "qwen2_5_vl"):
        tiny = build(family)
        with tokprune.apply(tiny.model, [ToMe(r=2), tokprune.get_method(name)], ratio=0.2) as pruning:
            tiny.model(**two_images(tiny))
            assert all(0 < s.kept < s.total for s in pruning.last.streams)


@torch.no_grad()
def test_what_has_no_meaning_is_refused_with_the_reason() -> None:
    tiny = build("qwen2_5_vl")
    with pytest.raises(MissingSignalError, match="proportional=False"):
        spied(tiny, two_images(tiny), ToMe(r=3), "cls_logits")
    seen, _ = spied(tiny, two_images(tiny), ToMe(r=3, proportional=False), "cls_logits")
    assert all(t.signals["cls_logits"].isfinite().all() for t in seen)
