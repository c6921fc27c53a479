"""Clips of the clip model: takes with one drifting object each, hard cuts between them, as real H.264 files.

    examples = held_out_clips(60, folder="clips")              # 7 s, 3 to 8 scenes; read them with frames=8
    needles = held_out_clips(40, folder="clips", long=True)    # 31 s, 16 to 32 scenes; read them with frames=32
    examples[0].path, examples[0].question, examples[0].answer

Equal seeds give equal clips and equal questions. Every scene is on screen at one of `example.frames` evenly spread
frames.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from tokprune.errors import missing_extra

from .clips_questions import CLIP_QUESTION_TYPES, CLIP_SHAPES, NEEDLE_TYPES, ClipQuestion, ClipQuestionType, ask_clip
from .drawing import render_frames
from .scenes import CHARACTERS, COLOR_NAMES, HELD_OUT_SEED, SIZE, SceneObject, balanced

FPS = 8
_OPTIONS = {"preset": "veryfast", "crf": "20", "threads": "1"}  # one thread: the same machine writes the same bytes
STEP = 8  # frames between two of the evenly spread ones: a second
SHORT_FRAMES, LONG_FRAMES = 8, 32  # how many evenly spread frames show every scene
SHORT_SCENES, LONG_SCENES = (3, 8), (16, 32)
_SLOW = 24  # frames that a take lasts at least, seen to its end or not
_QUESTIONS_PER_CLIP = 4
_CHARACTER_SHARE = 0.6
_HELD_OUT_SPAN = 1_000_000
_TAKES_PER_CLIP = 64  # room between the seeds of two clips' takes
# At least so many answers share a held-out type: no constant answer may pass for understanding.
_LEAST_ANSWERS = {"exist": 2, "count": 6}


@dataclass(frozen=True)
class Take:
    """An object that drifts evenly before a background that stays. drift: px from start to end."""

    seed: int
    start: SceneObject
    drift: tuple[float, float]

    def at(self, share: float) -> SceneObject:
        """The object when this share of the take has passed."""
        return replace(self.start, x=self.start.x + share * self.drift[0], y=self.start.y + share * self.drift[1])

    def draw(self, shares: Sequence[float]) -> NDArray[np.uint8]:
        """The frames at these shares of the take, (T, H, W, 3)."""
        return np.stack([np.asarray(image) for image in render_frames([[self.at(s)] for s in shares], self.seed, SIZE)])


@dataclass(frozen=True)
class DemoClip:
    """Takes in turn. starts: each one's first frame. length: frames in all."""

    seed: int
    takes: tuple[Take, ...]
    starts: tuple[int, ...]
    length: int

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """The object of each scene."""
        return tuple(take.start for take in self.takes)

    @property
    def ends(self) -> tuple[int, ...]:
        """The first frame after each scene."""
        return (*self.starts[1:], self.length)

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Every frame, (H, W, 3). A short scene shows the start of its take, so that nothing moves fast."""
        for take, start, end in zip(self.takes, self.starts, self.ends, strict=True):
            yield from take.draw([i / max(_SLOW, end - start - 1) for i in range(end - start)])

    def moment(self, scenes: Sequence[int]) -> tuple[float, float] | None:
        """Seconds from the start of the first of these scenes to the end of the last; None for no scenes."""
        return (self.starts[min(scenes)] / FPS, self.ends[max(scenes)] / FPS) if scenes else None


@dataclass(frozen=True)
class ClipExample:
    """One line of an evaluation: a file, a question, the answer.

    scenes: how many the clip has. moment: seconds (start, end) of what one must see to answer, None for the whole clip.
    frames: how many evenly spread frames show every scene.
    """

    path: Path
    question: str
    answer: str
    type: str
    scenes: int
    moment: tuple[float, float] | None
    frames: int = SHORT_FRAMES


def make_take(seed: int, color: str, shape: str) -> Take:
    """The take of a seed with an object of this kind; the character, the place and the drift come from the seed."""
    rng = random.Random(f"take {seed}")
    radius = rng.uniform(12, 15)
    margin = 1.25 * radius + 1
    x, y = rng.uniform(margin, SIZE - margin), rng.uniform(margin, SIZE - margin)
    end_x, end_y = (min(max(v + rng.uniform(-24, 24), margin), SIZE - margin) for v in (x, y))
    character = rng.choice(CHARACTERS) if rng.random() < _CHARACTER_SHARE else ""
    rotation, character_size = rng.uniform(-0.22, 0.22), rng.uniform(12, 13.5)
    start = SceneObject(color, shape, character, x, y, radius, rotation, character_size)
    return Take(seed, start, (end_x - x, end_y - y))


def plan_objects(scenes: int, rng: random.Random, distinct: bool = False) -> list[tuple[str, str]]:
    """Colour and shape of each scene's object; neighbours differ, so that scenes can be told apart and counted.

    distinct: no object twice, and one of them has a colour or a shape that no other has (what long clips need).
    """
    kinds = [(color, shape) for color in COLOR_NAMES for shape in CLIP_SHAPES]
    if distinct:
        needle, axis = rng.choice(kinds), rng.randrange(2)
        others = rng.sample([kind for kind in kinds if kind[axis] != needle[axis]], scenes - 1)
        place = rng.randrange(scenes)
        return [*others[:place], needle, *others[place:]]
    # Often one colour or shape comes again and again: there must be something to count.
    theme, axis = rng.choice(kinds), rng.randrange(2)
    themed = set(rng.sample(range(scenes), min(rng.choice((0, 2, 3, 4, 5)), scenes)))
    plan: list[tuple[str, str]] = []
    for place in range(scenes):
        fitting = [k for k in kinds if (k[axis] == theme[axis]) == (place in themed) and k not in plan[-1:]]
        again = [k for k in fitting if k in plan]
        plan.append(rng.choice(again) if again and rng.random() < 0.1 else rng.choice(fitting))
    return plan


def frames_per_scene(scenes: int, frames: int, rng: random.Random) -> list[int]:
    """How many of the evenly spread frames each scene gets: at least one, (scenes,) with sum `frames`."""
    cuts = [0, *sorted(rng.sample(range(1, frames), scenes - 1)), frames]
    return [after - before for before, after in itertools.pairwise(cuts)]


def make_clip(seed: int, long: bool = False) -> DemoClip:
    """The clip of a seed; equal seeds give equal clips."""
    rng = random.Random(f"{'long ' if long else ''}clip {seed}")
    frames = LONG_FRAMES if long else SHORT_FRAMES
    plan = plan_objects(rng.randint(*(LONG_SCENES if long else SHORT_SCENES)), rng, distinct=long)
    takes = tuple(make_take(seed * _TAKES_PER_CLIP + i, *kind) for i, kind in enumerate(plan))
    starts, seen = [0], 0
    for shown in frames_per_scene(len(plan), frames, rng)[:-1]:
        seen += shown
        starts.append(STEP * (seen - 1) + rng.randint(2, STEP - 1))  # somewhere between two of the spread frames
    return DemoClip(seed, takes, tuple(starts), STEP * (frames - 1) + 1)


def held_out_clips(
    questions: int,
    seed: int = 0,
    folder: str | Path = "clips",
    long: bool = False,
    types: Sequence[ClipQuestionType] | None = None,
) -> list[ClipExample]:
    """A balanced list of questions about clips that training never sees; their files are written to `folder`.

    Every type gets the same number of questions (give or take one); no answer takes more than half of "exist" or a
    sixth of "count". At most four questions share a clip. A file that is already there is not written again.

    Args:
        questions: how many.
        seed: which ones, 0 to 999.
        folder: made if it is not there; needs PyAV (the `video` extra).
        long: clips of 16 to 32 scenes instead of 3 to 8, each question about one that has a color or a shape of its
            own.
        types: the wanted types; by default all that suit the length.
    """
    types = types or (NEEDLE_TYPES if long else CLIP_QUESTION_TYPES)
    if questions < 1:
        raise ValueError(f"need at least one question, got {questions}")
    if not 0 <= seed < 1000:
        raise ValueError(f"seed must be in 0..999, got {seed}")
    examples: list[ClipExample] = []
    media = _asked(HELD_OUT_SEED + seed * _HELD_OUT_SPAN, long)
    for clip, clip_questions in balanced(questions, types, _LEAST_ANSWERS, _QUESTIONS_PER_CLIP, media):
        path = write_clip(clip, Path(folder) / f"{'long' if long else 'short'}-{clip.seed}.mp4")
        frames = LONG_FRAMES if long else SHORT_FRAMES
        examples += [
            ClipExample(path, q.text, q.answer, q.type, len(clip.takes), clip.moment(q.scenes), frames)
            for q in clip_questions
        ]
    return examples


def _asked(first: int, long: bool) -> Iterator[tuple[DemoClip, Callable[[ClipQuestionType], ClipQuestion | None]]]:
    """The clips from a seed on, each with what asks a question of a type about it."""
    for seed in itertools.count(first):
        clip, rng = make_clip(seed, long), random.Random(f"held out clip {seed}")
        yield clip, functools.partial(ask_clip, clip.objects, rng=rng)


def encode(frames: Iterable[NDArray[np.uint8]], file: str | IO[bytes], fps: int) -> None:
    """Write (H, W, 3) frames as H.264, yuv420p, in an mp4; file: a path or a binary file that can seek."""
    try:
        import av
    except ImportError as error:
        raise missing_extra("av", "video", "writing clips") from error
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_OPTIONS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_clip(clip: DemoClip, path: Path) -> Path:
    """The clip as an mp4 at `path`, unless it is already there; a kill leaves no half file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        encode(clip.frames(), str(partial), FPS)
        os.replace(partial, path)
    return path
