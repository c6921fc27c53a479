"""Scenes and questions of the demo VLM: drawn on the fly, right by construction, the same on every machine.

A scene is one 128 px picture with one to six coloured shapes, most of which carry a small character. Questions have
one-word answers and seven types; each is asked only where the scene has exactly one right answer.

    scene = make_scene(seed=HELD_OUT_SEED)
    scene.image                                   # PIL.Image, RGB
    questions(scene)                              # one question of every type that the scene supports
    held_out(700)                                 # a balanced list of examples that no training run has seen
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, TypeVar

from PIL import Image

from .drawing import COLORS, render

QuestionType = Literal["color", "shape", "count", "exist", "where", "read", "find"]

SIZE = 128
MAX_OBJECTS = 6
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross", "hexagon")
CHARACTERS: tuple[str, ...] = tuple("ACEFHKMRTX234579")
QUADRANTS: tuple[str, ...] = ("top-left", "top-right", "bottom-left", "bottom-right")
QUESTION_TYPES: tuple[QuestionType, ...] = ("color", "shape", "count", "exist", "where", "read", "find")

# Seeds below VALIDATION_SEED are for training, those from there to HELD_OUT_SEED for watching it, the rest for results.
VALIDATION_SEED = 1_000_000
HELD_OUT_SEED = 10_000_000
_HELD_OUT_SPAN = 1_000_000
_QUESTIONS_PER_SCENE = 3
# At least so many answers share a held-out type: no constant answer may pass for understanding.
_LEAST_ANSWERS = {"exist": 2, "where": 4, "count": 3}


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; `character` is empty when it carries none. Lengths are in pixels, rotation in radians."""

    color: str
    shape: str
    character: str
    x: float
    y: float
    radius: float
    rotation: float = 0.0
    character_size: float = 12.0

    @property
    def quadrant(self) -> str:
        """Which quarter of the picture holds the centre."""
        return QUADRANTS[2 * (self.y > SIZE / 2) + (self.x > SIZE / 2)]


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it."""

    seed: int
    objects: tuple[SceneObject, ...]

    @cached_property
    def image(self) -> Image.Image:
        """The picture, RGB, SIZE x SIZE; drawn on first use."""
        return render(self.objects, self.seed, SIZE)


@dataclass(frozen=True)
class SceneQuestion:
    """A question about one scene and its only right answer."""

    type: QuestionType
    text: str
    answer: str


@dataclass(frozen=True)
class Example:
    """One line of an evaluation: picture, question, answer."""

    image: Image.Image = field(repr=False, compare=False)
    question: str
    answer: str
    type: QuestionType
    scene: Scene


class Question(Protocol):
    """A question about a scene or a clip."""

    @property
    def answer(self) -> str:
        """The only right one."""


K = TypeVar("K", bound=str)
M = TypeVar("M")
Q = TypeVar("Q", bound=Question)


def make_scene(seed: int) -> Scene:
    """The scene of a seed; equal seeds give equal objects and equal pixels."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    return Scene(seed, tuple(_sample_objects(random.Random(f"objects {seed}"))))


def questions(
    scene: Scene, rng: random.Random | None = None, types: Sequence[QuestionType] = QUESTION_TYPES
) -> list[SceneQuestion]:
    """One question of each type that the scene supports without ambiguity.

    Args:
        scene: what to ask about.
        rng: chooses among the possible questions; by default fixed by the scene's seed.
        types: the wanted types, in this order; unsupported ones are left out of the result.
    """
    rng = rng or random.Random(f"questions {scene.seed}")
    possible = (ask(scene.objects, question_type, rng) for question_type in types)
    return [question for question in possible if question is not None]


def ask(objects: Sequence[SceneObject], question_type: QuestionType, rng: random.Random) -> SceneQuestion | None:
    """A question of one type about these objects, or None where none has a unique answer."""
    if question_type not in _ASKERS:
        raise ValueError(f"unknown question type {question_type!r}; choose from {', '.join(QUESTION_TYPES)}")
    question = _ASKERS[question_type](objects, rng)
    return None if question is None else SceneQuestion(question_type, *question[:2])


def held_out(n_questions: int, seed: int = 0, types: Sequence[QuestionType] = QUESTION_TYPES) -> list[Example]:
    """A balanced list of examples from scenes that training never sees.

    Every type gets the same number of questions (give or take one); the answers of "exist" and "where" are balanced
    too, and no number answers more than a third of "count" (give or take one).
    A longer list with the same seed is not an extension of a shorter one. At most three questions share a scene.
    """
    if n_questions < 1 or not types:
        raise ValueError(f"need at least one question and one type, got {n_questions} and {list(types)}")
    if not 0 <= seed < 1000:
        raise ValueError(f"seed must be in 0..999, got {seed}")
    examples = []
    media = _asked(HELD_OUT_SEED + seed * _HELD_OUT_SPAN)
    for scene, taken in balanced(n_questions, types, _LEAST_ANSWERS, _QUESTIONS_PER_SCENE, media):
        examples += [Example(scene.image, q.text, q.answer, q.type, scene) for q in taken]
    return examples


def _asked(first: int) -> Iterator[tuple[Scene, Callable[[QuestionType], SceneQuestion | None]]]:
    """The scenes from a seed on, each with what asks a question of a type about it."""
    for seed in itertools.count(first):
        scene, rng = make_scene(seed), random.Random(f"held out {seed}")
        yield scene, functools.partial(ask, scene.objects, rng=rng)


def balanced(
    questions: int,
    types: Sequence[K],
    least: Mapping[str, int],
    most: int,
    media: Iterable[tuple[M, Callable[[K], Q | None]]],
) -> Iterator[tuple[M, list[Q]]]:
    """Scenes or clips with their questions, until there are as many of every type (give or take one).

    least: by type, how many answers have to share its questions. most: questions per scene or clip. media: each with
    what asks a question of a type about it.
    """
    share, extra = divmod(questions, len(types))
    missing: Counter[str] = Counter({kind: share + (i < extra) for i, kind in enumerate(types)})
    limits = {kind: -(-missing[kind] // answers) for kind, answers in least.items()}
    answered: Counter[tuple[str, str]] = Counter()
    for medium, ask_for in media:
        taken: list[Q] = []
        # The types that lack most come first, so that rare ones (read) do not remain for the end.
        for kind in sorted(types, key=lambda kind: -missing[kind]):
            if len(taken) == most or not missing[kind]:
                break
            question = ask_for(kind)
            if question is None or answered[kind, question.answer] >= limits.get(kind, questions):
                continue
            answered[kind, question.answer] += 1
            missing[kind] -= 1
            taken.append(question)
        if taken:
            yield medium, taken
        if not missing.total():
            return


def _sample_objects(rng: random.Random) -> list[SceneObject]:
    """One to MAX_OBJECTS objects that do not touch each other and stay off the middle lines."""
    wanted = rng.randint(1, MAX_OBJECTS)
    objects: list[SceneObject] = []
    for _ in range(200):
        if len(objects) == wanted:
            break
        radius = rng.uniform(9.5, 14.5)
        margin = 1.25 * radius + 1
        x, y = rng.uniform(margin, SIZE - margin), rng.uniform(margin, SIZE - margin)
        if min(abs(x - SIZE / 2), abs(y - SIZE / 2)) < 5:  # "where" must have one answer
            continue
        if any((x - o.x) ** 2 + (y - o.y) ** 2 < (1.22 * (radius + o.radius)) ** 2 for o in objects):
            continue
        # Repeating attributes makes counting and binding necessary; exact twins stay rare.
        repeat_color, repeat_shape = objects and rng.random() < 0.22, objects and rng.random() < 0.22
        color = rng.choice(objects).color if repeat_color else rng.choice(COLOR_NAMES)
        shape = rng.choice(objects).shape if repeat_shape else rng.choice(SHAPES)
        if any((o.color, o.shape) == (color, shape) for o in objects) and rng.random() < 0.6:
            continue
        character = rng.choice(CHARACTERS) if rng.random() < 0.75 else ""
        if any(o.character == character for o in objects):
            character = ""
        rotation, character_size = rng.uniform(-0.22, 0.22), rng.uniform(11, 13)
        objects.append(SceneObject(color, shape, character, x, y, radius, rotation, character_size))
    return objects


Asked = tuple[str, str, tuple[int, ...]]
"""Question, answer, and which of the objects one must see to answer (of a clip: which scenes)."""


def pair(obj: SceneObject) -> tuple[str, str]:
    """What names an object best."""
    return obj.color, obj.shape


def once(objects: Sequence[SceneObject], key: Callable[[SceneObject], object]) -> list[int]:
    """Numbers of the objects whose key is set and shared with no other object."""
    counts = Counter(map(key, objects))
    return [i for i, o in enumerate(objects) if key(o) and counts[key(o)] == 1]


def ask_color(objects: Sequence[SceneObject], rng: random.Random) -> Asked | None:
    """About the color of a shape that is there once."""
    if not (candidates := once(objects, lambda o: o.shape)):
        return None
    i = rng.choice(candidates)
    return f"what color is the {objects[i].shape} ?", objects[i].color, (i,)


def ask_shape(objects: Sequence[SceneObject], rng: random.Random) -> Asked | None:
    """About the shape of a color that is there once."""
    if not (candidates := once(objects, lambda o: o.color)):
        return None
    i = rng.choice(candidates)
    return f"what shape is the {objects[i].color} object ?", objects[i].shape, (i,)


def ask_exist(objects: Sequence[SceneObject], rng: random.Random, shapes: Sequence[str] = SHAPES) -> Asked | None:
    """Whether something is there. shapes: what may be asked for in vain."""
    if rng.random() < 0.5:
        target = rng.choice(objects)
        seen = tuple(i for i, o in enumerate(objects) if pair(o) == pair(target))
        return f"is there a {target.color} {target.shape} ?", "yes", seen
    present = set(map(pair, objects))
    for _ in range(20):  # mostly hard negatives: the colour of one object with the shape of another
        mix = rng.random()
        color = rng.choice(objects).color if mix < 0.75 else rng.choice(COLOR_NAMES)
        shape = rng.choice(objects).shape if mix > 0.35 else rng.choice(shapes)
        if (color, shape) not in present:
            return f"is there a {color} {shape} ?", "no", ()
    return None


def _ask_count(objects: Sequence[SceneObject], rng: random.Random) -> tuple[str, str] | None:
    kind = rng.random()
    if kind < 0.3:
        return "how many objects are there ?", str(len(objects))
    by_color = kind < 0.65
    counts = Counter(o.color if by_color else o.shape for o in objects)
    wanted = rng.choice((0, 1, 2, 2, 3))
    values = [v for v in (COLOR_NAMES if by_color else SHAPES) if counts[v] == wanted] or sorted(counts)
    value = rng.choice(values)
    return f"how many {value} {'objects' if by_color else 'shapes'} are there ?", str(counts[value])


def _ask_where(objects: Sequence[SceneObject], rng: random.Random) -> tuple[str, str] | None:
    if not (candidates := once(objects, pair)):
        return None
    target = objects[rng.choice(candidates)]
    return f"where is the {target.color} {target.shape} ?", target.quadrant


def _ask_read(objects: Sequence[SceneObject], rng: random.Random) -> tuple[str, str] | None:
    by_color = rng.random() < 0.5
    named = once(objects, lambda o: o.color if by_color else o.shape)
    candidates = [objects[i] for i in named if objects[i].character]
    if not candidates:
        return None
    target = rng.choice(candidates)
    name = f"{target.color} object" if by_color else target.shape
    return f"which character is on the {name} ?", target.character.lower()


def _ask_find(objects: Sequence[SceneObject], rng: random.Random) -> tuple[str, str] | None:
    if not (candidates := once(objects, lambda o: o.character)):
        return None
    target = objects[rng.choice(candidates)]
    if rng.random() < 0.5:
        return f"what color is the object with {target.character.lower()} ?", target.color
    return f"what shape is the object with {target.character.lower()} ?", target.shape


_ASKERS: dict[str, Callable[[Sequence[SceneObject], random.Random], Asked | tuple[str, str] | None]] = {
    "color": ask_color,
    "shape": ask_shape,
    "count": _ask_count,
    "exist": ask_exist,
    "where": _ask_where,
    "read": _ask_read,
    "find": _ask_find,
}
