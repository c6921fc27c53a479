"""Every decoder method in models: against masking and merging by hand, and the same choice however it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import tokprune
from tests.adapters.reference import language_model, slow_unless
from tests.decoder.reference import deep, distance, prompts, run
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens
from tokprune.registry import MethodInfo, get_method, list_methods
from tokprune.schedule import Schedule
from tokprune.testing import TinyVLM, picture
from tokprune.tokens import Selection

METHODS = list_methods("decoder")
every_method = pytest.mark.parametrize("name", METHODS)
RATIO = {name: {"ratio": 0.3} for name in METHODS} | {"vtw": {"layer": 2}}
FREE: dict[str, tuple[str, dict[str, Any]]] = {
    "mustdrop by its thresholds": ("mustdrop", {"overall": 0.05, "single": 0.05}),
    "sparsevlm by the rank": ("sparsevlm", {"rank": (1.5, 0.0)}),
    "atp_llava by its thresholds": ("atp_llava", {"thresholds": ((0.02, 0.5), (0.05, 0.9), (0.08, 2.0))}),
}


def columns(pruning: Any, row: int) -> list[list[int]]:
    """Prompt columns of what is left of one row behind each drop, counted from its first real token."""
    out = []
    for drop in pruning.last.drops:
        left = drop.columns[row][drop.columns[row] >= 0]
        out.append((left - left[0]).tolist())
    return out


class Merging:
    """Hooks on an unpruned language model that do what a run merged, to one prompt at a time, told by its length."""

    def __init__(self, tiny: TinyVLM, inputs: Any, pruning: Any, gone: dict[int, torch.Tensor]) -> None:
        self.layers = language_model(tiny.model).layers
        self.flows: dict[tuple[int, int], tuple[torch.Tensor, Selection]] = {}
        real, image = inputs["attention_mask"].bool(), inputs["input_ids"] == tiny.model.config.image_token_id
        for row in range(len(real)):
            left = image[row][real[row]]
            for drop in pruning.last.drops:
                chosen = drop.selections[row]
                if chosen is not None and chosen.weights is not None:
                    self.flows[drop.layer, len(left)] = left.nonzero()[:, 0], chosen
                if drop.layer in gone:
                    left = left & ~gone[drop.layer][row][real[row]]

    def __enter__(self) -> Merging:
        hooks = [lambda module, args, kwargs, i=i: self._merge(i, args, kwargs) for i in range(len(self.layers))]
        self.handles = [
            layer.register_forward_pre_hook(hook, with_kwargs=True)
            for layer, hook in zip(self.layers, hooks, strict=True)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _merge(self, layer: int, args: Any, kwargs: Any) -> Any:
        states = args[0]
        found = self.flows.get((layer, states.shape[1])) if len(states) == 1 else None
        if found is None:
            return None
        where, chosen = found
        states = states.clone()
        states[0, where[chosen.indices]] = chosen.apply(states[0, where])
        return (states, *args[1:]), kwargs


@pytest.mark.parametrize(
    ("family", "name", "attn"),
    [
        slow_unless(f == "llava" and a == "sdpa", f, n, a)
        for f in ("llava", "internvl", "gemma3", "qwen2_5_vl")
        for n in METHODS
        for a in ("sdpa", "eager")
    ],
)
def test_what_is_left_equals_masking(family: str, name: str, attn: str) -> None:
    tiny, method = deep(family, attn), get_method(name)
    inputs = tiny.inputs(prompts(family))
    with tokprune.apply(tiny.model, name, **RATIO[name]) as pruning:
        got = run(tiny, inputs, pruning, new=4)
        kept, merging = pruning.last.drops[-1].kept, Merging(tiny, inputs, pruning, got.gone)
    assert all(int(g[:2].sum()) > 0 and not int(g[2].sum()) for g in list(got.gone.values())[-1:])
    assert kept[2] == 0
    assert method.info.merges == bool(merging.flows)
    with merging:
        assert distance(tiny, inputs, got, pruning.decoder.compact) < 2e-5


@pytest.mark.parametrize("name", FREE)
def test_counts_of_their_own(name: str) -> None:
    tiny = deep("llava")
    method, options = FREE[name]
    inputs = tiny.inputs(prompts("llava"))
    with tokprune.apply(tiny.model, method, **options) as pruning:
        got = run(tiny, inputs, pruning, new=3)
        kept, merging = [drop.kept for drop in pruning.last.drops], Merging(tiny, inputs, pruning, got.gone)
    visual = [int((row == tiny.model.config.image_token_id).sum()) for row in inputs["input_ids"]]
    assert all(0 < k < n for k, n in zip(kept[-1][:2], visual[:2], strict=True)), kept
    with merging:
        assert distance(tiny, inputs, got, pruning.decoder.compact) < 2e-5


@torch.no_grad()
@every_method
def test_the_same_choice_however_it_is_asked(name: str) -> None:
    """Alone or beside others, in either kernel, with and without a cache; exactly what the ratio says."""
    asked, found = prompts("llava"), {}
    for attn in ("sdpa", "eager"):
        tiny = deep("llava", attn)
        with tokprune.apply(tiny.model, name, **RATIO[name]) as pruning:
            inputs = tiny.inputs(asked)
            tiny.model(**inputs)
            found[attn] = [columns(pruning, row) for row in (0, 1)]
            kept = [drop.kept for drop in pruning.last.drops]
            tiny.model(**inputs, use_cache=False)
            found[f"{attn}, no cache"] = [columns(pruning, row) for row in (0, 1)]
            alone = []
            for prompt in asked[:2]:
                tiny.model(**tiny.inputs([prompt]))
                alone.append(columns(pruning, 0))
            found[f"{attn}, alone"] = alone
    assert all(f == found["sdpa"] for f in found.values()), [k for k, f in found.items() if f != found["sdpa"]]
    visual = [int((row == tiny.model.config.image_token_id).sum()) for row in tiny.inputs(asked)["input_ids"]]
    assert visual[2] == 0
    if name != "vtw":  # each picture of 64 leaves 19
        assert list(kept[-1]) == [19 * n // 64 for n in visual]


@torch.no_grad()
@every_method
@pytest.mark.parametrize("family", ["llava", pytest.param("llava_next", marks=pytest.mark.slow)])
def test_the_token_that_the_answer_comes_from_stays(name: str, family: str) -> None:
    """A prompt may end with its picture (or the newline of its last line)."""
    tiny = deep(family)
    inputs = tiny.inputs(
        [["Hello ", ("image", picture(60, 40, 1))], ["Longer ", ("image", picture(60, 40, 2)), " ok?"]]
    )
    with tokprune.apply(tiny.model, name, **RATIO[name]) as pruning:
        tiny.model.generate(**inputs, max_new_tokens=2)
        assert all(
            int(drop.columns[row, -1]) == inputs["input_ids"].shape[1] - 1
            for drop in pruning.last.drops
            for row in (0, 1)
        )
        first, second = pruning.last.drops[-1].kept
        assert first == (1 if name == "vtw" else second) or family != "llava"


@torch.no_grad()
@every_method
def test_ratio_one_changes_no_bit(name: str) -> None:
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava"))
    before, real = tiny.model(**inputs).logits, inputs["attention_mask"].bool()
    if name != "vtw":
        with tokprune.apply(tiny.model, name, ratio=1.0):
            assert torch.equal(tiny.model(**inputs).logits[real], before[real])
    assert torch.equal(tiny.model(**inputs).logits, before)


@torch.no_grad()
def test_catp_spends_half_in_front_of_the_llm() -> None:
    """R = 0.6 to go in all: 1 - R / 2 in front, and 1 - R of the whole behind the second stage."""
    tiny = deep("llava")
    inputs = tiny.inputs(prompts("llava")[1:2])
    second = get_method("catp_llm", schedule=((1, 0.4 / 0.7), (2, 0.4 / 0.7)))
    with tokprune.apply(tiny.model, ["catp", second], ratio=0.7, query="compare", processor=tiny.processor) as pruning:
        tiny.model(**inputs)
        assert sum(stream.kept for stream in pruning.report().streams) == round(0.7 * 64) * 2
        first, last = (drop.kept[0] for drop in pruning.last.drops)
    assert last == round(round(0.7 * 64) * 2 * 0.4 / 0.7)
    assert last < first < round(0.7 * 64) * 2


@dataclass(frozen=True)
class Watcher(DecoderMethod):
    """Reads everything there is, and keeps all."""

    info: ClassVar[MethodInfo] = MethodInfo("watcher", "a test", adaptive=True)
    reads: ClassVar[tuple[str, ...]] = ("embeddings", "entering", "middle", "normed")
    seen: ClassVar[list[LayerTokens]] = []

    def plan(self, depth: int, share: float | None) -> Schedule:
        return Schedule(((3, 1.0),))

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        self.seen.append(tokens)
        return Selection(torch.arange(keep))


@torch.no_grad()
@pytest.mark.parametrize("family", [slow_unless(f == "llava", f) for f in ("llava", "qwen2_5_vl", "gemma3")])
def test_states_are_those_of_the_model(family: str) -> None:
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family))
    text = tiny.model.base_model.language_model
    states: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, args: states.__setitem__(name, args[0])

    Watcher.seen.clear()
    with tokprune.apply(tiny.model, Watcher()):
        hooks = [
            text.layers[0].register_forward_pre_hook(note("embeddings")),
            text.layers[2].register_forward_pre_hook(note("entering")),
            text.layers[2].mlp.register_forward_pre_hook(note("middle")),
            text.layers[3].register_forward_pre_hook(note("hidden")),
        ]
        try:
            tiny.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
    states["normed"] = text.norm(states["hidden"])
    assert len(Watcher.seen) == 2  # the prompt of words alone is not shown
    for row, tokens in enumerate(Watcher.seen):
        n = int(inputs["attention_mask"][row].sum())
        for name, value in states.items():
            assert torch.equal(getattr(tokens, name), value[row, -n:]), name
