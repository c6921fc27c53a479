"""Made-up visual token streams to try methods on: every kind of layout, every signal, a question."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.tokens import Layout, Query, VisualTokens

WIDTH, ENCODER_WIDTH, CLIP_WIDTH, HEADS, HEAD_WIDTH = 16, 12, 10, 2, 6

PER_TOKEN = re.compile(
    r"(cls_attention|cls_attention_1head|received_attention|value_attention|llm_attention)(:-?[\d.]+)?$"
)
REAL = re.compile(r"(cls_logits|value_norm|llm_logits):-?[\d.]+$")
KEYS = re.compile(r"keys:-?[\d.]+$")


def unpadded_tiles() -> Layout:
    """A thumbnail and 2 x 2 tiles of 4 x 4 tokens; unpadding cut the uppermost and lowermost row of the canvas away."""
    full = Layout.grid(4, 4, 5, "tiles", canvas=(2, 2), thumbnail=True)
    upper, lower = (full.group == 1) | (full.group == 2), full.group > 2
    stay = ~((upper & (full.row == 0)) | (lower & (full.row == 3)))
    return replace(full, group=full.group[stay], row=full.row[stay], col=full.col[stay])


LAYOUTS = {
    "one": Layout.grid(1, 1),
    "two": Layout.grid(1, 2),
    "seven": Layout.line(7),
    "image": Layout.grid(8, 8),
    "wide": Layout.grid(3, 11),
    "tiles": Layout.grid(4, 4, 3, "tiles", canvas=(1, 2), thumbnail=True),
    "unpadded": unpadded_tiles(),
    "video": Layout.grid(3, 4, 5, "video", timestamps=(0.0, 1.0, 2.0, 3.0, 4.0)),
    "large": Layout.line(577),
}


def question(dtype: torch.dtype = torch.float32, seed: int = 99) -> Query:
    """A question of five words with a scorer's embedding of two segments."""
    generator = torch.Generator().manual_seed(seed)
    return Query(
        "what is the colour of the car?",
        torch.randn(5, WIDTH, generator=generator).to(dtype),
        torch.randn(2, CLIP_WIDTH, generator=generator).to(dtype),
    )


def signals(needs: Iterable[str], layout: Layout, generator: torch.Generator) -> dict[str, Tensor]:
    """Every signal that is asked for, with its right shape; a name that nobody defines is an error of the method."""
    n = layout.group.shape[0]
    out: dict[str, Tensor] = {}
    for name in needs:
        if PER_TOKEN.match(name):
            out[name] = (2 * torch.randn(n + 1, generator=generator)).softmax(0)[1:].clone()
        elif REAL.match(name):
            out[name] = torch.randn(n, generator=generator) + (4 if name.startswith("value_norm") else 0)
        elif KEYS.match(name):
            out[name] = torch.randn(n, HEADS, HEAD_WIDTH, generator=generator)
        elif name.startswith("llm_question:"):
            out[name] = (2 * torch.randn(n + 1, HEADS, generator=generator)).softmax(0)[1:].clone()
        elif name == "encoder_features":
            out[name] = torch.randn(n, ENCODER_WIDTH, generator=generator)
        elif name == "clip_image":
            out[name] = torch.randn(n, CLIP_WIDTH, generator=generator)
        elif name == "frame_scores":
            out[name] = torch.rand(layout.num_groups, generator=generator)
        elif name != "clip_text":
            raise OptionError(f"needs names the signal {name!r}, which is not one of docs/extending.md.")
    return out


def stream(layout: Layout, needs: Iterable[str] = (), seed: int = 0, query: bool = True) -> VisualTokens:
    """A random stream with the signals that a method needs."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(layout.group.shape[0], WIDTH, generator=generator)
    return VisualTokens(features, layout, signals(needs, layout, generator), question() if query else None)


def changed(tokens: VisualTokens, change: Callable[[Tensor], Tensor]) -> VisualTokens:
    """The stream with `change` applied to the features, and to each signal and query tensor that has their kind."""
    query = tokens.query
    if query is not None and query.embeddings is not None and query.clip is not None:
        query = replace(query, embeddings=change(query.embeddings), clip=change(query.clip))
    return replace(
        tokens,
        features=change(tokens.features),
        signals={name: change(value) for name, value in tokens.signals.items()},
        query=query,
    )
