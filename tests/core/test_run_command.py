"""`tokprune run`: the answer, the report and the pictures of real clips; and errors that say what to type."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tokprune
from tokprune.cli.app import app
from tokprune.errors import OptionError, TokpruneError, install_line
from tokprune.testing import build, picture
from tokprune.video import VideoError, read_video

av = pytest.importorskip("av", reason="tokprune[video]")

invoke = CliRunner().invoke


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A held-out clip of the demo, and a question about it."""
    from tokprune.demo import held_out_clips

    return held_out_clips(1, 0, tmp_path_factory.mktemp("clips"))[0]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL on disk, as from a hub."""
    folder = tmp_path_factory.mktemp("model")
    tiny = build("qwen2_5_vl")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def ask(*arguments: Any) -> Any:
    result = invoke(app, ["run", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout  # what a model's loading says goes to stderr


def test_a_clip_with_the_demo_model(clip: Any, tmp_path: Path) -> None:
    out = ask(
        *("--video", clip.path, "--question", clip.question, "--frames", 8),
        *("--method", "quota", "--ratio", 0.25, "--compare"),
        *("--strip", tmp_path / "strip.png", "--json", tmp_path / "run.json"),
    )
    data = json.loads((tmp_path / "run.json").read_text())
    answer, whole = out.splitlines()[0], next(line for line in out.splitlines() if line.startswith("all tokens: "))
    assert answer == data["answer"]
    assert whole == f"all tokens: {data['unpruned']['answer']}"
    assert data["answer"] == clip.answer, "seed 0 begins with a question that the demo answers right at 25 %"
    report = data["report"]
    assert (report["kept"], report["total"]) == (128, 512)
    assert sum(report["streams"][0]["frames"]) == 128
    assert len(report["streams"][0]["frames"]) == 8
    assert data["videos"][0]["frames"] == sorted(data["videos"][0]["frames"])
    assert data["videos"][0]["backend"] == "pyav"
    assert "128/512 tokens (25.0%)" in out
    assert "of 8 frames kept" in out
    assert "pyav (auto: exact in every container" in out
    from PIL import Image

    assert Image.open(tmp_path / "strip.png").width > 800


def test_frames_chosen_before_the_encoder(clip: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    out = ask(
        *("--video", clip.path, "--question", clip.question, "--select", "aks:3", "--fps", 4),
        *("--method", "uniform_frames+divprune", "--budget", 60, "--json", file),
    )
    data = json.loads(file.read_text())
    assert len(data["videos"][0]["frames"]) == 3
    assert data["videos"][0]["rule"].startswith("aks, 3 of ")
    assert data["videos"][0]["select_seconds"] > 0
    assert data["report"]["kept"] == 60
    assert "candidates (4 a second)" in out


def test_a_model_from_a_folder_with_a_picture_beside_the_clip(hub: Path, clip: Any, tmp_path: Path) -> None:
    picture(60, 40).save(tmp_path / "a.png")
    out = ask(
        *("--model", hub, "--video", clip.path, "--image", tmp_path / "a.png", "--question", "What?"),
        *("--fps", 1, "--start", 2, "--end", 6, "--method", "quota+divprune", "--option", "quota.score=self"),
        *("--ratio", 0.3, "--max-new-tokens", 3, "--dtype", "bfloat16", "--json", tmp_path / "run.json"),
    )
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["videos"][0]["timestamps"] == pytest.approx([2, 3, 4, 5], abs=0.2)
    kinds = [s["modality"] for s in data["report"]["streams"]]
    assert sorted(kinds) == ["image", "video"]
    assert "P(yes) by Qwen2_5_VLForConditionalGeneration itself" in out
    assert "not a video: 'divprune' alone" in out


def test_a_picture_alone(tmp_path: Path) -> None:
    from tokprune.demo import held_out

    example = held_out(1)[0]
    example.image.save(tmp_path / "a.png")
    out = ask(
        "--image", tmp_path / "a.png", "--question", example.question, "--strip", tmp_path / "kept.png", "--ratio", 0.5
    )
    assert "128/256 tokens (50.0%)" in out
    assert (tmp_path / "kept.png").exists()


def test_wrong_input_says_what_to_type(clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("tokprune.cli.run.load", lambda *a: pytest.fail("a model was loaded"))
    with wave.open(str(tmp_path / "talk.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(b"\0\0" * 4000)
    (tmp_path / "clip.mp4").write_bytes(Path(clip.path).read_bytes())
    here = ["--video", str(clip.path), "--question", "what ?"]
    cases: list[tuple[list[str], str]] = [
        (["--question", "what ?"], "--video clip.mp4"),
        ([*here[:2], "--question", " "], "--question is empty"),
        (["--video", str(tmp_path / "clap.mp4"), "--question", "q"], "clip.mp4"),
        (["--video", str(tmp_path / "talk.wav"), "--question", "q"], "no video stream"),
        ([*here, "--method", "quoat"], "quota"),
        ([*here, "--method", "quota+aks"], "two methods for the stage 'frames'"),
        ([*here, "--method", "quota", "--option", "scor=clip"], "score"),
        ([*here, "--method", "quota", "--option", "score"], "name=value"),
        ([*here, "--method", "quota+divprune", "--option", "score=clip"], "of which method"),
        ([*here, "--method", "quota", "--option", "divprune.x=1"], "not in --method"),
        ([*here, "--ratio", "2"], "ratio"),
        ([*here, "--ratio", "0.1", "--budget", "9"], "choose one"),
        ([*here, "--frames", "8", "--select", "aks:8"], "leave out --frames"),
        ([*here, "--select", "asks:8"], "aks"),
        ([*here, "--select", "aks"], "--select aks:16"),
        ([*here, "--dtype", "float61"], "float16"),
        (["--image", "a.png", "--question", "q", "--fps", "1"], "about --video"),
        (["--image", str(tmp_path / "no.png"), "--question", "q"], "no.png"),
    ]
    for arguments, words in cases:
        result = invoke(app, ["run", *arguments])
        assert isinstance(result.exception, TokpruneError), (arguments, result.exception)
        assert words in str(result.exception), arguments


def test_what_only_the_model_or_the_file_can_tell(hub: Path, clip: Any, tmp_path: Path) -> None:
    picture(60, 40).save(tmp_path / "a.png")
    both = ["run", "--video", str(clip.path), "--image", str(tmp_path / "a.png"), "--question", "q"]
    error = invoke(app, both).exception
    assert isinstance(error, OptionError)
    assert "one model for clips and one for pictures" in str(error)
    here = ["run", "--model", str(hub), "--video", str(clip.path), "--question", "q"]
    error = invoke(app, [*here, "--select", "aks:4"]).exception
    assert isinstance(error, OptionError)
    assert "--scorer open_clip:" in str(error)
    error = invoke(app, [*here, "--start", "500"]).exception
    assert isinstance(error, (OptionError, VideoError))
    assert "500" in str(error)
    if not torch.cuda.is_available():
        error = invoke(app, [*here, "--device", "cuda"]).exception
        assert "--device cpu" in str(error)


def test_a_missing_extra_names_the_line_to_type(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    error = invoke(app, ["run", "--video", str(clip.path), "--question", "q"]).exception
    assert isinstance(error, TokpruneError)
    assert install_line("video") in str(error)


def test_the_documented_composition_of_three_stages(clip: Any, tmp_path: Path) -> None:
    words = ["run", "--video", str(clip.path), "--frames", "8", "--question", clip.question, "--ratio", "0.25"]
    out = tmp_path / "x.json"
    result = invoke(app, [*words, "--method", "tome+quota+divprune", "--json", str(out)])
    assert result.exception is None, result.exception
    (stream,) = json.loads(out.read_text())["report"]["streams"]
    assert (stream["kept"], stream["total"]) == (128, 512)


def test_a_second_vlm_from_a_folder_judges_the_frames(hub: Path, clip: Any, tmp_path: Path) -> None:
    """`--scorer vlm:folder` is score="self" with that model; as many frames as QuoTA reads of a video so long."""
    file = tmp_path / "run.json"
    out = ask(
        *("--video", clip.path, "--question", "What?", "--frames", "quota:6:3600", "--model", hub),
        *("--method", "quota", "--scorer", f"vlm:{hub}", "--ratio", 0.5, "--max-new-tokens", 2, "--json", file),
    )
    assert "P(yes) by the scorer Qwen2_5_VLForConditionalGeneration" in out
    data = json.loads(file.read_text())
    (read,) = data["videos"]
    index = read_video(clip.path, frames=1)
    assert len(read["frames"]) == 6 + int(index.duration) == len(read_video(clip.path, frames="quota:6:3600"))
    assert data["report"]["kept"] == round(data["report"]["total"] / 2)
    error = invoke(
        app, ["run", "--video", str(clip.path), "--question", "q", "--method", "quota", "--scorer", f"vlm:{tmp_path}"]
    ).exception
    assert isinstance(error, OptionError)
    assert f"cannot load scorer 'vlm:{tmp_path}'" in str(error)


def test_apply_takes_the_name_of_a_second_vlm(hub: Path) -> None:
    from tokprune.adapters.prompting import build_inputs
    from tokprune.testing import clip as frames

    tiny, judge = build("qwen2_5_vl", seed=1), build("qwen2_5_vl")
    inputs = build_inputs(tiny.model, tiny.processor, "how many?", videos=[frames(6)])
    seen = []
    for scorer in (f"vlm:{hub}", (judge.model, judge.processor)):
        with tokprune.apply(tiny.model, "quota", ratio=0.5, score="self", scorer=scorer, processor=tiny.processor) as p:
            tiny.model(**inputs)
            (stream,) = p.report().streams
            seen.append((p.last.streams[0].selection.indices.tolist(), stream.signals))
    assert seen[0] == seen[1]
    assert any("P(yes) by the scorer" in source for source in seen[0][1].values())


def test_longer_context_scales_the_positions_while_the_answer_is_made(
    hub: Path, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokprune.cli import run

    seen: list[torch.Tensor] = []
    plain = run.ask

    def watch(request: Any, loaded: Any, *more: Any) -> Any:
        seen.append(
            next(b for n, b in loaded.model.named_buffers() if n.endswith("language_model.rotary_emb.inv_freq"))
        )
        return plain(request, loaded, *more)

    monkeypatch.setattr(run, "ask", watch)
    words = ["--model", hub, "--video", clip.path, "--question", "What?", "--frames", 2, "--max-new-tokens", 2]
    for factor in (1, 4):
        ask(*words, "--longer-context", factor)
    width = 2 * len(seen[0])
    base = 1 / seen[0][1] ** (width / 2)
    assert seen[0][0] == seen[1][0] == 1
    torch.testing.assert_close(seen[1][1], (base * 4 ** (width / (width - 2))) ** (-2 / width))
    error = invoke(app, ["run", *map(str, words), "--longer-context", "0.5"]).exception
    assert isinstance(error, OptionError)
    assert "at least 1" in str(error)


def test_both_times_of_a_comparison_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither run pays for what the first of its shapes costs: each is preceded by a short one of its own."""
    from tokprune.adapters import prompting

    asked: list[int] = []
    real = prompting.answer

    def noted(model: Any, processor: Any, inputs: Any, max_new_tokens: int = 64) -> list[str]:
        asked.append(max_new_tokens)
        return real(model, processor, inputs, max_new_tokens)

    monkeypatch.setattr(prompting, "answer", noted)
    scene = Path(__file__).parent.parent.parent / "docs" / "images" / "scene.png"
    words = ("--image", scene, "--question", "what color is the circle ?", "--max-new-tokens", 5)
    assert "(each after a warm-up)" in ask(*words, "--compare")
    assert asked == [2, 5, 2, 5]
    asked.clear()
    ask(*words)
    assert asked == [5]
