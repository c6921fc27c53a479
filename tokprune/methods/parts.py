"""Streams taken apart for a connector method that sees one part at a time, and its answers put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokprune.methods.base import ConnectorMethod
from tokprune.ops.merge import join
from tokprune.tokens import Selection, VisualTokens


def select_in_parts(
    method: ConnectorMethod,
    batch: Sequence[VisualTokens],
    parts: Sequence[Sequence[tuple[slice, int]]],
    ask_full: bool = True,
) -> list[Selection]:
    """Let `method` choose within each part of each stream, all parts of all streams in one call.

    parts: for each stream, where its parts lie, ascending, and the keep count of each; a part that keeps 0 drops out.
    ask_full: ask also about parts that keep all their tokens, which otherwise stay as they are. Returns one selection
    per stream, in the stream's own positions.
    """
    asked: list[VisualTokens] = []
    keeps: list[int] = []
    pieces: list[list[tuple[slice, int]]] = []  # per stream: a part and its number in `asked`, -1: it stays as it is
    for tokens, own in zip(batch, parts, strict=True):
        pieces.append([])
        for where, keep in own:
            size = where.stop - where.start
            if keep == 0:
                continue
            stays = keep == size and not ask_full
            pieces[-1].append((where, -1 if stays else len(asked)))
            if not stays:
                asked.append(tokens if size == len(tokens) else tokens.part(where))
                keeps.append(keep)
    chosen = method.select_batch(asked, keeps) if asked else []
    return [_joined(tokens, own, chosen) for tokens, own in zip(batch, pieces, strict=True)]


def _joined(tokens: VisualTokens, pieces: Sequence[tuple[slice, int]], chosen: Sequence[Selection]) -> Selection:
    """The answers about one stream's parts as one selection of the stream."""
    device = tokens.features.device
    found = []
    for where, number in pieces:
        place = torch.arange(where.start, where.stop, device=device)
        found.append((place, chosen[number] if number >= 0 else Selection(place - where.start)))
    single = len(found) == 1 and len(found[0][0]) == len(tokens)
    return found[0][1] if single else join(found, tokens.features)
