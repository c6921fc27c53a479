"""Frames scored by a question: which of three scorers, how its numbers are calibrated, and what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError, unknown
from tokprune.methods.base import check_finite
from tokprune.methods.frames_base import ScoredFrames, ScoreOptions
from tokprune.methods.options import option
from tokprune.methods.question import word_embeddings
from tokprune.ops.numeric import finite, stretched, wide
from tokprune.ops.similarity import unit
from tokprune.tokens import Layout, VisualTokens

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
    a about after all also am an and any are as at be been before being both but by can could did do does doing
    during each for from had has have having he her hers him his how i if in into is it its itself me more most my
    no nor not of off on once only or other our out over own same she should so some such than that the their them
    then there these they this those through to too under until up very was we were what when where which while who
    whom whose why will with would you your video image picture photo frame clip shown show shows seen see answer
    question option options following best please true false letter choice choices yes
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
    The latter two come as the signal `frame_scores`. calibrate: see `calibrated`; "auto" is "none" for
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
                "score='embeddings' compares with the words of the question; entities= and decouple= belong to "
                "score='clip' or 'self'."
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


CALIBRATIONS = ("minmax", "softmax", "sigmoid", "none")


def calibrated(scores: Tensor, how: str) -> Tensor:
    """Scores of a video's frames made comparable between videos and scorers.

    scores: (T,) raw; what is not finite counts as 0, at most as the lowest. how: "minmax" stretches them to 0 … 1.
    "softmax" is exp(score - best), for logits. "sigmoid" is an absolute probability, for logits with a bias such as
    SigLIP's; where all of them are below 0.001 they are stretched instead. "none" leaves them. Constant scores come out
    constant.
    """
    if how not in CALIBRATIONS:
        raise unknown("calibration", how, CALIBRATIONS)
    known = torch.isfinite(scores)
    scores = finite(scores)
    if how == "none":
        return scores
    if how == "softmax":
        return torch.where(known, (scores - torch.where(known, scores, -torch.inf).amax()).exp(), 0.0)
    low = torch.where(known, scores, torch.inf).amin()  # of the known ones: a missing score must not widen the range
    scores = torch.where(known, scores, torch.where(known.any(), low, 0.0))
    if how == "minmax":
        return stretched(scores)
    probability = scores.sigmoid()
    return torch.where((probability < 1e-3).all(), stretched(scores), probability)


def word_relevance(
    features: Tensor, layout: Layout, words: Tensor, best: int = 3, by_token: bool = False, block: int = 16384
) -> Tensor:
    """How close each frame is to a question's words, in the LLM's embedding space. Returns (T,), a mean cosine.

    features: (N, D). words: (J, D), centred. A frame is the mean of its tokens, each of unit length, less the mean over
    the video: what all frames share (also the offset between pictures and words) does not count. Its score is the mean
    over the `best` closest words. by_token: the closest token stands for the frame instead of the mean. O(N D), O(N J
    D) by token; blocks of tokens, so that no copy of a long video is made.
    """
    frames = layout.num_groups
    rows = [slice(i, i + block) for i in range(0, features.shape[0], block)]
    total = wide(features[:0]).new_zeros(frames, features.shape[1])
    for part in rows:
        total = total.index_add(0, layout.group[part], unit(wide(features[part])))
    sizes = torch.tensor(layout.group_sizes, device=total.device).clamp(min=1)[:, None]
    means = total / sizes
    centre = means.mean(0)
    words = unit(words.to(total))
    if by_token:
        cosine = total.new_full((frames, len(words)), -torch.inf)
        for part in rows:
            near = unit(_apart(unit(wide(features[part])), centre)) @ words.T
            cosine = cosine.scatter_reduce(0, layout.group[part][:, None].expand_as(near), near, "amax")
    else:
        cosine = unit(_apart(means, centre)) @ words.T  # (T, J)
    return cosine.topk(min(best, len(words)), dim=-1).values.mean(-1)


def _apart(rows: Tensor, centre: Tensor) -> Tensor:
    """Rows less the centre; 0 where only rounding is left, whose direction would mean nothing."""
    off = rows - centre
    return torch.where(off.norm(dim=-1, keepdim=True) > 1e-5 * rows.norm(dim=-1, keepdim=True), off, 0.0)
