"""What query-aware methods read from the question, with errors that say what is missing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokprune.errors import MissingQueryError, OptionError
from tokprune.methods.base import check_finite
from tokprune.ops.similarity import cosine_similarity
from tokprune.tokens import VisualTokens

Relevance = Literal["embeddings", "clip"]
CLIP_SIGNALS = ("clip_image", "clip_text")


def word_embeddings(tokens: VisualTokens) -> Tensor:
    """The question as rows of the LLM's embedding table, (T, D), in the space of the projected features."""
    rows = tokens.question().embeddings
    if rows is None or rows.numel() == 0:
        raise MissingQueryError(
            "the question is known, but not its tokens and their embeddings: no tokenizer lies beside the model. "
            "Give one: apply(..., "
            "processor=processor), which may be the tokenizer alone; or choose a method that does not read the "
            "question."
        )
    if rows.dim() != 2 or rows.shape[-1] != tokens.features.shape[-1]:
        raise OptionError(
            f"Query.embeddings have shape {tuple(rows.shape)}; write (T, {tokens.features.shape[-1]}), as wide as the "
            "visual features."
        )
    return check_finite(rows, "the question's embeddings").to(tokens.features.device)


def text_relevance(visual: Tensor, text: Tensor) -> Tensor:
    """Mean cosine of each visual token with the text vectors. visual: (..., N, E), text: (T, E) or (E,) -> (..., N)."""
    return cosine_similarity(visual, text.to(visual.device).reshape(-1, text.shape[-1])).mean(-1)


@torch.no_grad()
def question_relevance(tokens: VisualTokens, space: Relevance) -> Tensor:
    """How close each visual token is to the question, (N,) in float32; higher = closer.

    space: "embeddings" compares projected features with the LLM embeddings of the question's words, which works on
    every model; "clip" compares the scorer's patch embeddings with its text embedding (signals clip_image and
    clip_text).
    """
    if space == "embeddings":
        return text_relevance(check_finite(tokens.features, "the visual features"), word_embeddings(tokens))
    text = tokens.question().clip
    if text is None:
        raise MissingQueryError(
            "relevance='clip' needs the scorer's embedding of the question (Query.clip), and none was made; give a "
            "CLIP scorer, or use relevance='embeddings', which works on every model."
        )
    patches = check_finite(tokens.signal("clip_image"), "the scorer's patch embeddings")
    return text_relevance(patches, check_finite(text, "the scorer's text embedding"))
