"""Rows of attention made from queries and keys are those of eager attention maps, in every family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import HYBRID, language_model, slow_unless
from tests.decoder.reference import deep, prompts
from tests.spelling import cache_in, with_cache
from tokprune.errors import UnsupportedModelError
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens
from tokprune.registry import MethodInfo
from tokprune.runtime.decoder import attention
from tokprune.schedule import Schedule
from tokprune.testing import FAMILIES
from tokprune.tokens import Selection

ATTENDING = tuple(f for f in FAMILIES if f not in HYBRID)
QUICK = ("llava", "qwen3_vl", "gemma3")


@dataclass(frozen=True)
class Spy(DecoderMethod):
    """Keeps the first tokens in front of layers 3 and 4, and notes what it saw there."""

    info: ClassVar[MethodInfo] = MethodInfo("spy", "none")
    reads: ClassVar[tuple[str, ...]] = ("embeddings", "entering", "middle", "normed")
    seen: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)  # by layer and prompt

    def __post_init__(self) -> None:
        """`seen` is no option."""

    def plan(self, depth: int, share: float | None) -> Schedule:
        return Schedule(((3, 0.5), (4, 0.25)))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        every = torch.arange(len(tokens.columns))
        found: dict[str, Any] = {"tokens": tokens}
        for name, layer in (("below", tokens.below), ("own", tokens.own)):
            found[name] = {h: layer.weights(every, h) for h in ("mean", "max", "each")}
            found[f"{name} sums"] = layer.sums(every), layer.sums(every, "max"), layer.sums(every, logits=True)
            found[f"{name} logits"] = layer.logits(every, "each")
            found[f"{name} keys"] = layer.keys, layer.values
        self.seen[tokens.layer, sum(layer == tokens.layer for layer, _ in self.seen)] = found
        return Selection(torch.arange(keep))


def maps(model: Any, inputs: Any) -> list[Tensor]:
    """(B, H, n, n) of each layer of a model with eager attention."""
    out: list[Tensor] = []
    layers = language_model(model).layers
    hooks = [a.self_attn.register_forward_hook(lambda m, args, o: out.append(o[1].detach())) for a in layers]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return out


@torch.no_grad()
@pytest.mark.parametrize("family", [slow_unless(f in QUICK, f) for f in ATTENDING])
def test_rows_are_those_of_the_maps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below: the maps of the pruned run itself. Own: those of a run that has dropped only what was dropped before."""
    monkeypatch.setattr(attention, "BLOCK", 500)  # a few queries at a time
    tiny, spy = deep(family, "eager"), Spy()
    inputs = tiny.inputs(prompts(family))
    with tokprune.apply(tiny.model, spy):
        pruned = maps(tiny.model, inputs)
    plain = maps(tiny.model, inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    for row, n in enumerate(lengths[:2]):
        first, second = spy.seen[3, row], spy.seen[4, row]
        here = [m[row, :, -n:, -n:] for m in plain]
        for name, wanted in (("below", here[2]), ("own", here[3])):
            torch.testing.assert_close(first[name]["each"], wanted, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(first[name]["mean"], wanted.mean(0), atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(first[name]["max"], wanted.amax(0), atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(first[f"{name} sums"][0], wanted.mean(0).sum(0), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(first[f"{name} sums"][1], wanted.amax(0).sum(0), atol=2e-5, rtol=1e-5)
            logits = first[f"{name} logits"]
            torch.testing.assert_close(first[f"{name} sums"][2], logits.mean(0).sum(0), atol=1e-4, rtol=1e-4)
            if family not in ("gemma3", "paligemma", "molmo2"):  # whose masks are not causal alone
                again = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
                torch.testing.assert_close(again, wanted, atol=2e-6, rtol=1e-5)
        count = len(second["tokens"].columns)
        wanted = pruned[3][row, :, -count:, -count:]
        torch.testing.assert_close(second["below"]["each"], wanted, atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", [slow_unless(f in ("llava", "qwen3_vl"), f) for f in ATTENDING])
def test_what_a_method_sees_is_what_the_layers_got(family: str) -> None:
    """Hidden states, embeddings, keys and values, against the unpruned model's own; with earlier turns in the cache."""
    tiny, spy = deep(family), Spy()
    lm = language_model(tiny.model)
    inputs = tiny.inputs(prompts(family)[:1])
    states: dict[str, Tensor] = {}
    hooks = [
        lm.layers[i].register_forward_pre_hook(lambda m, a, i=i: states.update({f"layer {i}": a[0]})) for i in (0, 2, 3)
    ]
    hooks.append(lm.layers[2].mlp.register_forward_pre_hook(lambda m, a: states.update(middle=a[0])))
    try:
        cache = cache_in(tiny.model(**inputs, use_cache=True))
    finally:
        for hook in hooks:
            hook.remove()
    with tokprune.apply(tiny.model, spy):
        tiny.model(**inputs)
    tokens, n = spy.seen[3, 0]["tokens"], inputs["input_ids"].shape[1]
    close = torch.testing.assert_close
    for name, wanted in (
        ("hidden", states["layer 3"]),
        ("embeddings", states["layer 0"]),
        ("entering", states["layer 2"]),
        ("middle", states["middle"]),
        ("normed", lm.norm(states["layer 3"])),
    ):
        close(getattr(tokens, name), wanted[0], atol=1e-5, rtol=1e-5)
    assert tokens.columns.tolist() == list(range(n))
    for layer, name in ((2, "below"), (3, "own")):
        keys, values = spy.seen[3, 0][f"{name} keys"]
        close(keys, cache.layers[layer].keys[0], atol=1e-5, rtol=1e-5)
        close(values, cache.layers[layer].values[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_reaches_the_keys_of_earlier_turns() -> None:
    """They are part of every softmax and not of the result; without positions they cannot be asked."""
    from transformers import DynamicCache

    tiny, spy = deep("llava", "eager"), Spy()
    text = tiny.inputs([["some words first "]])
    inputs = tiny.inputs(prompts("llava")[:1])
    before, n = text["input_ids"].shape[1], inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": torch.cat([text["input_ids"], inputs["input_ids"]], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    plain = maps(tiny.model, whole)
    cache = DynamicCache()
    with tokprune.apply(tiny.model, spy):
        tiny.model(**text, **with_cache(cache))
        tiny.model(**{**inputs, "attention_mask": whole["attention_mask"]}, **with_cache(cache))
    seen = spy.seen[3, 0]
    for name, layer in (("below", 2), ("own", 3)):
        wanted = plain[layer][0, :, before:, before:]
        torch.testing.assert_close(seen[name]["each"], wanted, atol=2e-6, rtol=1e-5)
        assert float(seen[name]["mean"].sum(-1).max()) < 1
    with pytest.raises(UnsupportedModelError, match="keys of earlier turns"):
        seen["tokens"].own.weights(torch.tensor([n - 1]), rotary=False)


@torch.no_grad()
def test_attention_without_positions_and_positions_alone() -> None:
    """With the rotation left out, scores are products of projections; with ones for states, cosines of distances."""
    tiny, spy = deep("llava"), Spy()
    inputs = tiny.inputs(prompts("llava")[:1])
    with tokprune.apply(tiny.model, spy):
        tiny.model(**inputs)
    n = inputs["input_ids"].shape[1]
    tokens, layer = spy.seen[3, 0]["tokens"], language_model(tiny.model).layers[3]
    x, size = layer.input_layernorm(tokens.hidden), layer.self_attn.head_dim
    q, k = (p(x).unflatten(-1, (-1, size)).transpose(0, 1) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    logits = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * size**-0.5
    wanted = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    rows = torch.tensor([5, n - 1])
    got = tokens.own.weights(rows, "each", rotary=False)
    torch.testing.assert_close(got, wanted[:, rows], atol=2e-6, rtol=1e-5)
    frequency = 10000.0 ** (-torch.arange(0, size, 2) / size)
    away = (rows[:, None] - torch.arange(n)).float()
    wanted = 2 * torch.cos(away[..., None] * frequency).sum(-1) * size**-0.5
    torch.testing.assert_close(tokens.own.gravity(rows), wanted, atol=1e-4, rtol=1e-4)
