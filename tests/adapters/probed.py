"""A tower with a probe, and the attention maps of its eager twin."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.adapters.families import EncoderCall
from tokprune.adapters.towers import tower_of
from tokprune.runtime.host import to_host
from tokprune.runtime.probe import AttentionProbe
from tokprune.runtime.signal_blocks import signal_probe
from tokprune.runtime.signals import BegunSignals, SignalSet
from tokprune.testing import TinyVLM, build, picture

TOLERANCE = 1e-6


@functools.cache
def tiny(family: str) -> TinyVLM:
    return build(family)


def hooks(module: nn.Module) -> dict[str, tuple[int, int]]:
    """How many hooks every part of a model has (transformers puts some of its own there)."""
    return {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in module.named_modules()}


def call(family: str, vlm: TinyVLM | None = None) -> tuple[Any, dict[str, Any]]:
    """A base model and the arguments of get_image_features for pictures of several sizes."""
    vlm = vlm or tiny(family)
    inputs = vlm.inputs([["a", ("image", picture(60, 40, 1)), "b", ("image", picture(40, 40, 2)), "c"]])
    base: Any = vlm.model.base_model
    names = ("pixel_values", "image_sizes", "image_grid_thw", "image_merge_sizes", "target_sizes", "batch_num_images")
    names += ("pixel_attention_mask", "image_token_pooling", "image_grids")
    return base, {name: inputs[name] for name in names if name in inputs}


@torch.no_grad()
def run(base: Any, kwargs: dict[str, Any], **more: Any) -> Any:
    return base.get_image_features(**kwargs, **more, return_dict=True)


def required_blocks(base: Any, needs: Sequence[str]) -> AttentionProbe:
    """A probe that listens to what `needs` can be computed from."""
    return signal_probe(base, needs).install()


def compute_signals(  # a call and what reads it, as a test has them at hand
    base: Any,
    modality: str,
    kwargs: dict[str, Any],
    output: Any,
    probe: AttentionProbe | None,
    needs: Sequence[str],
    scorer: object = None,
    encoder: Any = None,
) -> SignalSet:
    """The signals of one encoder call at once. probe: None where none has listened."""
    probe = signal_probe(base, needs) if probe is None else probe
    begun = BegunSignals(EncoderCall(base, modality, kwargs, output), probe, needs, scorer, encoder)
    return begun.finish(to_host(*begun.bounds))


def signals(base: Any, kwargs: dict[str, Any], *needs: str, **more: Any) -> SignalSet:
    with required_blocks(base, needs) as probe:
        output = run(base, kwargs)
        return compute_signals(base, "image", kwargs, output, probe, needs, **more)


def eager_maps(base: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """What `eager_attention_forward` of the tower's module hands back at every call, (B, H, n, n) in calling order."""
    tower: Any = tower_of(base)
    module, before, found = sys.modules[type(tower).__module__], tower.config._attn_implementation, []
    original = module.eager_attention_forward  # type: ignore[attr-defined]

    def listen(*args: Any, **more: Any) -> Any:
        result = original(*args, **more)
        found.append(result[1].detach())
        return result

    module.eager_attention_forward = listen  # type: ignore[attr-defined]
    tower.set_attn_implementation("eager")
    try:
        run(base, kwargs)
    finally:
        module.eager_attention_forward = original  # type: ignore[attr-defined]
        tower.set_attn_implementation(before)
    return found


def seen_by(base: Any, kwargs: dict[str, Any], blocks: list[int]) -> AttentionProbe:
    """A probe after a run under SDPA."""
    probe = AttentionProbe(tower_of(base), blocks).install()
    run(base, kwargs)
    return probe
