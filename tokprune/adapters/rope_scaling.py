"""Longer sequences than a language model was trained on, without training: NTK-aware scaling of its rotary
embedding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.base import get_adapter
from tokprune.errors import OptionError, UnsupportedModelError

LEFT_ALONE = "original_inv_freq"  # a second copy that some rope types keep


def scaled_frequencies(frequencies: Tensor, factor: float) -> Tensor:
    """The frequencies b^(-2i/d) of a rotary embedding with its base b raised to b * factor^(d / (d - 2)).

    frequencies: (d / 2,), the highest first. The highest stays, the lowest is divided by `factor`, those between by a
    power of it. In float32 at least; the dtype stays.
    """
    half = frequencies.shape[0]
    wide = frequencies if frequencies.dtype == torch.float64 else frequencies.float()
    power = torch.arange(half, device=wide.device, dtype=wide.dtype) / (half - 1)  # 2i / (d - 2)
    return (wide * factor**-power).to(frequencies.dtype)


def _buffers(text_model: Any, name: str) -> list[tuple[Any, str]]:
    """Rotary modules of a text model and the names of their frequencies, or the error that says why they cannot be
    scaled.
    """
    tables = []
    for module in text_model.modules():
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        kinds = getattr(module, "rope_type", "default")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind != "default":
                raise UnsupportedModelError(
                    f"{name} scales its rotary embedding already (rope_type {kind!r}); a second scaling on top has no "
                    "meaning."
                )
        names = [n for n, _ in module.named_buffers(recurse=False) if n.endswith("inv_freq") and LEFT_ALONE not in n]
        tables += [(module, n) for n in names if getattr(module, n).shape[0] > 1]
    if not tables:
        raise UnsupportedModelError(
            f"{name} has no rotary embedding in its language model, so there is nothing to scale."
        )
    return tables


@contextlib.contextmanager
def longer_context(model: Any, factor: float) -> Iterator[None]:
    """Inside the with block the language model of a VLM sees positions as if `factor` times as many fitted its
    training.

    The base b of the rotary embedding becomes b * factor^(d / (d - 2)) (NTK-aware scaling), as INTP-Video-LLM does to
    feed more frames than a model was trained on (arXiv 2409.12963). factor: length wanted over length trained on, at
    least 1. Leaving the block puts the very same tensors back. Keys in a cache carry the rotation that they were made
    with: begin and end an answer on the same side. The tower is not touched; INTP's rearrangement of tokens is for
    towers that take clips of a fixed length, which none of the supported models has.

    Raises OptionError for a factor below 1, UnsupportedModelError for models that scale already or have no rotary
    embedding.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 1:
        raise OptionError(
            f"factor={factor!r} is not the length wanted over the length trained on: a number of at least 1, such as 2."
        )
    adapter = get_adapter(model)
    buffers = _buffers(adapter.text_model, type(adapter.model).__name__)
    before = [getattr(module, name) for module, name in buffers]
    try:
        for (module, name), frequencies in zip(buffers, before, strict=True):
            module._buffers[name] = scaled_frequencies(frequencies, float(factor))
        yield
    finally:
        for (module, name), frequencies in zip(buffers, before, strict=True):
            module._buffers[name] = frequencies
