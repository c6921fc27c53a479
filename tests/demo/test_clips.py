"""Clips: the same for the same seed, unambiguous, balanced, real H.264."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from tokprune.demo.clips import (
    FPS,
    LONG_FRAMES,
    SHORT_FRAMES,
    STEP,
    DemoClip,
    frames_per_scene,
    held_out_clips,
    make_clip,
    make_take,
    plan_objects,
)
from tokprune.demo.clips_questions import CLIP_QUESTION_TYPES, MOMENT_TYPES, NEEDLE_TYPES, ask_clip
from tokprune.demo.scenes import COLOR_NAMES, SHAPES
from tools.demo.vocabulary import CLIP_WORD_IDS, CLIP_WORDS, WORDS, encode


def truths(question: str, objects) -> set[str]:
    """Every answer that is right for some reading of a question, worked out from its words alone."""
    words = question.removesuffix(" ?").split()
    colors = [w for w in words if w in COLOR_NAMES]
    shapes = [w for w in words if w in SHAPES]
    named = [
        i
        for i, o in enumerate(objects)
        if (not colors or o.color == colors[0]) and (not shapes or o.shape == shapes[0])
    ]
    if words[:2] == ["is", "there"]:
        return {"yes" if named else "no"}
    if words[:2] == ["how", "many"]:
        return {str(len(objects) if "scenes" in words else len(named))}
    if "first" in words or "last" in words:
        named = [0 if "first" in words else len(objects) - 1]
    elif "after" in words or "before" in words:
        named = [i + (1 if "after" in words else -1) for i in named]
        named = [i for i in named if 0 <= i < len(objects)]
    value = {"color": "color", "shape": "shape", "character": "character"}[words[1]]
    return {getattr(objects[i], value).lower() for i in named}


@pytest.mark.parametrize("long", [False, True])
def test_every_question_has_one_answer(long):
    asked = Counter()
    for seed in range(150):
        objects = make_clip(seed, long).objects
        for kind in CLIP_QUESTION_TYPES:
            if (question := ask_clip(objects, kind, random.Random(seed))) is not None:
                assert truths(question.text, objects) == {question.answer}, (question, objects)
                assert encode(question.text, CLIP_WORD_IDS)
                assert question.answer in CLIP_WORD_IDS
                asked[kind] += 1
    assert set(asked) == set(CLIP_QUESTION_TYPES)
    assert all(asked[kind] > 60 for kind in MOMENT_TYPES)


def test_unknown_type():
    with pytest.raises(ValueError, match="choose from color, shape"):
        ask_clip(make_clip(0).objects, "where", random.Random(0))  # type: ignore[arg-type]


def test_the_words_of_the_image_model_keep_their_numbers():
    assert CLIP_WORDS[: len(WORDS)] == WORDS
    assert len(set(CLIP_WORDS)) == len(CLIP_WORDS)


@pytest.mark.parametrize("long", [False, True])
def test_clips_are_made_as_promised(long):
    lengths = set()
    for seed in range(60):
        clip = make_clip(seed, long)
        frames = LONG_FRAMES if long else SHORT_FRAMES
        assert clip == make_clip(seed, long)
        assert clip != make_clip(seed + 1, long)
        assert clip.length == STEP * (frames - 1) + 1
        shown = {sum(start <= point for start in clip.starts) - 1 for point in range(0, clip.length, STEP)}
        assert shown == set(range(len(clip.takes))), "a scene is between the frames that are read"
        kinds = [(o.color, o.shape) for o in clip.objects]
        assert all(a != b for a, b in itertools.pairwise(kinds))
        lengths.add(len(kinds))
        if long:
            assert len(set(kinds)) == len(kinds)
    assert min(lengths) >= (16 if long else 3)
    assert max(lengths) <= (32 if long else 8)
    assert len(lengths) >= 5


def test_plan_has_something_to_count():
    rng = random.Random(0)
    most = Counter(max(Counter(c for c, _ in plan_objects(8, rng)).values()) for _ in range(300))
    assert most[4] > 10
    assert most[5] > 10
    assert most[1] + most[2] > 50


def test_spread_gives_every_scene_a_frame():
    rng = random.Random(1)
    for scenes in (1, 3, 8):
        shown = frames_per_scene(scenes, 8, rng)
        assert len(shown) == scenes
        assert sum(shown) == 8
        assert min(shown) >= 1


def test_within_a_scene_frames_hardly_change():
    clip = make_clip(5)
    frames = np.stack(list(clip.frames())).astype(float)
    assert frames.shape == (clip.length, 128, 128, 3)
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    cuts = np.array(clip.starts[1:]) - 1
    within = np.delete(change, cuts)
    assert within.max() < 2
    assert change[cuts].min() > 3 * within.max()
    assert within.mean() > 0, "the object does not move"


def test_a_take_keeps_its_object_inside():
    for seed in range(200):
        take = make_take(seed, "red", "star")
        for share in (0.0, 0.5, 1.0):
            obj = take.at(share)
            assert 15 < obj.x < 113
            assert 15 < obj.y < 113
            assert replace(obj, x=0, y=0) == replace(take.start, x=0, y=0)


def test_moment():
    takes = tuple(make_take(i, "red", "star") for i in range(3))
    clip = DemoClip(0, takes, (0, 16, 40), 57)
    assert clip.moment((1,)) == (16 / FPS, 40 / FPS)
    assert clip.moment((1, 2)) == (16 / FPS, 57 / FPS)
    assert clip.moment(()) is None


def test_held_out_is_balanced_and_real(tmp_path):
    pytest.importorskip("av")
    import av

    examples = held_out_clips(36, 1, tmp_path)
    assert examples == held_out_clips(36, 1, tmp_path)
    assert Counter(e.type for e in examples) == dict.fromkeys(CLIP_QUESTION_TYPES, 6)
    answers = defaultdict(Counter)
    for example in examples:
        answers[example.type][example.answer] += 1
    assert answers["exist"] == {"yes": 3, "no": 3}
    assert max(answers["count"].values()) <= 1
    assert max(Counter(e.path for e in examples).values()) <= 4
    assert all((e.moment is None) == (e.type == "count" or (e.type, e.answer) == ("exist", "no")) for e in examples)
    with av.open(examples[0].path) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height, float(stream.average_rate)) == (128, 128, FPS)


def test_files_show_what_was_drawn(tmp_path):
    pytest.importorskip("av")
    from tokprune.video import read_video

    example = held_out_clips(4, 2, tmp_path, types=("color",))[0]
    video = read_video(example.path, frames=example.frames)
    assert video.frames.shape == (8, 128, 128, 3)
    assert list(video.indices) == list(range(0, 57, 8))
    clip = make_clip(int(example.path.stem.split("-")[1]))
    drawn = np.stack(list(clip.frames()))[::8]
    assert np.abs(video.frames.astype(int) - drawn).mean() < 5
    again = held_out_clips(4, 2, tmp_path / "again", types=("color",))[0]
    assert again.path.read_bytes() == example.path.read_bytes()


def test_long_clips(tmp_path):
    pytest.importorskip("av")
    examples = held_out_clips(4, 0, tmp_path, long=True)
    assert {e.frames for e in examples} == {32}
    assert all(16 <= e.scenes <= 32 for e in examples)
    assert Counter(e.type for e in examples) == dict.fromkeys(NEEDLE_TYPES, 2)
    assert all(end - start < 32 for start, end in (e.moment for e in examples if e.moment))


@pytest.mark.parametrize(("arguments", "message"), [({"questions": 0}, "at least one"), ({"seed": 1000}, "0..999")])
def test_what_cannot_be_held_out(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        held_out_clips(**{"questions": 2, "folder": tmp_path, **arguments})
