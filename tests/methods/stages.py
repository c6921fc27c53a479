"""One decision of a method of any stage but the connector's, on made-up input of some size, as tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.methods.decoder.layers import Dense, layer_tokens
from tests.methods.frames.clips import video
from tokprune.errors import OptionError
from tokprune.methods.cache_base import CacheMethod, CompactMethod, LayerCache
from tokprune.methods.decoder_base import DecoderMethod, Heads
from tokprune.methods.encoder.dynamicvit import Predictor, save_predictors
from tokprune.methods.encoder_base import BlockView, Cut, EncoderMethod, Entrance
from tokprune.methods.frames_base import FramesMethod
from tokprune.methods.pixels_base import PixelMethod, PixelUnits
from tokprune.registry import get_method
from tokprune.tokens import Selection

Decision = Callable[[], list[Tensor]]
WIDTH, HEAD_WIDTH, DEPTH, SIDE = 16, 8, 12, 4


@dataclass(frozen=True)
class Blocked(Dense):
    """Attention whose sums are made from a few rows at a time, as those of a real layer are."""

    def sums(self, queries: Tensor, heads: Heads = "mean", logits: bool = False) -> Tensor:
        rows = self.logits if logits else self.weights
        total = torch.zeros(())
        for some in queries.split(16):
            total = total + rows(some, heads).sum(-2)
        return total


@cache
def predictors() -> str:
    """A file of untrained predictors of "dynamicvit"."""
    path = Path(tempfile.mkdtemp()) / "predictors.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_predictors([Predictor(WIDTH) for _ in range(3)], path)
    return str(path)


def encoder(name: str, side: int, cls: bool = True) -> Decision:
    """In a block of a tower: what goes on of side x side patches, and what comes back."""
    generator = torch.Generator().manual_seed(0)
    n = side * side
    x = torch.randn(1, cls + n, WIDTH, generator=generator)
    made = torch.randn(3, 1, 2, cls + n, HEAD_WIDTH, generator=generator)
    mix = 3 * torch.randn(WIDTH, 5, generator=generator)
    options: dict[str, dict[str, Any]] = {
        "dtop": {"heads": {3: lambda patches: (patches @ mix).softmax(-1)}},
        "dynamicvit": {"weights": predictors()},
    }
    method = get_method(name, **options.get(name, {}))
    assert isinstance(method, EncoderMethod)
    target: int | None = 3 * n // 4
    try:
        method.check(DEPTH, True)
    except OptionError:  # its own options say how many
        target = None
    index = next((i for i in range(DEPTH) if method.active(i, DEPTH)), 0)
    view = BlockView(
        x, index, DEPTH, int(cls), n, lambda: (made[0], made[1], made[2]), 0.3, target, hidden_prefix=int(cls), cls=cls,
        blocks=DEPTH, entering=x * torch.rand(1, cls + n, 1, generator=generator),
        entrance=Entrance(
            255 * torch.rand(1, 3, SIDE * side, SIDE * side, generator=generator).round(decimals=1), (side, side),
            lambda level: torch.zeros(1, side >> level, side >> level, WIDTH),
        ),
    )  # fmt: skip

    def decide() -> list[Tensor]:
        view._made = None
        found = method.reduce(view)
        assert found is not None
        back = [method.rebuild(Cut(x, found), found.x)] if method.restores else []
        return [found.x, found.rep, found.assign, found.size, *back]

    return decide


def decoder(name: str, side: int) -> Decision:
    """In front of a layer of an LLM: which of side x side tokens stay."""
    method = get_method(name)
    assert isinstance(method, DecoderMethod)
    tokens = layer_tokens([(side, side)], method.needs, seed=1)
    below, own = (Blocked(a.q, a.keys, a.values) for a in (tokens.below, tokens.own))  # type: ignore[attr-defined]

    def decide() -> list[Tensor]:
        shown = replace(tokens, below=below, own=own, notes={})
        found: Selection = method.select(shown, side * side // 8)
        return [found.indices, found.apply(tokens.hidden[tokens.visual])]

    return decide


def cached(name: str, side: int) -> Decision:
    """Behind the prefill of a layer, or in a decode step: which of the keys of side x side tokens stay."""
    method, n = get_method(name), side * side
    generator = torch.Generator().manual_seed(0)
    of_layer = Blocked(*(torch.randn(heads, n + 12, 6, generator=generator) for heads in (4, 2, 2)))
    paid = torch.rand(2, 1, n, generator=generator)

    def decide() -> list[Tensor]:
        if isinstance(method, CacheMethod):
            keep = torch.tensor([n // 8])
            step = method.step(paid[0], keep, n // 8, None)
            return [step.indices, method.step(paid[1], keep, n // 8, step).indices]
        assert isinstance(method, CompactMethod)
        if method.follows:  # what a decoder method dropped
            return []
        visual = torch.arange(n) + 5
        found = method.compact(
            LayerCache(3, of_layer.keys[:, visual], of_layer.values[:, visual], of_layer, visual, n + 12), n // 8
        )
        return [x for x in (found.indices, found.keys, found.values) if x is not None]

    return decide


def frames(name: str, side: int) -> Decision:
    """The shares of side x side frames."""
    method, tokens = get_method(name), video(side * side, (2, 2))
    assert isinstance(method, FramesMethod)
    return lambda: [torch.tensor(method.fit(method.allocate(tokens, len(tokens) // 8), tokens))]


def pixels(name: str, side: int) -> Decision:
    """Which of side x side units, in two temporal patches, are encoded."""
    method = get_method(name)
    assert isinstance(method, PixelMethod)
    values = torch.rand(1, side * side, 1, 3, WIDTH, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    units = PixelUnits(values, (2, side // 2, side))
    return lambda: [method.choose(units, [side * side // 8]).kept, method.choose(units).kept]


STAGES: dict[str, Callable[[str, int], Decision]] = {
    "encoder": encoder,
    "decoder": decoder,
    "cache": cached,
    "frames": frames,
    "pixels": pixels,
}
