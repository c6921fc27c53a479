"""Frames scored by a question: which of three scorers, how its numbers are calibrated, and what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.base import check_finite
from tokprune.methods.frames_base import ScoredFrames, ScoreOptions
from tokprune.methods.options import option
from tokprune.methods.question import word_embeddings
from tokprune.ops.frame_scores import calibrated, finite, word_relevance
from tokprune.ops.wide import wide
from tokprune.tokens import VisualTokens

ENTITY_PROMPT = (
    "This is one frame of a video. Does it show at least one of the following: {entities}?\n"
    "A. yes\nB. no\nReply with the letter of the right option."
)
QUERY_PROMPT = (
    "This is one frame of a video. A question about the video: {question}\n"
    "Does this frame show anything that helps to answer the question?\n"
    "A. yes\nB. no\nReply with the letter of the right option."
)
_EMPTY = """
    a about after all also am an and any are as at be been before being both but by can could did do does doing during each for
    from had has have having he her hers him his how i if in into is it its itself me more most my no nor not of off on once only
    or other our out over own same she should so some such than that the their them then there these they this those through to
    too under until up very was we were what when where which while who whom whose why will with would you your
    video image picture photo frame clip shown show shows seen see answer question option options following best please true
    false letter choice choices yes
"""
EMPTY_WORDS = frozenset(_EMPTY.split())  # they say nothing of what is to be seen


@dataclass(frozen=True)
class QuestionScored(ScoredFrames):
    """Base of frames methods that look for what the question is about.

    score: who judges a frame.
    - "embeddings": the tokens that the LLM will get against the question's words in its embedding table. Free: no other
      model, no other pass. A heuristic of ours, and the weakest of the three.
    - "clip": a scorer with an image and a text tower (apply(..., scorer="open_clip:...")).
    - "self": the VLM itself is asked about each frame and answers yes or no; one short forward per frame.
    The latter two come as the signal `frame_scores`. calibrate: see ops.frame_scores.calibrated; "auto" is "none" for
    "self", whose scores are probabilities, and "minmax" otherwise (raw cosines are nearly flat). granularity, for
    "embeddings": "frame" compares the mean of a frame's tokens, "token" its closest one. entities: things to look for
    in place of the question's words; decouple: have the VLM name them first. normalize, entity_prompt, query_prompt:
    see ScoreOptions.
    """

    score: Literal["embeddings", "clip", "self"] = "embeddings"
    calibrate: Literal["auto", "minmax", "softmax", "sigmoid", "none"] = "auto"
    granularity: Literal["frame", "token"] = "frame"
    normalize: Literal["pair", "vocab"] = "pair"
    decouple: bool = False
    entities: tuple[str, ...] | None = option(None, example=("red car", "dog"))
    entity_prompt: str | None = None
    query_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(entity.strip() for entity in self.entities or ()):
            raise OptionError(f'entities={self.entities!r} holds an empty name; write such as ("red car", "dog").')
        object.__setattr__(self, "entities", self.entities or None)
        if self.score == "embeddings" and (self.entities or self.decouple):
            raise OptionError(
                "score='embeddings' compares with the words of the question; entities= and decouple= belong to score='clip' or 'self'."
            )
        for name, hole in (("entity_prompt", "{entities}"), ("query_prompt", "{question}")):
            if (text := getattr(self, name)) is not None and hole not in text:
                raise OptionError(f"{name} has no {hole}, where the scorer puts what it asks about.")

    @property
    def needs(self) -> tuple[str, ...]:
        """The scorer's verdict, unless the tokens are compared with the words here."""
        return () if self.score == "embeddings" else ("frame_scores",)

    @property
    def score_options(self) -> ScoreOptions | None:
        """What the scorer is to do."""
        if self.score == "embeddings":
            return None
        return ScoreOptions(
            self.score,
            self.normalize,
            self.decouple,
            self.entities,
            self.entity_prompt or ENTITY_PROMPT,
            self.query_prompt or QUERY_PROMPT,
        )

    @property
    def calibration(self) -> str:
        """What "auto" means."""
        if self.calibrate != "auto":
            return self.calibrate
        return "none" if self.score == "self" else "minmax"

    @torch.no_grad()
    def raw_scores(self, tokens: VisualTokens) -> Tensor:
        """The scorer's numbers. Returns (T,)."""
        frames = tokens.layout.num_groups
        if self.score == "embeddings":
            words = content_words(tokens)
            features = check_finite(tokens.features, "the visual features")
            layout = tokens.layout.to(features.device)
            return word_relevance(features, layout, words, by_token=self.granularity == "token")
        scores = tokens.signal("frame_scores")
        if scores.shape != (frames,):
            raise OptionError(
                f"the signal frame_scores has shape {tuple(scores.shape)} for {frames} frames; write ({frames},)."
            )
        return scores

    def frame_worth(self, tokens: VisualTokens) -> Tensor:
        """Calibrated scores, (T,); those that are NaN or infinite count as 0."""
        return finite(calibrated(self.raw_scores(tokens), self.calibration))


def content_words(tokens: VisualTokens) -> Tensor:
    """The question's words that name something, as rows of the LLM's embedding table less their mean. (J, D).

    The mean is that of all its words.

    Function words, option letters and talk about "the video" are left out where the query knows its words
    (`Query.pieces`); all words count when nothing is left.
    """
    rows = wide(word_embeddings(tokens))
    centred = rows - rows.mean(0) if len(rows) > 1 else rows
    pieces = tokens.question().pieces
    if pieces is None or len(pieces) != len(rows):
        return centred
    plain = ["".join(c for c in word.lower() if c.isalnum()) for word in pieces]
    keep = [i for i, word in enumerate(plain) if len(word) > 1 and word not in EMPTY_WORDS]
    return centred[torch.tensor(keep, device=rows.device)] if keep else centred
