"""What a model with a decoder method must compute, worked out by masking.

The unpruned language model gets the whole prompt, one prompt at a time; from some layer on, masks of minus infinity
hide tokens from everybody else. Nothing is cut, gathered or shortened.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.adapters.reference import Native, additive, language_model, observe, recount, samples, used, visible
from tests.spelling import with_cache
from tokprune.testing import Part, TinyVLM, build

LAYERS = 5
_built = functools.lru_cache(None)(build)


def deep(family: str, attn: str = "sdpa", layers: int = LAYERS) -> TinyVLM:
    """One model per family and kernel, deep enough for several drops; tests leave it as they found it."""
    tiny = _built(family, layers=layers, attn=attn)
    touched.append(tiny.model)
    return tiny


touched: list[Any] = []
"""Models that the running test was given: conftest takes off what it may have left there."""


def prompts(family: str) -> list[list[Part]]:
    """Three prompts of different lengths, the last of words alone."""
    used.discard(family)
    return [*samples("image"), ["only words"]]


@dataclass
class Masked:
    """Hooks on an unpruned language model that hide keys from layers, and give them other positions."""

    model: Any
    gone: Mapping[int, Tensor]
    """(n,) bool by layer: tokens that nobody sees from this layer on."""
    positions: Mapping[int, Tensor]
    """(axes, n + T) by layer: where tokens stand from this layer on, if elsewhere; T decode steps included."""
    window: int | None = None
    """What layers with a sliding window see, the token itself included."""
    total: int = 0
    """Tokens so far, those of this call included."""

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

    def of(self, by_layer: Mapping[int, Tensor], layer: int) -> Tensor | None:
        """What holds in a layer."""
        return next((by_layer[at] for at in sorted(by_layer, reverse=True) if at <= layer), None)

    def _hide(self, layer: int, module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()  # (1, 1, q, k)
        queries, keys = mask.shape[-2:]
        assert keys == self.total
        key, query = torch.arange(keys), torch.arange(keys - queries, keys)[:, None]
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        gone = self.of(self.gone, layer)
        if gone is not None:
            hidden |= torch.nn.functional.pad(gone, (0, keys - len(gone)))
        if self.window is not None and getattr(module.self_attn, "sliding_window", None):
            hidden |= query - key >= self.window
        new = {**kwargs, "attention_mask": mask.masked_fill(hidden & (key != query), torch.finfo(mask.dtype).min)}
        where = self.of(self.positions, layer)
        if where is not None:
            at = where[:, self.total - queries : self.total]
            lm = language_model(self.model)
            rotary, kinds = lm.rotary_emb, getattr(lm.config, "layer_types", None)
            more = (kinds[layer],) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
            new["position_embeddings"] = rotary(args[0], at[:, None] if len(at) > 1 else at, *more)
        return args, new


@torch.no_grad()
def masked_answer(
    tiny: TinyVLM,
    native: Native,
    row: int,
    gone: Mapping[int, Tensor],
    forced: Tensor,
    compact: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (n, V) of one prompt's real tokens, and (T, V) after each of `forced` (T,) tokens.

    gone: (L,) bool by layer, prompt columns that are dropped in front of it. compact: positions are numbered anew.
    """
    from transformers import DynamicCache

    model, lm, real = tiny.model, language_model(tiny.model), native.real[row]
    where = native.positions[:, row, real] if native.mrope else native.positions[row, real][None]
    cache = DynamicCache()
    call: dict[str, Any] = {
        "inputs_embeds": native.embeds[row][real][None],
        "position_ids": where[:, None] if native.mrope else where,
        **with_cache(cache),
        "use_cache": True,
    }
    if native.planes:
        call["visual_pos_masks"] = native.visual[row][real][None]
        call["deepstack_visual_embeds"] = [plane[row][real][native.visual[row][real]] for plane in native.planes]
    n, steps = int(real.sum()), len(forced)
    mask = additive(visible(tiny.family, native.types[row][real], torch.ones(n, dtype=torch.bool)), torch.float32)
    kinds = set(getattr(lm.config, "layer_types", None) or ())
    moved = {at: renumbered(native, ~g, row, steps) for at, g in gone.items()} if compact else {}
    with Masked(model, {at: g[real] for at, g in gone.items()}, moved, window) as masks:
        masks.total = n
        call["attention_mask"] = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
        prompt = model.lm_head(lm(**call).last_hidden_state)[0]
        told = [prompt[:0]]
        for step, token in enumerate(forced):
            masks.total += 1
            at = torch.full((1, 1), int(where[:, -1].max()) + 1 + step)
            zero = torch.zeros(1, 1, 1, masks.total)
            hidden = lm(
                inputs_embeds=model.get_input_embeddings()(token[None, None]),
                position_ids=at.expand(3, 1, 1) if native.mrope else at,
                attention_mask=dict.fromkeys(kinds, zero) if len(kinds) > 1 else zero,
                use_cache=True,
                **with_cache(cache),
            ).last_hidden_state
            told.append(model.lm_head(hidden)[0])
    return prompt, torch.cat(told)


def renumbered(native: Native, left: Tensor, row: int, steps: int) -> Tensor:
    """(axes, n + steps): positions of one prompt's tokens without gaps, and of those behind it; left: (L,) bool."""
    keep = native.real & left
    kept, behind = recount(native, keep, row)
    out = torch.zeros(len(kept), int(native.real[row].sum()), dtype=torch.long)
    out[:, keep[row][native.real[row]]] = kept
    return torch.cat([out, (behind + torch.arange(steps)).expand(len(kept), -1)], 1)


@dataclass
class Run:
    """What a pruned model gave for a prompt."""

    logits: Tensor
    """(B, L, V) of a forward."""
    dropped: dict[int, Tensor]
    """(B, L) bool by layer: prompt columns that were dropped in it."""
    tokens: Tensor
    """(B, T) of generate()."""
    steps: Tensor
    """(B, T, V)."""
    gone: dict[int, Tensor]
    """As `dropped`, in generate(), which may number positions otherwise."""


def gone_by_layer(pruning: Any, real: Tensor) -> dict[int, Tensor]:
    """(B, L) bool: prompt columns that were dropped, from the record of the run."""
    out = {}
    for drop in pruning.last.drops:
        left = torch.zeros(real.shape[0], real.shape[1] + 1, dtype=torch.bool)
        left.scatter_(1, drop.columns + 1, True)
        out[drop.layer] = real & ~left[:, 1:]
    return out


@torch.no_grad()
def run(tiny: TinyVLM, inputs: Any, pruning: Any, new: int = 7) -> Run:
    """One forward and one greedy generation of the pruned model."""
    real = inputs["attention_mask"].bool()
    logits = tiny.model(**inputs).logits
    dropped = gone_by_layer(pruning, real)
    out = tiny.model.generate(**inputs, max_new_tokens=new, return_dict_in_generate=True, output_logits=True)
    tokens = out.sequences[:, real.shape[1] :]
    return Run(logits, dropped, tokens, torch.stack(out.logits, 1), gone_by_layer(pruning, real))


def distance(tiny: TinyVLM, inputs: Any, got: Run, compact: bool = False, window: int | None = None) -> float:
    """How far a run is from the masked one: kept tokens of the forward, first logits of generate(), decode steps."""
    forward, generate = observe(tiny, inputs, "forward"), observe(tiny, inputs)
    far = 0.0
    for row, logits in enumerate(got.logits):
        gone = {layer: g[row] for layer, g in got.dropped.items()}
        left = forward.real[row] & ~torch.stack([*gone.values(), ~forward.real[row]]).any(0)
        prompt, _ = masked_answer(tiny, forward, row, gone, got.tokens[row, :0], compact, window)
        far = max(far, float((logits[left] - prompt[left[forward.real[row]]]).abs().max()))
        gone = {layer: g[row] for layer, g in got.gone.items()}
        prompt, steps = masked_answer(tiny, generate, row, gone, got.tokens[row, :-1], compact, window)
        far = max(far, float((got.steps[row] - torch.cat([prompt[-1:], steps])).abs().max()))
    return far
