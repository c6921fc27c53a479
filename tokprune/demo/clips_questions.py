"""What can be asked about the scenes of a clip, and the one right answer: moments, order, counting over time."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .scenes import COLOR_NAMES, SHAPES, Asked, SceneObject, ask_color, ask_exist, ask_shape, once, pair

# At 16 px a token, after H.264, hexagons and circles look alike: one in six was taken for the other.
CLIP_SHAPES: tuple[str, ...] = tuple(shape for shape in SHAPES if shape != "hexagon")

ClipQuestionType = Literal["color", "shape", "read", "exist", "order", "count"]

CLIP_QUESTION_TYPES: tuple[ClipQuestionType, ...] = ("color", "shape", "read", "exist", "order", "count")
# Types about one moment: the ones that training asks about clips of many scenes.
MOMENT_TYPES: tuple[ClipQuestionType, ...] = ("color", "shape", "read", "exist")
# Types that name one scene by one attribute that no other has: the needle among many scenes.
NEEDLE_TYPES: tuple[ClipQuestionType, ...] = ("color", "shape")


_MOST_COUNTED = 9  # an answer is one word, and the numbers end here


@dataclass(frozen=True)
class ClipQuestion:
    """A question about a clip and its only right answer. scenes: those that one must see to answer; empty: all."""

    type: ClipQuestionType
    text: str
    answer: str
    scenes: tuple[int, ...] = ()


def ask_clip(
    objects: Sequence[SceneObject], question_type: ClipQuestionType, rng: random.Random
) -> ClipQuestion | None:
    """A question of one type about a clip of scenes with these objects, or None where none is unambiguous."""
    if question_type not in _ASKERS:
        raise ValueError(f"unknown question type {question_type!r}; choose from {', '.join(CLIP_QUESTION_TYPES)}")
    question = _ASKERS[question_type](objects, rng)
    return None if question is None else ClipQuestion(question_type, *question)


def _ask_read(objects: Sequence[SceneObject], rng: random.Random) -> Asked | None:
    names: list[tuple[int, str]] = []
    for key, text in _NAMES:
        names += [(i, text(objects[i])) for i in once(objects, key) if objects[i].character]
    if not names:
        return None
    scene, name = rng.choice(names)
    return f"which character is on the {name} ?", objects[scene].character.lower(), (scene,)


def _ask_order(objects: Sequence[SceneObject], rng: random.Random) -> Asked | None:
    by_color = rng.random() < 0.5
    scenes: tuple[int, ...]
    if rng.random() < 0.5:
        place, scene = rng.choice((("first", 0), ("last", len(objects) - 1)))
        referent, scenes = f"the {place} object", (scene,)
    else:
        names = [(i, text(objects[i])) for key, text in _NAMES[1:] for i in once(objects, key)]
        places = [(i, name, 1) for i, name in names if i + 1 < len(objects)]
        places += [(i, name, -1) for i, name in names if i]
        if not places:
            return None
        known, name, step = rng.choice(places)
        scene = known + step
        referent = f"the object {'after' if step > 0 else 'before'} the {name}"
        scenes = (min(known, scene), max(known, scene))
    answer = objects[scene].color if by_color else objects[scene].shape
    return f"what {'color' if by_color else 'shape'} is {referent} ?", answer, scenes


def _ask_count(objects: Sequence[SceneObject], rng: random.Random) -> Asked | None:
    kind = rng.random()
    if kind < 0.25 and len(objects) <= _MOST_COUNTED:
        return "how many scenes are there ?", str(len(objects)), ()
    by_color = kind < 0.625
    counts = Counter(o.color if by_color else o.shape for o in objects)
    values = COLOR_NAMES if by_color else CLIP_SHAPES
    wanted = rng.choice(sorted({counts[value] for value in values}))
    value = rng.choice([value for value in values if counts[value] == wanted])
    return f"how many {value} {'objects' if by_color else 'shapes'} are there ?", str(counts[value]), ()


# How a question may name one object, and what must then be unique.
_NAMES: tuple[tuple[Callable[[SceneObject], object], Callable[[SceneObject], str]], ...] = (
    (pair, lambda o: f"{o.color} {o.shape}"),
    (lambda o: o.shape, lambda o: o.shape),
    (lambda o: o.color, lambda o: f"{o.color} object"),
)

_ASKERS: dict[str, Callable[[Sequence[SceneObject], random.Random], Asked | None]] = {
    "color": ask_color,
    "shape": ask_shape,
    "read": _ask_read,
    "exist": functools.partial(ask_exist, shapes=CLIP_SHAPES),
    "order": _ask_order,
    "count": _ask_count,
}
