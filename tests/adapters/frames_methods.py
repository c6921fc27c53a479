"""Frames methods for tests: budgets that are known by hand, and budgets by whatever `frame_scores` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import tokprune
from tokprune.budget import share
from tokprune.methods.frames_base import FramesMethod, ScoredFrames, ScoreOptions
from tokprune.registry import MethodInfo
from tokprune.tokens import VisualTokens


@dataclass(frozen=True)
class Rising(FramesMethod):
    """Frame i gets a share in proportion to i, so the first gets none."""

    info = MethodInfo("rising", "for tests", video=True)

    def allocate(self, tokens: VisualTokens, keep: int) -> list[int]:
        sizes = tokens.layout.group_sizes
        return share(keep, [float(i) + 1e-9 for i in range(len(sizes))], list(sizes))


@dataclass(frozen=True)
class ByScore(ScoredFrames):
    """Budgets in proportion to exp(score)."""

    info = MethodInfo("by_score", "for tests", video=True, query_aware=True)

    source: Literal["clip", "self"] = "clip"
    normalize: Literal["pair", "vocab"] = "pair"
    entities: tuple[str, ...] | None = None
    decouple: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("frame_scores",)

    @property
    def score_options(self) -> ScoreOptions:
        return ScoreOptions(
            self.source,
            self.normalize,
            self.decouple,
            self.entities,
            "Is any of {entities} there? A. yes B. no",
            "{question} Does this picture tell? A. yes B. no",
        )

    def frame_worth(self, tokens: VisualTokens) -> Tensor:
        scores = tokens.signal("frame_scores")
        assert scores.shape == (tokens.layout.num_groups,)
        return scores.float().nan_to_num(0.0)

    def allocate_by(self, worth: Tensor, tokens: VisualTokens, keep: int) -> list[int]:
        return share(keep, torch.exp(worth).tolist(), list(tokens.layout.group_sizes))


class Brightness:
    """A scorer of pictures: a bright one is near to the text "bright", a dark one to all others. Angles, so cosines are
    exact."""

    logit_scale = 4.0
    logit_bias = 0.5

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.pictures = 0

    def embed_text(self, texts: list[str]) -> Tensor:
        self.texts += texts
        return torch.tensor([[1.0, 0.0] if "bright" in t else [0.0, 1.0] for t in texts])

    def embed_picture(self, pixels: Tensor) -> Tensor:
        assert pixels.dim() == 4
        assert pixels.shape[1] == 3
        self.pictures += len(pixels)
        angle = pixels.float().mean((1, 2, 3)).sigmoid() * (torch.pi / 2)
        return torch.stack([angle.sin(), angle.cos()], -1)


QUICK = ("llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "video_llama_3")


def quick(family: str, *values: Any) -> Any:
    """A case, slow for all but one family of each kind."""
    return pytest.param(family, *values, marks=[] if family in QUICK else [pytest.mark.slow])


def lit(levels: list[int], side: int = 48) -> np.ndarray[Any, Any]:
    """A clip whose frame i is as bright as levels[i], with some structure."""
    noise = np.random.default_rng(0).integers(0, 8, (len(levels), side, side, 3))
    return (noise + np.array(levels)[:, None, None, None]).astype(np.uint8)


class Watch(Brightness):
    """Remembers what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def embed_picture(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixels)
        return super().embed_picture(pixels)


def scores_of(tiny: Any, inputs: Any, method: ByScore, **options: Any) -> tuple[list[torch.Tensor], Any]:
    """The signal of every video of one forward, and the report."""
    out: list[torch.Tensor] = []

    class Listen(ByScore):
        def frame_worth(self, tokens: Any) -> torch.Tensor:
            out.append(tokens.signal("frame_scores"))
            return super().frame_worth(tokens)

    listening = Listen(method.source, method.normalize, method.entities, method.decouple)
    options = {"query": "bright?", "processor": tiny.processor, "ratio": 0.5, **options}
    with tokprune.apply(tiny.model, listening, **options) as pruning, torch.no_grad():
        tiny.model(**inputs)
        return out, pruning.report()
