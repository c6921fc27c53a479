"""The data of the offline tasks: complete, balanced, readable, and in turns of types; no lmms-eval needed."""

from __future__ import annotations

import io
import json
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokprune.demo.scenes import CHARACTERS, COLOR_NAMES, HELD_OUT_SEED, QUESTION_TYPES, SHAPES, make_scene
from tokprune.evaluation import OFFLINE_TASKS, task_folder
from tokprune.evaluation.scoring import macro, right, score

SCENES, CLIPS = task_folder() / "tokprune_scenes", task_folder() / "tokprune_clips"
CLIP_TYPES = ("color", "count", "exist", "order", "read", "shape")
# The largest share that one answer may take of its type; a blind guesser gets no more.
MOST = {
    "color": 0.16,
    "shape": 0.17,
    "count": 0.26,
    "exist": 0.5,
    "where": 0.25,
    "read": 0.1,
    "find": 0.1,
    "order": 0.1,
}


@cache
def rows(task: str) -> list[dict[str, Any]]:
    if task == "tokprune_scenes":
        parquet = pytest.importorskip("pyarrow.parquet")
        return list(parquet.read_table(SCENES / "questions.parquet").to_pylist())
    return [json.loads(line) for line in (CLIPS / "questions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "least", "types", "wordings"),
    [(OFFLINE_TASKS[0], 1000, QUESTION_TYPES, 150), (OFFLINE_TASKS[1], 500, CLIP_TYPES, 140)],
)
def test_questions_are_many_and_balanced(task: str, least: int, types: tuple[str, ...], wordings: int) -> None:
    found = rows(task)
    assert len(found) >= least
    assert [r["question_id"] for r in found] == list(range(len(found)))
    counts = Counter(r["type"] for r in found)
    assert set(counts) == set(types)
    assert max(counts.values()) - min(counts.values()) <= 1
    for kind in types:
        answers = Counter(r["answer"] for r in found if r["type"] == kind)
        assert answers.most_common(1)[0][1] <= MOST[kind] * counts[kind] + 1, kind
    wording = Counter((r["question"], r["type"]) for r in found)
    assert len(wording) > wordings  # not one question over and over; clips have six shapes, pictures seven


@pytest.mark.parametrize("task", OFFLINE_TASKS)
def test_any_limit_is_balanced(task: str) -> None:
    found = rows(task)
    types = len({r["type"] for r in found})
    for limit in (types, 5 * types + 2, 20 * types):
        counts = Counter(r["type"] for r in found[:limit])
        assert len(counts) == types
        assert max(counts.values()) - min(counts.values()) <= 1


def test_pictures_are_the_scenes_pixel_by_pixel() -> None:
    for row in rows("tokprune_scenes")[::140]:
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        assert np.array_equal(picture, make_scene(row["scene"]).image)


def test_seeds_are_neither_the_trainings_nor_the_demos() -> None:
    for row in rows("tokprune_scenes"):
        assert HELD_OUT_SEED + 500_000_000 <= row["scene"] < HELD_OUT_SEED + 501_000_000


def test_clips_are_complete_mp4_files() -> None:
    pytest.importorskip("av")
    from tokprune.video import scan

    named = {r["video"] for r in rows("tokprune_clips")}
    assert named == {p.name for p in (CLIPS / "clips").iterdir()}
    for row in rows("tokprune_clips")[::90]:
        index = scan(CLIPS / "clips" / row["video"])
        assert index.size == (128, 128)
        assert index.total >= 8 * row["frames"] - 7
        assert all(0 <= t <= index.duration + 0.2 for t in row["moment"])


def test_the_package_stays_small() -> None:
    assert (SCENES / "questions.parquet").stat().st_size <= 6e6
    assert sum(p.stat().st_size for p in CLIPS.rglob("*") if p.is_file()) <= 8e6


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("blue", "blue"),
        ("Blue.", "blue"),
        ("The answer is: Blue", "blue"),
        ("Top left.", "top-left"),
        ("two", "2"),
        ("A", "a"),
        ("The character is an A.", "a"),
        ("It is a star.", "star"),
        ("Yes, there is one.", "yes"),
        ("There are 3.", "3"),
    ],
)
def test_right_answers_in_many_wordings(said: str, expected: str) -> None:
    assert right(said, expected)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", "blue"),
        ("not blue", "blue"),
        ("top", "top-left"),
        ("12", "2"),
        ("no", "yes"),
        ("the", "a"),
        ("bluebird", "blue"),
    ],
)
def test_wrong_answers(said: str, expected: str) -> None:
    assert not right(said, expected)


@pytest.mark.parametrize("word", [*COLOR_NAMES, *SHAPES, *CHARACTERS, "0", "8", "yes", "no", "bottom-right"])
def test_every_answer_is_right_for_itself_only(word: str) -> None:
    assert right(word, word)
    assert not any(right(word, other) for other in (*COLOR_NAMES, *SHAPES) if other != word)


def test_the_macro_mean_weighs_types_equally() -> None:
    said = [("red", "red", "color"), ("red", "blue", "color"), ("star", "star", "shape")]
    found = [score(*row) for row in said]
    assert macro([f["macro"] for f in found]) == pytest.approx(0.75)
    assert found[0]["color"] == 1.0
    assert set(found[2]) == {"accuracy", "macro", "shape"}


def test_the_same_questions_come_out_again(tmp_path: Any) -> None:
    pytest.importorskip("datasets")
    from benchmarks import offline_tasks

    made = offline_tasks.balanced(
        70, offline_tasks.SCENE_ANSWERS, lambda s, k, rng: offline_tasks.ask(s.objects, k, rng), make_scene
    )
    again = offline_tasks.balanced(
        70, offline_tasks.SCENE_ANSWERS, lambda s, k, rng: offline_tasks.ask(s.objects, k, rng), make_scene
    )
    assert [(s.seed, q) for s, q in made] == [(s.seed, q) for s, q in again]
    summary = offline_tasks.write_scenes(tmp_path / "scenes", 14)
    assert summary["questions"] == 14
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "scenes" / "questions.parquet")
    assert [r["type"] for r in table.to_pylist()[:7]] == sorted(QUESTION_TYPES)
