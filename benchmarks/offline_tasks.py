"""Makes the data of the offline benchmark tasks that come with the package: drawn scenes and clips, with balanced
answers.

    python benchmarks/offline_tasks.py                       both tasks, into tokprune/evaluation/tasks
    python benchmarks/offline_tasks.py --out DIR --tasks scenes

Equal versions of the generator give equal questions. Their scenes have seeds that neither the training of the demo VLM
nor
`tokprune demo` uses (SEED; the demo's default is 0). The pictures are lossless WebP, one copy per scene (lossy ones
cost the demo VLM seven points, because they halve the resolution of colours); the clips are the H.264 files that
tokprune.demo.clips writes.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokprune.demo.clips import SHORT_FRAMES, make_clip, write_clip
from tokprune.demo.clips_questions import CLIP_SHAPES, ask_clip
from tokprune.demo.scenes import CHARACTERS, COLOR_NAMES, HELD_OUT_SEED, SHAPES, ask, make_scene
from tokprune.evaluation import task_folder

SEED = 500  # of held-out scenes and clips: see scenes.held_out and clips.held_out_clips
SPAN = 1_000_000
SEARCH = 20_000  # scenes or clips to look at; a few hundred do
SCENE_QUESTIONS = 1120
CLIP_QUESTIONS = 540
QUESTIONS_PER_SOURCE = 4
# How many answers a type has, by which no answer comes much more often than its share; "find", "order": two kinds of
# names.
# "count" is asked of few large numbers, so fewer answers share it.
_NAMES = len(COLOR_NAMES) + len(SHAPES)
SCENE_ANSWERS = {
    "color": len(COLOR_NAMES),
    "shape": len(SHAPES),
    "count": 4,
    "exist": 2,
    "where": 4,
    "read": len(CHARACTERS),
    "find": _NAMES,
}
CLIP_ANSWERS = {
    "color": len(COLOR_NAMES),
    "shape": len(CLIP_SHAPES),
    "read": len(CHARACTERS),
    "exist": 2,
    "order": _NAMES,
    "count": 6,
}


def balanced(
    total: int, answers: Mapping[str, int], ask_of: Callable[[Any, Any, random.Random], Any], make: Callable[[int], Any]
) -> list[tuple[Any, Any]]:
    """`total` pairs of (source, question): equally many per type, no answer of a type much more often than its share.

    answers: number of answers there are, by type. make: the scene or clip of a seed. ask_of: a question about it, or
    None.
    """
    share, extra = divmod(total, len(answers))
    missing: Counter[str] = Counter({kind: share + (i < extra) for i, kind in enumerate(answers)})
    limits = {kind: -(-missing[kind] // n) + (n > 4) for kind, n in answers.items()}
    given: Counter[tuple[str, str]] = Counter()
    rows: list[tuple[Any, Any]] = []
    seed = HELD_OUT_SEED + SEED * SPAN
    while missing.total():
        if seed == HELD_OUT_SEED + SEED * SPAN + SEARCH:
            raise RuntimeError(f"{SEARCH} sources do not give {dict(+missing)}; the limits {limits} are too tight")
        source, rng = make(seed), random.Random(f"offline {seed}")
        seed += 1
        taken = 0
        # The types that lack most come first, so that rare ones do not remain for the end.
        for kind in sorted(answers, key=lambda kind: -missing[kind]):
            if taken == QUESTIONS_PER_SOURCE or not missing[kind]:
                break
            question = ask_of(source, kind, rng)
            if question is None or given[kind, question.answer] >= limits[kind]:
                continue
            given[kind, question.answer] += 1
            missing[kind] -= 1
            taken += 1
            rows.append((source, question))
    return rows


def in_turn(rows: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """The rows ordered so that types take turns: the first n of them are balanced, whatever n a --limit sets."""
    queues: dict[str, list[tuple[Any, Any]]] = {}
    for source, question in rows:
        queues.setdefault(question.type, []).append((source, question))
    rng = random.Random(SEED)
    for kind in sorted(queues):
        rng.shuffle(queues[kind])
    out = []
    while any(queues.values()):
        out += [queues[kind].pop() for kind in sorted(queues) if queues[kind]]
    return out


def write_scenes(folder: Path, total: int) -> dict[str, Any]:
    """questions.parquet: image (WebP bytes, stored once per scene), question, answer, type, scene."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = in_turn(balanced(total, SCENE_ANSWERS, lambda scene, kind, rng: ask(scene.objects, kind, rng), make_scene))
    pictures: dict[int, bytes] = {}
    for scene, _ in rows:
        if scene.seed not in pictures:
            buffer = io.BytesIO()
            scene.image.save(buffer, "WEBP", lossless=True, quality=80, method=4)
            pictures[scene.seed] = buffer.getvalue()
    features = datasets.Features(
        {
            "question_id": datasets.Value("int32"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "type": datasets.Value("string"),
            "scene": datasets.Value("int64"),
        }
    )
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for number, (scene, q) in enumerate(rows):
        values = (number, {"bytes": pictures[scene.seed], "path": None}, q.text, q.answer, q.type, scene.seed)
        for name, value in zip(features, values, strict=True):
            columns[name].append(value)
    table = pa.table(columns, schema=features.arrow_schema)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "questions.parquet"
    # One dictionary page for all pictures: each is stored once, however many questions show it.
    pq.write_table(table, file, row_group_size=len(rows), dictionary_pagesize_limit=64 << 20, compression="zstd")
    return {"questions": len(rows), "pictures": len(pictures), "bytes": file.stat().st_size}


def write_clips(folder: Path, total: int) -> dict[str, Any]:
    """clips/*.mp4 and questions.jsonl: video, question, answer, type, scenes, moment (seconds), frames."""
    rows = in_turn(balanced(total, CLIP_ANSWERS, lambda clip, kind, rng: ask_clip(clip.objects, kind, rng), make_clip))
    files = folder / "clips"
    shutil.rmtree(files, ignore_errors=True)
    names = {clip.seed: write_clip(clip, files / f"{clip.seed}.mp4").name for clip, _ in rows}
    lines = []
    for number, (clip, q) in enumerate(rows):
        row = {
            "question_id": number,
            "video": names[clip.seed],
            "question": q.text,
            "answer": q.answer,
            "type": q.type,
            "scenes": len(clip.takes),
            "moment": list(clip.moment(q.scenes) or ()),
            "frames": SHORT_FRAMES,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    size = sum(p.stat().st_size for p in [*files.iterdir(), folder / "questions.jsonl"])
    return {"questions": len(rows), "clips": len(names), "bytes": size}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=task_folder(), help="folder of the tasks (default: the package's)")
    parser.add_argument("--tasks", default="scenes,clips", help="which of them: scenes, clips")
    parser.add_argument("--scenes", type=int, default=SCENE_QUESTIONS, help="questions on scenes")
    parser.add_argument("--clips", type=int, default=CLIP_QUESTIONS, help="questions on clips")
    args = parser.parse_args(arguments)
    wanted = args.tasks.split(",")
    if unknown := set(wanted) - {"scenes", "clips"}:
        parser.error(f"unknown tasks {sorted(unknown)}; choose from scenes, clips")
    if "scenes" in wanted:
        print("tokprune_scenes", write_scenes(args.out / "tokprune_scenes", args.scenes))
    if "clips" in wanted:
        print("tokprune_clips", write_clips(args.out / "tokprune_clips", args.clips))


if __name__ == "__main__":
    main()
