"""The signal `frame_scores`: how much each frame of a video has to do with the question, by a scorer or by the VLM
itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokprune.adapters.base import Adapter
from tokprune.adapters.families import EncoderCall, UnknownGeometryError
from tokprune.adapters.tower_parts import Moments, normalisation
from tokprune.adapters.types import EncoderOutput, Processor, Scorer
from tokprune.errors import MissingQueryError, MissingSignalError, OptionError
from tokprune.methods.frames_base import PerFrame, ScoreOptions
from tokprune.runtime.frames.asking import Asking
from tokprune.runtime.frames.decouple import decoupled
from tokprune.runtime.frames.pictures import frame_pictures
from tokprune.runtime.scorers import CLIP_MEAN, CLIP_STD, VlmScorer

if TYPE_CHECKING:
    from tokprune.runtime.records import StreamRecord

NAME = "frame_scores"
PICTURES_AT_ONCE = 64  # that a scorer embeds in one call


@dataclass(frozen=True)
class FrameQuery:
    """What frames are compared with. text: all that was asked. question: one sentence of it. entities: things to look
    for, or none. source: for the report."""

    text: str
    question: str
    entities: tuple[str, ...]
    source: str

    @property
    def texts(self) -> list[str]:
        """What a text tower reads: short captions of the things, or the question."""
        return [f"a photo of {thing}" for thing in self.entities] or [self.question]


def question_sentence(text: str) -> str:
    """The question alone, without answer options and instructions; text towers read 77 tokens.

    Everything up to the last question mark of the first paragraph that has one; lines that begin with an option letter
    are left out before.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"\(?[A-Z][.):]\s", line)]
    for line in lines:
        words = re.split(r"\s\(?[A-D][.)]\s", line)[0]  # options on the same line
        if "?" in words:
            return words[: words.rindex("?") + 1].strip()
    return re.split(r"\s\(?A[.)]\s", lines[0])[0].strip() if lines else text.strip()


class FrameScorer:
    """Fills `frame_scores` (T,) of every video of a prefill, as a frames method's `score_options` say."""

    def __init__(
        self, adapter: Adapter, options: ScoreOptions, name: str, processor: Processor, scorer: Scorer
    ) -> None:
        self.adapter, self.options, self.name = adapter, options, name
        self.processor, self.scorer = processor, scorer

    @staticmethod
    def of(adapter: Adapter, frames: PerFrame | None, processor: Processor, scorer: Scorer) -> FrameScorer | None:
        """The scorer that a frames method needs, or None when it needs none."""
        if frames is None or NAME not in frames.frames.needs:
            return None
        options, name = frames.frames.score_options, frames.frames.info.name
        if options is None:
            raise OptionError(f"the frames method {name!r} needs {NAME!r} but its score_options do not say how.")
        return FrameScorer(adapter, options, name, processor, scorer)

    def fill(self, streams: Sequence[StreamRecord], encoded: Mapping[str, EncoderOutput]) -> None:
        """Give the videos among `streams` their scores. encoded: encoder outputs by modality, for DeepStack planes."""
        wanted: dict[str, FrameQuery] = {}
        for stream in streams:
            if stream.tokens.layout.kind != "video":
                continue
            text = stream.tokens.question().text
            if text is None:
                raise MissingQueryError(
                    f"{self.name!r} compares frames with the question's words, and only its embeddings are known; give "
                    'apply(..., query="...").'
                )
            if text not in wanted:
                wanted[text] = self._wanted(text)
            if self.options.source == "clip":
                scores, source = self._clip(stream, wanted[text])
            else:
                scores, source = self._self(stream, wanted[text], encoded)
            signals = {**stream.tokens.signals, NAME: scores.to(stream.tokens.features.device)}
            stream.visual = replace(stream.tokens, signals=signals)
            stream.sources = {**stream.sources, NAME: source}

    def _wanted(self, text: str) -> FrameQuery:
        """What to look for: the entities given, those that the VLM names, or the question."""
        question = question_sentence(text)
        if self.options.entities is not None:
            return FrameQuery(
                text, question, tuple(self.options.entities), f"entities given: {', '.join(self.options.entities)}"
            )
        if not self.options.decouple:
            return FrameQuery(text, question, (), f"question: {question}")
        entities, source = decoupled(self.adapter, self.processor, text)
        return FrameQuery(text, question, entities, f"{source}; question: {question}" if not entities else source)

    # -- a scorer of pictures and texts

    def _clip(self, stream: StreamRecord, wanted: FrameQuery) -> tuple[Tensor, str]:
        scorer = self.scorer
        if scorer is None or not hasattr(scorer, "embed_picture"):
            lack = "none was given" if scorer is None else f"{type(scorer).__name__} has no embed_picture"
            raise MissingSignalError(
                f"{self.name!r} scores frames by a text-image scorer, and {lack}: pass apply(..., "
                'scorer="open_clip:ViT-B-32/laion2b_s34b_b79k"), an object with embed_text and embed_picture, or have '
                f"the method score in another way (tokprune methods {self.name})."
            )
        batch = self._pictures(stream)
        texts = scorer.embed_text(wanted.texts)  # (S, E)
        flat = self._as_scorer_expects(batch).split(PICTURES_AT_ONCE)
        seen = torch.cat([scorer.embed_picture(part) for part in flat]).float()
        cosines = seen @ texts.to(seen).T  # (T * k, S)
        best = cosines.amax(1).unflatten(0, (-1, batch.shape[1])).amax(1)  # the better frame of a pair
        scale, bias = float(getattr(scorer, "logit_scale", 1.0)), float(getattr(scorer, "logit_bias", None) or 0.0)
        return best * scale + bias, f"{type(scorer).__name__}, whole frames; {wanted.source}"

    def _pictures(self, stream: StreamRecord) -> Tensor:
        """The pixels of each frame as the model got them; k frames where k share their tokens. (T, k, 3, H, W)."""
        if stream.encoded is None or stream.whole is None:
            raise MissingSignalError(
                f"{self.name!r} scores frames by their pixels, which are not at hand: the video was encoded before "
                "tokprune saw it. Pass the pixels, or encode again after apply."
            )
        call = EncoderCall(self.adapter.base, stream.modality, stream.encoded.kwargs, stream.encoded.output)
        try:
            pictures = frame_pictures(call)
        except UnknownGeometryError as error:
            kind = self.adapter.config.model_type
            raise MissingSignalError(
                f"{self.name!r} cannot get the frames of {kind} back from its pixels ({error}); have the method score "
                f"in another way (tokprune methods {self.name})."
            ) from None
        layout = stream.whole.layout
        first = torch.searchsorted(layout.group, torch.arange(layout.num_groups))  # each frame's first token
        rows = stream.first_row + stream.whole.rows[first]
        return pictures.of(pictures.owner[rows])

    def _as_scorer_expects(self, batch: Tensor) -> Tensor:
        """Pictures (n, k, 3, H, W) as (n * k, 3, H, W), normalised as the scorer takes them where that is known to
        differ.
        """
        flat = batch.flatten(0, 1)
        mine, theirs = self._normal(), (getattr(self.scorer, "mean", None), getattr(self.scorer, "std", None))
        if theirs[0] is None or theirs[1] is None:
            theirs = normalisation(getattr(self.processor, "image_processor", None)) or theirs
        if mine is None or theirs[0] is None or theirs[1] is None:
            return flat
        mean, std, other_mean, other_std = _by_colour(flat.device, *mine, *theirs)
        if torch.equal(mean.expand_as(other_mean), other_mean) and torch.equal(std.expand_as(other_std), other_std):
            return flat
        return ((flat.float() * std + mean - other_mean) / other_std).to(flat.dtype)

    def _normal(self) -> Moments | None:
        """How the frames that the model gets were normalised, where its processor says so."""
        parts = (getattr(self.processor, f"{kind}_processor", None) for kind in ("video", "image"))
        return next((found for part in parts if (found := normalisation(part))), None)

    # -- the VLM itself

    def _self(
        self, stream: StreamRecord, wanted: FrameQuery, encoded: Mapping[str, EncoderOutput]
    ) -> tuple[Tensor, str]:
        options = self.options
        if wanted.entities:
            prompt = options.entity_prompt.replace("{entities}", ", ".join(wanted.entities))
        else:
            prompt = options.query_prompt.replace("{question}", wanted.text)
        if isinstance(self.scorer, VlmScorer):
            scores = self._second(self.scorer, stream, prompt)
            return scores, f"{self.scorer.source(options.normalize)}; {wanted.source}"
        asking = Asking(self.adapter, self.processor, self.name, options.normalize)
        return asking.scores(stream, prompt, encoded), f"{asking.source}; {wanted.source}"

    def _second(self, scorer: VlmScorer, stream: StreamRecord, prompt: str) -> Tensor:
        """The verdict of another VLM, which looks at the frames with a processor of its own. (T,)."""
        if scorer.model is self.adapter.model:
            raise OptionError(f"scorer= is the model that is pruned; {self.name!r} asks it without a scorer, too.")
        from PIL import Image

        batch = self._pictures(stream)
        mean, std = _by_colour(batch.device, *(self._normal() or (CLIP_MEAN, CLIP_STD)))
        bright = ((batch.float() * std + mean).clamp(0, 1) * 255).round().byte().flatten(0, 1)
        pictures = [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in bright]
        scores = scorer.scores(pictures, prompt, self.options.normalize)
        return scores.unflatten(0, (-1, batch.shape[1])).amax(1)  # the better frame of a pair


def _by_colour(device: torch.device, *moments: object) -> list[Tensor]:
    """Numbers for each colour, (3 or 1, 1, 1) each."""
    return [torch.as_tensor(m, device=device).float().view(-1, 1, 1) for m in moments]
