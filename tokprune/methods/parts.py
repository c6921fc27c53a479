"""Streams taken apart for a connector method that sees one part at a time, and its answers put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokprune.methods.base import ConnectorMethod
from tokprune.ops.joining import join
from tokprune.tokens import Selection, VisualTokens


class Parts:
    """The parts of all streams of a call: those a method is asked about, all at once, and those that stay whole."""

    def __init__(self) -> None:
        self.streams: list[VisualTokens] = []
        self.pieces: list[
            list[tuple[slice, int]]
        ] = []  # per stream: where a part lies, its number in `parts`, or -1: stays
        self.parts: list[VisualTokens] = []
        self.asked: list[int] = []

    def frames(self, tokens: VisualTokens, counts: Sequence[int], ask_all: bool) -> None:
        """A video: its frames that keep anything."""
        self.streams.append(tokens)
        self.pieces.append([])
        for where, count in zip(tokens.layout.group_slices(), counts, strict=True):
            if count > 0:
                stays = count == where.stop - where.start and not ask_all
                self._add(where, None if stays else tokens.part(where), count)

    def whole(self, tokens: VisualTokens, keep: int, ask_all: bool) -> None:
        """A stream that is not a video, in one piece."""
        self.streams.append(tokens)
        self.pieces.append([])
        stays = keep == len(tokens) and not ask_all
        self._add(slice(0, len(tokens)), None if stays else tokens, keep)

    def _add(self, where: slice, part: VisualTokens | None, count: int) -> None:
        self.pieces[-1].append((where, -1 if part is None else len(self.parts)))
        if part is not None:
            self.parts.append(part)
            self.asked.append(count)

    def run(self, method: ConnectorMethod) -> list[Selection]:
        """Ask the method once, and put each stream's parts together."""
        chosen = method.select_batch(self.parts, self.asked) if self.parts else []
        out = []
        for tokens, pieces in zip(self.streams, self.pieces, strict=True):
            device = tokens.features.device
            found = [
                (torch.arange(s.start, s.stop, device=device), chosen[i] if i >= 0 else _all(s.stop - s.start, device))
                for s, i in pieces
            ]
            single = len(found) == 1 and len(found[0][0]) == len(tokens)
            out.append(found[0][1] if single else join(found, tokens.features))
        return out


def _all(n: int, device: torch.device) -> Selection:
    return Selection(torch.arange(n, device=device))
