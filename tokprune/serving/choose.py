"""The choice itself: the method on all pictures or clips of an engine step in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokprune.adapters.families.base import StreamLayout
from tokprune.errors import TokpruneError
from tokprune.serving.settings import ServingSettings
from tokprune.tokens import VisualTokens


@dataclass(frozen=True)
class Stream:
    """One picture or clip as the encoder gave it."""

    features: Tensor
    """(R, W) all rows, separators included; the first columns are what the LLM receives, DeepStack planes follow."""
    geometry: StreamLayout
    """Where the rows lie."""
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    """(N, ...) for the candidates."""


@dataclass(frozen=True)
class Kept:
    """What stays of a stream."""

    features: Tensor
    """(K + S, W)"""
    rows: Tensor
    """(K + S,) ascending numbers of the rows whose places they take."""


def choose(settings: ServingSettings, streams: Sequence[Stream], width: int) -> list[Kept | None]:
    """What stays of each stream, None where all does.

    Separators all stay, for their number must not depend on the choice. width: columns that the method sees.
    """
    method = settings.method
    out: list[Kept | None] = [None] * len(streams)
    counts = [settings.config.count(len(stream.geometry.rows)) for stream in streams]
    active = [i for i, stream in enumerate(streams) if counts[i] < len(stream.geometry.rows)]
    if not active:
        return out
    tokens = []
    for stream in (streams[i] for i in active):
        rows = stream.geometry.rows.to(stream.features.device)
        layout = stream.geometry.layout.to(rows.device)
        tokens.append(VisualTokens(stream.features[rows, :width], layout, stream.signals))
    selections = method.select_batch(tokens, [counts[i] for i in active])
    for i, selection in zip(active, selections, strict=True):
        if len(selection) != counts[i]:
            raise TokpruneError(f"{method.info.name!r} kept {len(selection)} tokens where {counts[i]} were asked for.")
        stream, geometry = streams[i], streams[i].geometry
        candidates = geometry.rows.to(stream.features.device)
        separators = geometry.separators.to(candidates)
        if selection.features is not None and stream.features.shape[1] != width:
            raise TokpruneError(f"{method.info.name!r} makes tokens of its own, which DeepStack planes cannot follow.")
        chosen = selection.apply(stream.features[candidates])  # (K, W)
        rows = torch.cat([candidates[selection.indices.to(candidates.device)], separators])
        order = rows.argsort()
        out[i] = Kept(torch.cat([chosen, stream.features[separators]])[order], rows[order])
    return out
