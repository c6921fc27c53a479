"""What a model with a decoder method must compute, worked out by masking.

The unpruned language model gets the whole prompt, one prompt at a time; from some layer on, masks of minus infinity
hide tokens from everybody else. Nothing is cut, gathered or shortened.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.adapters.reference import Native, additive, language_model, observe, samples, visible
from tests.spelling import with_cache
from tokprune.testing import Part, TinyVLM, build

LAYERS = 5


@functools.lru_cache(None)
def deep(family: str, attn: str = "sdpa") -> TinyVLM:
    """One model per family and kernel, deep enough for several drops; tests leave it as they found it."""
    return build(family, layers=LAYERS, attn=attn)


@dataclass
class Masked:
    """Hooks that hide keys from layers, and number positions anew in them."""

    model: Any
    gone: Mapping[int, Tensor]
    """(n,) bool by layer: prompt columns that nobody sees from this layer on."""
    compact: bool = False

    def __enter__(self) -> Masked:
        layers = language_model(self.model).layers
        self.handles = [
            layer.register_forward_pre_hook(functools.partial(self._hide, i), with_kwargs=True)
            for i, layer in enumerate(layers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def of(self, layer: int) -> Tensor | None:
        """What is hidden in a layer."""
        return next((self.gone[at] for at in sorted(self.gone, reverse=True) if at <= layer), None)

    def _hide(self, layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        gone = self.of(layer)
        if gone is None:
            return None
        mask = kwargs["attention_mask"].clone()  # (1, 1, q, k), of the last k keys
        queries, keys = mask.shape[-2:]
        total = self.total
        hidden = torch.cat([gone, torch.zeros(total - len(gone), dtype=torch.bool)])[total - keys :]
        own = torch.arange(keys) == (torch.arange(queries) + keys - queries)[:, None]
        mask = mask.masked_fill(hidden & ~own, torch.finfo(mask.dtype).min)
        new = {**kwargs, "attention_mask": mask}
        if self.compact:
            numbers = torch.cat([(~gone).long().cumsum(0) - 1, (~gone).sum() + torch.arange(total - len(gone))])
            new["position_embeddings"] = language_model(self.model).rotary_emb(args[0], numbers[None, -queries:])
        return args, new


@torch.no_grad()
def masked_answer(
    tiny: TinyVLM, native: Native, row: int, gone: Mapping[int, Tensor], forced: Tensor, compact: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits (n, V) of one prompt's real tokens, and (T, V) after each of `forced` (T,) tokens.

    gone: (L,) bool by layer, prompt columns that are dropped in front of it.
    """
    from transformers import DynamicCache

    model, lm, used = tiny.model, language_model(tiny.model), native.real[row]
    where = native.positions[:, row, used] if native.mrope else native.positions[row, used][None]
    cache = DynamicCache(config=model.config.get_text_config())
    call: dict[str, Any] = {
        "inputs_embeds": native.embeds[row][used][None],
        "position_ids": where[:, None] if native.mrope else where,
        **with_cache(cache),
        "use_cache": True,
    }
    if native.planes:
        call["visual_pos_masks"] = native.visual[row][used][None]
        call["deepstack_visual_embeds"] = [plane[row][used][native.visual[row][used]] for plane in native.planes]
    n = int(used.sum())
    present = torch.ones(n, dtype=torch.bool)
    mask = additive(visible(tiny.family, native.types[row][used], present), torch.float32)
    kinds = set(getattr(lm.config, "layer_types", None) or ())
    call["attention_mask"] = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
    with Masked(model, {at: g[used] for at, g in gone.items()}, compact) as masks:
        masks.total = n
        prompt = model.lm_head(lm(**call).last_hidden_state)[0]
        steps = []
        for step, token in enumerate(forced):
            masks.total = n + step + 1
            at = torch.full((1, 1), int(where[:, -1].max()) + 1 + step)
            zero = torch.zeros(1, 1, 1, n + step + 1)
            hidden = lm(
                inputs_embeds=model.get_input_embeddings()(token[None, None]),
                position_ids=at.expand(3, 1, 1) if native.mrope else at,
                attention_mask=dict.fromkeys(kinds, zero) if len(kinds) > 1 else zero,
                use_cache=True,
                **with_cache(cache),
            ).last_hidden_state
            steps.append(model.lm_head(hidden)[0, 0])
    return prompt, torch.stack(steps) if steps else prompt[:0]


@dataclass
class Run:
    """What a pruned model gave. logits: (B, L, V) of a forward, tokens (B, T) and steps (B, T, V) of generate()."""

    logits: Tensor
    tokens: Tensor
    steps: Tensor
    gone: dict[int, Tensor]
    """(B, L) bool by layer."""


def gone_by_layer(pruning: Any, real: Tensor) -> dict[int, Tensor]:
    """Prompt columns that were dropped, from the report of the run."""
    out = {}
    for drop in pruning.last.drops:
        left = torch.zeros(real.shape[0], real.shape[1] + 1, dtype=torch.bool)
        left.scatter_(1, drop.columns + 1, True)
        out[drop.layer] = real & ~left[:, 1:]
    return out


@torch.no_grad()
def run(tiny: TinyVLM, inputs: Any, pruning: Any, new: int = 7) -> Run:
    """One forward and one greedy generation of the pruned model."""
    logits = tiny.model(**inputs).logits
    out = tiny.model.generate(**inputs, max_new_tokens=new, return_dict_in_generate=True, output_logits=True)
    length = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    return Run(logits, out.sequences[:, length:], torch.stack(out.logits, 1), gone_by_layer(pruning, real))


def distance(tiny: TinyVLM, inputs: Any, got: Run, compact: bool = False) -> float:
    """How far a run is from the masked one: kept tokens of the forward, first logits of generate(), decode steps."""
    native = {through: observe(tiny, inputs, through) for through in ("forward", "generate")}
    far = 0.0
    for row in range(len(got.logits)):
        gone = {layer: g[row] for layer, g in got.gone.items()}
        left = native["forward"].real[row].clone()
        for g in gone.values():
            left &= ~g
        prompt, _ = masked_answer(tiny, native["forward"], row, gone, got.tokens[row, :0], compact)
        far = max(far, float((got.logits[row][left] - prompt[left[native["forward"].real[row]]]).abs().max()))
        prompt, steps = masked_answer(tiny, native["generate"], row, gone, got.tokens[row, :-1], compact)
        far = max(far, float((got.steps[row, 0] - prompt[-1]).abs().max()))
        far = max(far, float((got.steps[row, 1:] - steps).abs().max()))
    return far


def prompts(family: str) -> list[list[Part]]:
    """Three prompts of different lengths, the last of words alone."""
    return [*samples("image"), ["only words"]]
