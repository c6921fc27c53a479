"""Relevance: what the question is about, mixed into a method that looks at the picture alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.errors import MissingQueryError, OptionError
from tokprune.methods.base import ConnectorMethod, ScoreMethod, Wrapper, check_finite, check_keep
from tokprune.methods.connector.divprune import DivPrune
from tokprune.methods.connector.wrappers.base import wrapped
from tokprune.methods.options import option
from tokprune.methods.question import CLIP_SIGNALS, text_relevance, word_embeddings
from tokprune.ops.numeric import wide
from tokprune.ops.select import greedy_farthest
from tokprune.registry import register_method
from tokprune.tokens import Selection, VisualTokens


def spread(values: Tensor) -> Tensor:
    """Values stretched to 0 … 1; all 1 if they are all equal. values: (N,) -> (N,)."""
    low, high = values.min(), values.max()
    return torch.where(high > low, (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny), 1.0)


@register_method(
    "relevance",
    paper="wrapper: conditional diversity (CDPruner, arXiv 2506.10967, section 3.2) for max-min and score methods",
    year=2025,
    url="https://arxiv.org/abs/2506.10967",
    complexity="the method's + O(NTD)",
    memory="the method's + O(ND)",
    query_aware=True,
    wrapper=True,
)
@dataclass(frozen=True)
class Relevance(Wrapper):
    """Mix relevance to the question into a method whose maths has a place for it.

    Methods that score tokens: (1 - weight) * score + weight * relevance, both stretched to 0 … 1 over the stream.
    DivPrune: each step maximises g * (distance to the nearest chosen token), g = (1 - weight) + weight * relevance.
    weight: 0 is the method alone; 1 is relevance alone, or for DivPrune its full product with the distance.

    source="embeddings": mean cosine between the token and the question's words in the LLM's embedding space.
    source="clip": between the scorer's patch and text embeddings. sign=-1 turns it round, as CDPruner does for CLIP,
    whose patches and texts are anti-correlated.

    Everything else is refused: merging, coverage and clustering methods have no score per token into which relevance
    could be mixed. Wrap the inside of a wrapper: PerTile(Relevance(DivPrune())).
    """

    method: ConnectorMethod = wrapped()
    weight: float = option(0.5, low=0, high=1, hint="0 is the method alone, 1 relevance alone.")
    source: Literal["embeddings", "clip"] = "embeddings"
    sign: Literal[1, -1] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.method, ScoreMethod | DivPrune):
            hint = (
                " Wrap its inside instead: PerTile(Relevance(DivPrune()))." if isinstance(self.method, Wrapper) else ""
            )
            raise OptionError(
                f"relevance cannot be mixed into {type(self.method).__name__}: it neither scores tokens one by one "
                f"nor is it DivPrune, so there is no place for it in its maths.{hint}"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """What the method needs, and for source="clip" the scorer's embeddings."""
        own = CLIP_SIGNALS if self.source == "clip" else ()
        return tuple(dict.fromkeys([*self.method.needs, *own]))

    @property
    def query_aware(self) -> bool:
        """Always."""
        return True

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """Relevance of each token to the question, 0 … 1. Returns (N,) in float32."""
        query = tokens.question()
        words = word_embeddings(tokens) if self.source == "embeddings" else query.clip
        if words is None or words.numel() == 0:
            raise MissingQueryError(
                "the question is known, but not its clip embedding, which a scorer makes; give apply(..., "
                "scorer=...), or source='embeddings', which needs none."
            )
        image = tokens.features if self.source == "embeddings" else tokens.signal("clip_image")
        if image.shape[-1] != words.shape[-1]:
            raise OptionError(
                f"tokens are {image.shape[-1]} wide and the question's {self.source} {words.shape[-1]}: not one space."
            )
        check_finite(image, "the visual features")
        return spread(self.sign * text_relevance(image.detach(), words.detach()))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        check_keep(keep, len(tokens))
        worth = self.relevance(tokens)
        if isinstance(self.method, ScoreMethod):
            scores = check_finite(self.method.scores(tokens), f"the scores of {self.method.info.name}").to(worth)
            mixed = (1 - self.weight) * spread(scores) + self.weight * worth
            return Selection(self.method.choose(tokens, mixed, keep), info={"scores": mixed, "relevance": worth})
        features = check_finite(wide(tokens.features), "the visual features")
        gain = (1 - self.weight) + self.weight * worth.clamp_min(1e-6)  # the least relevant token can still be far away
        order = greedy_farthest(features[None], keep, gain[None], low=0.0)[0]
        return Selection(order.sort().values, info={"relevance": worth})
