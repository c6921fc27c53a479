"""lmms-eval's own pope and videomme, prompts and metrics included, on local data in their published formats."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokprune.demo
from tests.evaluation.lmms_cli import Run, lmms_eval
from tokprune.adapters.prompting import answer, build_inputs
from tokprune.testing import build, picture
from tokprune.video import read_video
from tools.demo.evaluation import answer as demo_answer

pytest.importorskip("lmms_eval")
pytest.importorskip("av")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

OPTIONS = ["A. red", "B. green", "C. blue", "D. yellow"]
FRAMES = 4


def task_yaml(name: str, builder: str, extra: str) -> str:
    """The installed definition of a task with the place of its data exchanged."""
    spec = importlib.util.find_spec("lmms_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    original = Path(spec.submodule_search_locations[0]) / "tasks" / name / f"{name}.yaml"
    return f"include: {original}\ntask: {name}_local\ndataset_path: {builder}\ndataset_kwargs: {{{extra}}}\n"


def pope_question(example: Any) -> str:
    """As POPE words it: "Is there a red circle in the image?"."""
    return example.question.replace(" ?", " in the image?").capitalize()


def write_pope(folder: Path) -> list[Any]:
    """test-*.parquet with the columns of lmms-lab/POPE; half of the questions about drawn scenes have the answer
    yes."""
    examples = [e for e in tokprune.demo.held_out(84, seed=6) if e.type == "exist"]
    rows = [
        {
            "id": str(i),
            "question_id": str(i),
            "question": pope_question(e),
            "answer": e.answer,
            "image_source": f"scene_{i}",
            "image": e.image,
            "category": "random",
        }
        for i, e in enumerate(examples)
    ]
    features = datasets.Features({n: datasets.Image() if n == "image" else datasets.Value("string") for n in rows[0]})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "pope.parquet"))
    (folder / "pope.yaml").write_text(task_yaml("pope", "parquet", f"data_files: {{test: {folder}/pope.parquet}}"))
    return examples


def write_videomme(folder: Path, home: Path, missing: int = -1) -> list[dict[str, Any]]:
    """test.jsonl with the columns of Video-MME, and clips where its task looks for them; three rows share a video."""
    import av
    import numpy as np

    videos = home / "videomme" / "data"
    videos.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(6):
        name = f"vid{i // 3}"
        if i != missing and not (videos / f"{name}.mp4").exists():
            with av.open(str(videos / f"{name}.mp4"), "w") as container:
                stream: Any = container.add_stream("mpeg4", rate=8)
                stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
                for t in range(24):
                    pixels = np.asarray(picture(64, 64, seed=100 * i + t // 6))
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode())
        rows.append(
            {
                "video_id": f"{i // 3 + 1:03d}",
                "duration": "short",
                "domain": "Knowledge",
                "sub_category": "Astronomy",
                "url": "https://example.org",
                "videoID": name,
                "question_id": f"{i // 3 + 1:03d}-{i % 3 + 1}",
                "task_type": "OCR Problems",
                "question": f"Which colour comes at place {i}?",
                "options": OPTIONS,
                "answer": "ABCD"[i % 4],
            }
        )
    (folder / "videomme.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = f"data_files: {{test: {folder}/videomme.jsonl}}, video: true, cache_dir: videomme"
    (folder / "videomme.yaml").write_text(task_yaml("videomme", "json", data))
    return rows


def save_tiny(folder: Path) -> tuple[Any, Any]:
    """A tiny Qwen2.5-VL with random weights as a folder that `pretrained=` takes."""
    tiny = build("qwen2_5_vl")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return tiny.model, tiny.processor


def run_tiny(tmp_path: Path, tasks: str, **env: str) -> Run:
    arguments = f"pretrained={tmp_path}/tiny,method=divprune,ratio=0.5,frames={FRAMES},dtype=float32,max_new_tokens=6"
    return lmms_eval(tmp_path / "out", arguments, tasks, tmp_path / "tasks", **env)


def test_videomme_feeds_our_frames_and_prunes_them(tmp_path: Path) -> None:
    tasks, home = tmp_path / "tasks", tmp_path / "home"
    tasks.mkdir()
    rows = write_videomme(tasks, home)
    model, processor = save_tiny(tmp_path / "tiny")
    run = run_tiny(tmp_path, "videomme_local", HF_HOME=str(home))
    assert run.code == 0, run.output[-4000:]
    assert run.results is not None
    assert 0 <= run.results["results"]["videomme_local"]["videomme_perception_score,none"] <= 100
    samples = run.samples("videomme_local")
    assert len(samples) == 6
    with tokprune.apply(model, "divprune", ratio=0.5, processor=processor) as pruning:
        for row, sample in zip(rows, samples, strict=True):
            asked = sample["input"]
            assert row["question"] in asked
            assert "D. yellow" in asked
            video = read_video(home / "videomme" / "data" / f"{row['videoID']}.mp4", frames=FRAMES)
            inputs = build_inputs(model, processor, asked, videos=[video])
            with torch.no_grad():
                (said,) = answer(model, processor, inputs, max_new_tokens=6)
            assert sample["said"] == said
            assert sample["tokens"]["input_tokens"] == pruning.last.length
    costs = run.results["throughput"]
    assert costs["avg_keep_ratio"] == pytest.approx(0.5, abs=0.05)


def test_a_missing_video_is_an_error_with_its_row(tmp_path: Path) -> None:
    tasks, home = tmp_path / "tasks", tmp_path / "home"
    tasks.mkdir()
    write_videomme(tasks, home)
    (home / "videomme" / "data" / "vid1.mp4").unlink()
    save_tiny(tmp_path / "tiny")
    run = run_tiny(tmp_path, "videomme_local", HF_HOME=str(home))
    assert run.code != 0
    assert run.results is None
    assert "task 'videomme_local', doc_id 3" in run.output
    assert "vid1.mp4" in run.output


def test_pope_scores_the_demo_model(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    examples = write_pope(tasks)
    run = lmms_eval(tmp_path / "out", "pretrained=demo,method=divprune,ratio=0.25,batch_size=4", "pope_local", tasks)
    assert run.code == 0, run.output[-4000:]
    assert run.results is not None
    samples = run.samples("pope_local")
    assert len(samples) == len(examples) == 12
    said = [s["said"] for s in samples]
    assert set(said) == {"yes", "no"}
    model, processor = tokprune.demo.load()
    tokprune.apply(model, "divprune", ratio=0.25, processor=processor)
    for at in range(0, 12, 4):
        batch = examples[at : at + 4]
        direct = demo_answer(model, processor, [pope_question(e) for e in batch], [e.image for e in batch])
        assert said[at : at + 4] == direct
    hits = sum(w == e.answer for w, e in zip(said, examples, strict=True)) / len(examples)
    scores = run.results["results"]["pope_local"]
    assert scores["pope_accuracy,none"] == pytest.approx(hits)
    assert hits > 0.5
