"""The clip model's training sees what the model sees, learns only what it should, and goes through every stage."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from tokprune import demo
from tokprune.demo.asking import Asker
from tokprune.demo.clips import make_clip, make_take
from tokprune.demo.clips_questions import ClipQuestion
from tools.demo import train_clips
from tools.demo.clips_data import (
    SHARES,
    TakeSet,
    feature_tower,
    features_of,
    take_of,
    through_h264,
    tokens_on,
)
from tools.demo.clips_network import start_from
from tools.demo.clips_qa import ClipAnswerer, memories, sample_clip_questions
from tools.demo.clips_recipe import miniature
from tools.demo.vocabulary import CLIP_WORDS, WORDS, encode

DEVICE = torch.device("cpu")


def test_cached_features_give_the_answers_of_the_real_forward():
    model, processor = demo.load_clips()
    frames = np.stack(list(make_clip(3).frames()))[::8]
    questions = ["what color is the star ?", "how many scenes are there ?"]
    cached = features_of(feature_tower(DEVICE, torch.float32), frames).flatten(0, 1)[None]  # (1, 8 * 64, D)
    with torch.no_grad():
        packed = ClipAnswerer(model, 0)(cached, [[ClipQuestion("color", text, "red") for text in questions]])[0]
        inputs = Asker(model, processor).prepare(questions, [frames, frames])
        real = model(**inputs).logits[:, -1]
    assert real.shape == (2, len(CLIP_WORDS))
    assert torch.allclose(packed[0], real, atol=2e-3), (packed[0] - real).abs().max()


def test_the_new_layers_change_nothing_at_first():
    image_model = demo.load()[0]
    model = start_from(image_model, 2, torch.Generator().manual_seed(0))
    ids = torch.tensor([encode("<s> user: what color is the star ? assistant:")])
    with torch.no_grad():
        new, old = model(input_ids=ids).logits, image_model(input_ids=ids).logits
    assert torch.allclose(new[..., : len(WORDS)], old, atol=1e-4)
    words = model.model.language_model.embed_tokens.weight.detach()
    assert float((words[len(WORDS) :] @ words[: len(WORDS)].T).abs().max()) < 1e-3


def test_memories_tell_what_came_before():
    objects = [
        make_take(i, *kind).start for i, kind in enumerate([("red", "star"), ("blue", "star"), ("red", "cross")])
    ]
    first, second, third = memories(objects)
    assert first == [0, 0, 0, 0, 0]
    assert second[2:] == [1, 0, 1]
    assert third[:2] != second[:2]
    assert third[2:] == [2, 1, 0]


def test_composed_clips_name_their_scenes():
    features = np.zeros((112, 2, 64, 128), np.float16)
    features += np.arange(112, dtype=np.float16)[:, None, None, None]
    takes = TakeSet("validation", features)
    rng = random.Random(0)
    for frames in (4, 8, 32):
        clip = takes.compose(frames, rng)
        assert len(clip.frames) == frames
        assert [take for _, take, _ in clip.frames] == [clip.takes[scene] for scene, _, _ in clip.frames]
        assert sorted({scene for scene, _, _ in clip.frames}) == list(range(len(clip.takes)))
        rows = takes.take_features([clip], DEVICE).view(frames, 64, 128)
        assert rows[:, 0, 0].tolist() == [take for _, take, _ in clip.frames]
        scenes = takes.token_scenes([clip]).view(frames, 64)
        for place, (scene, take, moment) in enumerate(clip.frames):
            on = torch.from_numpy(tokens_on(takes.takes[take].at(SHARES[moment]), 8))
            assert set(scenes[place][on].tolist()) == {scene}
            assert set(scenes[place][~on].tolist()) == {-1}
        for question in sample_clip_questions(takes.objects(clip), miniature().answer, rng):
            assert frames < 32 or question.type not in ("order", "count")


def test_h264_keeps_frames_in_order():
    frames = np.concatenate([take_of("validation", i).draw(SHARES) for i in range(6)])
    back = through_h264(frames)
    assert back.shape == frames.shape
    error = np.abs(back.astype(int)[:, None] - frames[None]).mean((2, 3, 4))
    assert (error.argmin(1) // 2 == np.arange(12) // 2).all()
    assert 0 < np.diag(error).mean() < 6


@pytest.mark.slow
def test_every_stage_runs_and_stops_where_it_was(tmp_path):
    recipe = miniature()
    train_clips.run(tmp_path, recipe, workers=1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recipe"]["seed"] == recipe.seed
    assert report["model_bytes"] < 12 << 20
    assert set(report["held_out"]) == {"short", "long"}
    for results in report["held_out"].values():
        assert {"all_tokens", "no_video", "wrong_video", "chance"} <= set(results)
    model, _ = demo.load_clips(folder=tmp_path / "model")
    trained = torch.load(tmp_path / "refine.pt", weights_only=True)["projector.linear_1.weight"]
    assert torch.allclose(model.model.multi_modal_projector.linear_1.weight, trained, atol=2e-3)
    before = (tmp_path / "refine.pt").stat().st_mtime_ns
    train_clips.run(tmp_path, recipe, workers=1)
    assert (tmp_path / "refine.pt").stat().st_mtime_ns == before
    with pytest.raises(RuntimeError, match="another recipe"):
        train_clips.run(tmp_path, dataclasses.replace(recipe, seed=1), workers=1)
