"""A prompt in front of one decoder layer, made up for the tests of methods: attention from given queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.methods.streams import signals
from tokprune.methods.decoder_base import DecoderMethod, Heads, LayerTokens
from tokprune.tokens import Layout, Selection

WIDTH, HEADS, KEY_HEADS, HEAD_WIDTH = 16, 4, 2, 6


@dataclass(frozen=True)
class Dense:
    """Attention of one layer, written out: q (H, n, d), k and v (H', n, d), a causal mask, no rotation."""

    q: Tensor
    keys: Tensor
    values: Tensor

    @property
    def plain_keys(self) -> Tensor:
        return self.keys

    def _products(self, queries: Tensor) -> Tensor:
        k = self.keys.repeat_interleave(len(self.q) // len(self.keys), 0)
        return self.q[:, queries].float() @ k.float().transpose(1, 2) / self.q.shape[-1] ** 0.5  # (H, R, n)

    @staticmethod
    def _heads(x: Tensor, heads: Heads) -> Tensor:
        return {"mean": x.mean(0), "max": x.amax(0), "each": x}[heads]

    def weights(self, queries: Tensor, heads: Heads = "mean", rotary: bool = True) -> Tensor:
        hidden = torch.arange(self.q.shape[1]) > queries[:, None]
        return self._heads(self._products(queries).masked_fill(hidden, -torch.inf).softmax(-1), heads)

    def logits(self, queries: Tensor, heads: Heads = "mean") -> Tensor:
        return self._heads(self._products(queries), heads)

    def gravity(self, queries: Tensor) -> Tensor:
        away = (queries[:, None] - torch.arange(self.q.shape[1])).abs()
        return 2.5 * torch.cos(away / 90)

    def sums(self, queries: Tensor, heads: Heads = "mean", logits: bool = False) -> Tensor:
        return (self.logits(queries, heads) if logits else self.weights(queries, heads)).sum(0)


@dataclass(frozen=True)
class Rows:
    """Attention of which only the rows of the last `len(rows)` tokens are given: (H, R, n)."""

    rows: Tensor
    others: Tensor | None = None  # (H, V, n), rows of the tokens at `at`
    at: int = 0

    def weights(self, queries: Tensor, heads: Heads = "mean", rotary: bool = True) -> Tensor:
        first = self.rows.shape[2] - self.rows.shape[1]
        text = bool((queries >= first).all())
        found = self.rows[:, queries - first] if text else self.others[:, queries - self.at]  # type: ignore[index]
        return Dense._heads(found, heads)

    def logits(self, queries: Tensor, heads: Heads = "mean") -> Tensor:
        return self.weights(queries, heads)

    def gravity(self, queries: Tensor) -> Tensor:
        return torch.ones(len(queries), self.rows.shape[2])

    def sums(self, queries: Tensor, heads: Heads = "mean", logits: bool = False) -> Tensor:
        return self.weights(queries, heads).sum(0)


def attention(n: int, generator: torch.Generator) -> Dense:
    """Random queries, keys and values."""
    q = torch.randn(HEADS, n, HEAD_WIDTH, generator=generator)
    return Dense(q, *torch.randn(2, KEY_HEADS, n, HEAD_WIDTH, generator=generator))


def layer_tokens(
    grids: Sequence[tuple[int, int]] = ((6, 8),),
    needs: Sequence[str] = (),
    seed: int = 0,
    before: int = 5,
    text: int = 7,
) -> LayerTokens:
    """A prompt of `before` words, then pictures of these grids with two words between them, then `text` words."""
    generator = torch.Generator().manual_seed(seed)
    layouts = [Layout.grid(h, w) for h, w in grids]
    sizes = [len(layout.row) for layout in layouts]
    starts = [before + sum(sizes[:i]) + 2 * i for i in range(len(sizes))]
    n = before + sum(sizes) + 2 * max(0, len(sizes) - 1) + text
    states = torch.randn(5, n, WIDTH, generator=generator)
    made = [signals(needs, layout, generator) for layout in layouts]
    empty = torch.empty(0, dtype=torch.long)
    return LayerTokens(
        layer=3,
        hidden=states[0],
        columns=torch.arange(n),
        visual=torch.cat([empty, *(torch.arange(s, s + size) for s, size in zip(starts, sizes, strict=True))]),
        picture=torch.cat([empty, *(torch.full((size,), i) for i, size in enumerate(sizes))]),
        row=torch.cat([empty, *(layout.row for layout in layouts)]),
        col=torch.cat([empty, *(layout.col for layout in layouts)]),
        total=sum(sizes),
        below=attention(n, generator),
        own=attention(n, generator),
        signals={name: torch.cat([m[name] for m in made]) for name in needs} if made else {},
        embeddings=states[1],
        entering=states[2],
        middle=states[3],
        normed=states[4],
    )


def given(hidden: Tensor, start: int, count: int, below: object, **more: object) -> LayerTokens:
    """A prompt whose candidates are the tokens `start` ... `start + count - 1`, in one row. hidden: (n, D)."""
    place = torch.arange(count)
    return LayerTokens(
        layer=1,
        hidden=hidden,
        columns=torch.arange(len(hidden)),
        visual=place + start,
        picture=torch.zeros_like(place),
        row=torch.zeros_like(place),
        col=place,
        total=count,
        below=below,  # type: ignore[arg-type]
        own=below,  # type: ignore[arg-type]
        **more,  # type: ignore[arg-type]
    )


def after(tokens: LayerTokens, chosen: Selection, seed: int) -> LayerTokens:
    """The prompt in front of a later layer: what was chosen is left, states and attention are others."""
    n, v = len(tokens.columns), len(tokens.visual)
    stays = torch.ones(n, dtype=torch.bool)
    stays[tokens.visual] = False
    stays[tokens.visual[chosen.indices]] = True
    old = stays.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    states = {
        name: None if getattr(tokens, name) is None else torch.randn(len(old), WIDTH, generator=generator)
        for name in ("hidden", "entering", "middle", "normed")
    }
    assert v >= len(chosen)
    return replace(
        tokens,
        layer=tokens.layer + 1,
        columns=tokens.columns[old],
        visual=torch.searchsorted(old, tokens.visual[chosen.indices]),
        picture=tokens.picture[chosen.indices],
        row=tokens.row[chosen.indices],
        col=tokens.col[chosen.indices],
        below=attention(len(old), generator),
        own=attention(len(old), generator),
        signals={name: value[chosen.indices] for name, value in tokens.signals.items()},
        embeddings=None if tokens.embeddings is None else tokens.embeddings[old],
        **states,  # type: ignore[arg-type]
    )


def fresh(tokens: LayerTokens, **changes: object) -> LayerTokens:
    """The same prompt with empty notes."""
    return replace(tokens, notes={}, **changes)  # type: ignore[arg-type]


def steps(method: DecoderMethod, tokens: LayerTokens, counts: Sequence[int]) -> list[tuple[LayerTokens, Selection]]:
    """What a method is shown and chooses at each of its layers."""
    out = []
    for i, keep in enumerate(counts):
        if not len(tokens.visual):  # nothing left to ask about
            break
        chosen = method.select(tokens, min(keep, len(tokens.visual)))
        out.append((tokens, chosen))
        tokens = after(tokens, chosen, 100 + i)
    return out
