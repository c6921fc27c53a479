"""Methods of the cache stage that free memory: answers against caches cut by hand, and bytes against arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tokprune
from tests.adapters.reference import language_model, observe, slow_unless
from tests.decoder.reference import LAYERS, deep, gone_by_layer, prompts
from tests.golden_vectors import GoldenCase, claims
from tests.spelling import cache_in, with_cache
from tokprune.errors import OptionError, TokpruneError, UnsupportedModelError
from tokprune.methods.cache.fastkv import FastKV
from tokprune.methods.cache.kvmerger import merged, runs
from tokprune.methods.cache.mustdrop_cache import survivors
from tokprune.registry import get_method
from tokprune.testing import TinyVLM, build

every = pytest.mark.parametrize("family", [slow_unless(f == "llava", f) for f in ("llava", "qwen2_5_vl", "internvl")])
WINDOW, KERNEL = 3, 3


def answer(tiny: TinyVLM, inputs: Any, **more: Any) -> tuple[Tensor, Tensor, Any]:
    """New tokens (B, T), their logits (B, T, V), and the cache."""
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, **more}
    out = tiny.model.generate(**inputs, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), cache_in(out)


def watched(tiny: TinyVLM, inputs: Any) -> tuple[list[Tensor], Any]:
    """Attention maps (H, n, n) and the cache of one prompt in the unpruned eager model."""
    maps: list[Tensor] = []
    layers = language_model(tiny.model).layers
    hooks = [a.self_attn.register_forward_hook(lambda m, args, o: maps.append(o[1][0].detach())) for a in layers]
    try:
        out = tiny.model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    finally:
        for hook in hooks:
            hook.remove()
    return maps, cache_in(out)


def fastkv_by_hand(attention: Tensor, keys: Tensor, values: Tensor, visual: list[int], keep: int) -> Any:
    """Keys and values of each head (H', k, d), chosen with loops."""
    heads, n = attention.shape[:2]
    groups = keys.shape[0]
    out = []
    for g in range(groups):
        mine = range(g * heads // groups, (g + 1) * heads // groups)
        score = []
        for i in range(len(visual)):
            near = [j for j in range(i - KERNEL // 2, i + KERNEL // 2 + 1) if 0 <= j < len(visual)]
            seen = [attention[h, q, visual[j]] for h in mine for q in range(n - WINDOW, n) for j in near]
            score.append(float(torch.stack(seen).mean()))
        best = sorted(range(len(visual)), key=lambda i: -score[i])[:keep]
        stay = [c for c in range(n) if c not in set(visual) or c in {visual[i] for i in best}]
        out.append((keys[g, stay], values[g, stay]))
    return tuple(torch.stack(part) for part in zip(*out, strict=True))


def kvmerger_by_hand(attention: Tensor, keys: Tensor, values: Tensor, visual: list[int], keep: int) -> Any:
    """Keys and values of each head (H', k, d), merged with loops."""
    heads, n = attention.shape[:2]
    groups, out = keys.shape[0], []
    text = [c for c in range(n) if c not in set(visual)]
    for g in range(groups):
        mine = range(g * heads // groups, (g + 1) * heads // groups)
        worth = torch.stack([attention[h][:, visual].sum(0) for h in mine]).mean(0)
        here, there = keys[g, visual], values[g, visual]
        alike = torch.cosine_similarity(here[1:], here[:-1], dim=-1)
        cuts = sorted(int(i) + 1 for i in alike.argsort()[: keep - 1])
        new_keys, new_values = [], []
        for start, stop in zip([0, *cuts], [*cuts, len(visual)], strict=True):
            pivot = start + int(worth[start:stop].argmax())
            away = (here[start:stop] - here[pivot]).square().sum(-1)
            weight = torch.exp(-away / (2 * away.mean()).clamp(min=1e-12))
            weight = weight / weight.sum()
            new_keys.append(weight @ here[start:stop])
            new_values.append(weight @ there[start:stop])
        out.append(
            (torch.cat([keys[g, text], torch.stack(new_keys)]), torch.cat([values[g, text], torch.stack(new_values)]))
        )
    return tuple(torch.stack(part) for part in zip(*out, strict=True))


METHODS = {
    "fastkv": (FastKV(layer=4, propagated=1.0, window=WINDOW, kernel=KERNEL), fastkv_by_hand),
    "kvmerger": (get_method("kvmerger"), kvmerger_by_hand),
}


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
@every
def test_steps_are_those_on_a_cache_cut_by_hand(family: str, name: str, attn: str) -> None:
    """A padded batch of three against each prompt alone in the unpruned model, whose cache loops have cut."""
    from transformers import DynamicCache

    method, by_hand = METHODS[name]
    tiny, eager = deep(family, attn), deep(family, "eager")
    inputs = tiny.inputs(prompts(family))
    with tokprune.apply(tiny.model, method, ratio=0.3) as pruning:
        tokens, logits, cache = answer(tiny, inputs)
        totals = [[s.total for s in pruning.last.streams if s.row == row] for row in range(3)]
    for row, part in enumerate(prompts(family)):
        one = eager.inputs([part])
        maps, whole = watched(eager, one)
        native = observe(eager, one)
        visual = native.visual[0].nonzero()[:, 0].tolist()
        keep = sum(max(1, int(0.3 * n + 0.5)) for n in totals[row])
        short = DynamicCache()
        for i, layer in enumerate(whole.layers):
            pair = layer.keys[0], layer.values[0]
            keys, values = by_hand(maps[i], *pair, visual, keep) if visual else pair
            short.update(keys[None], values[None], i)
        at = int(native.positions[..., 0, -1].max()) + 1
        for step, token in enumerate(tokens[row, :-1]):
            where = torch.full((1, 1), at + step)
            hidden = language_model(eager.model)(
                inputs_embeds=eager.model.get_input_embeddings()(token[None, None]),
                position_ids=where.expand(3, 1, 1) if native.mrope else where,
                attention_mask=torch.zeros(1, 1, 1, short.get_seq_length() + 1),
                use_cache=True,
                **with_cache(short),
            ).last_hidden_state
            got = logits[row, step + 1]
            torch.testing.assert_close(got, eager.model.lm_head(hidden)[0, 0], atol=5e-5, rtol=0)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 5


@every
def test_bytes_are_those_of_the_budget_and_the_peak_falls(family: str) -> None:
    """What the tensors of the cache hold, in each layer, while the prompt is read and behind it."""
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family)[:1])
    lm = language_model(tiny.model)
    config = lm.config
    each = 2 * config.num_key_value_heads * lm.layers[0].self_attn.head_dim * 4  # bytes of a key and its value
    seen: list[int] = []

    def held(cache: Any) -> int:
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None and t.numel()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(held(cache_in(kwargs)))

    with torch.no_grad():
        n = inputs["input_ids"].shape[1]
        visual = int(observe(tiny, inputs).visual.sum())
        for method, keep, stays in (
            ("kvmerger", visual // 4, 1.0),
            (FastKV(layer=3, propagated=0.5), visual // 4, 0.5),
        ):
            with tokprune.apply(tiny.model, method, budget=keep) as pruning:
                seen.clear()
                hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in lm.layers]
                try:
                    cache = cache_in(tiny.model(**inputs, use_cache=True))
                finally:
                    for hook in hooks:
                        hook.remove()
                wanted = (n - visual + keep) * each
                assert [held(cache) // LAYERS] == [wanted]
                assert seen == [wanted * (i + 1) for i in range(LAYERS)]  # never a whole layer besides its own
                before = (
                    sum(n - visual + (visual if i < 3 else int(visual * stays + 0.5)) for i in range(LAYERS)) * each
                )
                assert f"take {wanted * LAYERS} bytes instead of {before}" in str(pruning.report())


@torch.no_grad()
@every
def test_mustdrop_cuts_earlier_layers_to_the_last_stage(family: str) -> None:
    """The layers from below the first drop hold what the last one left; those below it all."""
    tiny = deep(family)
    inputs = tiny.inputs(prompts(family)[:2])
    methods = [get_method("pyramiddrop", layers=(2, 4), shares=(0.5, 0.2)), "mustdrop_cache"]
    with tokprune.apply(tiny.model, methods) as pruning:
        cache = cache_in(tiny.model(**inputs, use_cache=True))
        gone = gone_by_layer(pruning, inputs["attention_mask"].bool())
        left = inputs["attention_mask"].bool() & ~gone[4]
        width = int(left.sum(1).max())
        assert [layer.keys.shape[2] for layer in cache.layers] == [inputs["input_ids"].shape[1]] + [width] * 4
    with tokprune.apply(tiny.model, methods[0]):
        whole = cache_in(tiny.model(**inputs, use_cache=True))
    real = inputs["attention_mask"].bool()
    for i, there in ((1, real), (2, real & ~gone[2]), (3, real & ~gone[2]), (4, left)):
        for row in range(2):
            stay = left[row][there[row]]  # of what the layer held
            wanted = whole.layers[i].keys[row][:, -len(stay) :][:, stay]
            assert torch.equal(cache.layers[i].keys[row][:, -wanted.shape[1] :], wanted)


@torch.no_grad()
@pytest.mark.parametrize("name", [*METHODS, "mustdrop"])
@every
def test_rows_beams_and_turns(family: str, name: str) -> None:
    """A row alone, beams, a copied cache and a cropped answer, as in the batch."""
    tiny = deep(family)
    parts = prompts(family)
    if name == "mustdrop":
        methods, options = [get_method("pyramiddrop", layers=(3, 4), shares=(0.5, 0.2)), "mustdrop_cache"], {}
    else:
        methods, options = METHODS[name][0], {"ratio": 0.3}
    inputs = tiny.inputs(parts)
    with tokprune.apply(tiny.model, methods, **options):
        tokens, logits, cache = answer(tiny, inputs)
        shorter = copy.deepcopy(cache)
        shorter.crop(-2)
        more = {
            k: torch.nn.functional.pad(inputs[k], (0, 4), value=int(k == "attention_mask"))
            for k in ("attention_mask", "mm_token_type_ids")
            if k in inputs
        }
        ids = torch.cat([inputs["input_ids"], tokens[:, :4]], 1)
        out = tiny.model.generate(
            input_ids=ids,
            **more,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_logits=True,
            **with_cache(shorter),
        )
        torch.testing.assert_close(out.logits[0], logits[:, 4], atol=2e-5, rtol=0)
        for row in range(3):
            _, alone, _ = answer(tiny, tiny.inputs(parts[row : row + 1]))
            torch.testing.assert_close(alone[0], logits[row], atol=2e-5, rtol=0)
        beams = tiny.model.generate(**inputs, max_new_tokens=4, num_beams=2)
        one = tiny.model.generate(**tiny.inputs(parts[:1]), max_new_tokens=4, num_beams=2)
        assert torch.equal(beams[0, -4:], one[0, -4:])
        if name != "mustdrop":
            held = cache.get_seq_length()
            with pytest.raises(UnsupportedModelError, match="cannot be cropped back into its prompt"):
                cache.crop(-10)
            assert cache.get_seq_length() == held


def test_what_cannot_be_right_is_refused() -> None:
    tiny = deep("llava")
    with pytest.raises(OptionError, match="none is there"):
        tokprune.apply(tiny.model, "mustdrop_cache")
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        tokprune.apply(build("gemma3", layers=4).model, "kvmerger", ratio=0.5)
    with tokprune.apply(tiny.model, "kvmerger", ratio=0.5), pytest.raises(TokpruneError, match="fixed length"):
        tiny.model.generate(**tiny.inputs(prompts("llava")[:1]), max_new_tokens=2, cache_implementation="static")
    inputs = tiny.inputs(prompts("llava"))
    before = tiny.model(**inputs).logits[inputs["attention_mask"].bool()]
    with tokprune.apply(tiny.model, "kvmerger", ratio=1.0):
        assert torch.equal(tiny.model(**inputs).logits[inputs["attention_mask"].bool()], before)


def test_runs_and_means_by_hand() -> None:
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 3.0], [-1.0, 0.0]]])
    assert runs(keys, 3).tolist() == [[0, 0, 1, 1, 2]]
    assert runs(keys, 1).tolist() == [[0] * 5]
    values = torch.arange(5.0)[None, :, None]
    sets = torch.tensor([[0, 0, 1, 1, 2]])
    worth = torch.tensor([[0.1, 0.5, 0.3, 0.3, 0.2]])
    pivot, new_keys, new_values = merged(keys, values, sets, worth, 3)
    assert pivot.tolist() == [[1, 2, 4]]
    weight = torch.tensor(-1.0).exp()  # of the other one: its squared distance is twice the mean
    torch.testing.assert_close(
        new_values[0, :, 0], torch.stack([1 / (1 + weight), (2 + 3 * weight) / (1 + weight), torch.tensor(4.0)])
    )
    torch.testing.assert_close(new_keys[0, 2], keys[0, 4])


@claims("mustdrop_kv")
def test_survivors_are_those_of_the_published_chain(case: GoldenCase) -> None:
    """Stage by stage the published code chains indices; ours looks the last tokens up by their numbers."""
    stages = [case[f"stage_keep_{i}"] for i in range(sum(key.startswith("stage_keep_") for key in case))]
    assert stages
    held = [torch.arange(int(stages[0].amax()) + 1 if len(stages[0]) else 0)]
    for keep in stages:
        held.append(held[-1][keep])
    for i in range(len(stages)):
        assert torch.equal(survivors(held[i], held[-1]), case[f"kv_keep_{i}"])
