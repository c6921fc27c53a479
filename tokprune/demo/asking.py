"""A model as the demo asks it: questions about pictures or clips, pruned or not, by processor and generate()."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import tokprune
from tokprune.adapters.prompting import answer, build_inputs
from tokprune.errors import OptionError
from tokprune.runtime.handle import Pruning
from tokprune.types import VLM, Inputs, JsonObject, Processor

from .clips import ClipExample
from .scenes import Example

if TYPE_CHECKING:
    from torch import Tensor

    from tokprune.runtime.records import StreamRecord

ONE_WORD = " Answer with one word."
ANSWER_TOKENS = 3  # the demo VLMs say one word and stop; room to see when one does not
FREE_ANSWER_TOKENS = 12
BATCH = 25
CLIP_BATCH = {8: 8, 32: 4}  # questions at once, by frames: about as many visual tokens

Frames: TypeAlias = NDArray[np.uint8]
"""A clip: (T, H, W, 3) uint8."""

Medium: TypeAlias = Image.Image | Frames
"""What a question is about."""


@lru_cache(maxsize=256)
def read_frames(path: Path, frames: int) -> Frames:
    """Evenly spread frames of a file, decoded once. (frames, H, W, 3)"""
    from tokprune.video import read_video

    return read_video(path, frames=frames).frames


def shown(example: Example | ClipExample) -> Medium:
    """The picture that an example is about, or the frames of its clip."""
    return read_frames(example.path, example.frames) if isinstance(example, ClipExample) else example.image


def source(example: Example | ClipExample) -> object:
    """What tells pictures and clips apart: the seed of the scene, or the file."""
    return example.path if isinstance(example, ClipExample) else example.scene.seed


def batch_size(examples: Sequence[Example | ClipExample]) -> int:
    """How many of these questions are asked at once."""
    first = examples[0]
    return CLIP_BATCH[first.frames] if isinstance(first, ClipExample) else BATCH


@dataclass(frozen=True)
class Answered:
    """One answer under one method. stream: what was kept of the picture or clip, None where the model saw none.
    maps: groups of patches that a method joined inside the vision tower, as (rows, columns) tensors of group numbers.
    """

    method: str
    ratio: float
    text: str
    stream: StreamRecord | None
    maps: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Asker:
    """A model, its processor and how to ask it. embedded: a demo VLM, which answers in one word without being told to.
    scorer: for methods that compare the question with what is seen.
    """

    model: VLM = field(repr=False)
    processor: Processor = field(repr=False)
    embedded: bool = True
    scorer: object = field(default=None, repr=False)

    @property
    def new_tokens(self) -> int:
        """The longest answer to a question that wants one word."""
        return ANSWER_TOKENS if self.embedded else FREE_ANSWER_TOKENS

    def inputs(self, examples: Sequence[Example | ClipExample]) -> Inputs:
        """Processor outputs of a batch of examples, all about pictures or all about clips."""
        questions = [e.question if self.embedded else e.question + ONE_WORD for e in examples]
        return self.prepare(questions, [shown(e) for e in examples])

    def prepare(self, questions: Sequence[str], media: Sequence[Medium] | None) -> Inputs:
        """Processor outputs of questions, each about its picture or clip (T, H, W, 3), or without any."""
        if media is None:
            return build_inputs(self.model, self.processor, list(questions))
        kind = "images" if isinstance(media[0], Image.Image) else "videos"
        several: JsonObject = {kind: [[medium] for medium in media]}
        return build_inputs(self.model, self.processor, list(questions), **several)

    def answers(self, inputs: Inputs, new_tokens: int | None = None) -> list[str]:
        """Greedy answers to prepared inputs."""
        return answer(self.model, self.processor, inputs, new_tokens or self.new_tokens)

    def pruned(self, method: str | Sequence[str], ratio: float) -> Pruning:
        """The model under a method, for a `with` block; it is given back as it was."""
        return tokprune.apply(self.model, method, ratio=ratio, processor=self.processor, scorer=self.scorer)

    def ask(
        self,
        question: str,
        medium: Medium,
        method: str,
        ratio: float,
        new_tokens: int | None = None,
        maps: bool = False,
    ) -> Answered:
        """One answer about a picture or clip under one method. maps: also what was joined inside the tower."""
        from tokprune.viz.merge_map import stream_maps

        with self.pruned(method.split("+"), ratio) as pruning:
            text = self.answers(self.prepare([question], [medium]), new_tokens)[0]
            stream = None if pruning.last is None else pruning.last.streams[0]
            trace = pruning.encoder.trace if maps and pruning.encoder is not None else None
            joined = () if trace is None or stream is None else stream_maps(trace, stream)
        if stream is None and method != "none":
            raise OptionError(f"the model saw no picture under {method}.")
        return Answered(method, ratio, text, stream, joined)
