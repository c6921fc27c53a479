"""`tokprune demo --video`: the sweep over clips, the frame strips, and the user's own clip."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokprune.cli.demo import ask_cells, scorer_for, write_json
from tokprune.errors import OptionError, missing_extra

METHODS = ("none", "uniform_frames", "quota", "evs", "vidcom2")
RATIOS = (0.5, 0.25, 0.1, 0.05)
QUESTIONS, LONG_QUESTIONS = 30, 12
SHOWN = 3  # clips with strips
OWN_FRAMES = 8  # read from the user's own clip


def need_video() -> None:
    """The error with the line to install, where the video extra is missing."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise missing_extra("av", "video", "tokprune demo --video") from error


def check_clip_options(video: bool, long: bool, image: Path | None, clip: Path | None, model: str) -> None:
    """The error for options that do not go together."""
    if long and not video:
        raise OptionError("--long is about clips; write tokprune demo --video --long.")
    if image is not None and (video or clip is not None):
        raise OptionError(
            "--image asks about a picture; leave out --video and --clip, or ask about a clip: --clip my.mp4."
        )
    if model != "demo" and (video or clip is not None):
        raise OptionError(
            f"the clips are asked of the embedded model only; leave out --model {model}, or evaluate it with tokprune eval."
        )


def run_video_demo(
    questions: int | None,
    methods: Sequence[str] | None,
    ratios: Sequence[float] | None,
    json_file: Path | None,
    overlays: Path | None,
    device: str,
    seed: int,
    quiet: bool,
    long: bool,
) -> None:
    """The sweep over held-out mp4 files: 7 s of 3 to 8 scenes, or 31 s of 16 to 32."""
    need_video()
    from tokprune.budget import check_ratio
    from tokprune.demo import held_out_clips, load_clips
    from tokprune.demo.sweep import plan_cells
    from tokprune.demo.video_sweep import ClipReader, run_clip_cell
    from tokprune.registry import method_class

    methods, ratios = methods or METHODS, ratios or RATIOS
    for method in methods:
        method_class(method)
    for ratio in ratios:
        check_ratio(ratio)
    console = Console(quiet=quiet)
    started = time.perf_counter()
    count = questions or (LONG_QUESTIONS if long else QUESTIONS)
    with tempfile.TemporaryDirectory(prefix="tokprune-clips-") as folder:
        examples = held_out_clips(count, seed, folder, long)
        model, processor = load_clips(device=device)
        reader, scorer = ClipReader(), scorer_for(True, methods, device)
        files = len({e.path for e in examples})
        console.print(
            f"{len(examples)} questions about {files} mp4 files (H.264), {examples[0].frames} frames of each, 64 tokens a frame"
        )
        plan = plan_cells(methods, ratios)
        cells = ask_cells(
            console,
            plan,
            len(examples),
            quiet,
            lambda method, ratio, tick: run_clip_cell(
                model, processor, examples, reader, method, ratio, scorer=scorer, tick=tick
            ),
        )
        if overlays is not None:
            pruning = [m for m in methods if m != "none"]
            chosen = _one_of_each_type(examples)[:SHOWN]
            for example in chosen:
                video = reader(example.path, example.frames)
                title = f"{example.question}  (right: {example.answer})"
                name = f"{example.path.stem}-{example.type}"
                for path in save_strips(
                    model, processor, video, example.question, pruning, ratios, overlays, name, title, scorer
                ):
                    console.print(f"saved {path}", soft_wrap=True)
        if json_file is not None:
            write_json(json_file, "demo clips, long" if long else "demo clips", cells, seed, len(examples))
            console.print(f"saved {json_file}", soft_wrap=True)
    console.print(f"{len(plan)} cells of {len(examples)} questions in {time.perf_counter() - started:.0f} s")


def _one_of_each_type(examples: Sequence[Any]) -> list[Any]:
    """The first question of each type that is about another clip than those before."""
    chosen: list[Any] = []
    for example in examples:
        if example.type not in {e.type for e in chosen} and example.path not in {e.path for e in chosen}:
            chosen.append(example)
    return chosen


def near_tenth(ratios: Sequence[float]) -> float:
    """The ratio nearest to 10 %, at which pictures are drawn."""
    return min(ratios, key=lambda r: abs(r - 0.1))


def save_strips(
    model: Any,
    processor: Any,
    video: Any,
    question: str,
    methods: Sequence[str],
    ratios: Sequence[float],
    folder: Path,
    name: str,
    title: str,
    scorer: Any,
) -> list[Path]:
    """One strip per method: every frame with its kept tokens and its share of the budget, at the ratio nearest to 10 %."""
    from tokprune.demo.video_sweep import ask_clip_at
    from tokprune.viz.kept import kept_on_clip

    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for method in methods:
            answer, stream = ask_clip_at(model, processor, video, question, method, near_tenth(ratios), scorer)
            heading = f"{title}, answer: {answer}"
            for _, picture in kept_on_clip(video.frames, {method: [stream]}, processor, title=heading):
                path = folder / f"{name}-{method}.png"
                picture.save(path)
                paths.append(path)
    except OSError as error:
        raise OptionError(f"cannot write pictures to {folder}: {error}") from error
    return paths


def run_own_clip(
    clip: Path,
    question: str,
    methods: Sequence[str] | None,
    ratios: Sequence[float] | None,
    device: str,
    overlays: Path | None,
) -> None:
    """The user's own clip and question, at every method and ratio."""
    need_video()
    from tokprune.demo import load_clips
    from tokprune.demo.sweep import plan_cells
    from tokprune.demo.video_sweep import ask_clip_at
    from tokprune.video import read_video

    methods, ratios = methods or METHODS, ratios or RATIOS
    video = read_video(clip, frames=OWN_FRAMES)
    model, processor = load_clips(device=device)
    scorer = scorer_for(True, methods, device)
    console = Console()
    table = Table(title=escape(question), title_justify="left", header_style="bold")
    for column in ("method", "keep ratio", "tokens", "answer"):
        table.add_column(column)
    for method, ratio in plan_cells(methods, ratios):
        answer, stream = ask_clip_at(model, processor, video, question, method, ratio, scorer)
        table.add_row(method, f"{ratio:g}", f"{stream.kept}/{stream.total}" if stream else "", escape(answer))
    console.print(table)
    console.print(f"{video}; the embedded model knows drawn shapes, colours and characters only.", soft_wrap=True)
    if overlays is not None:
        pruning = [m for m in methods if m != "none"]
        for path in save_strips(
            model, processor, video, question, pruning, ratios, overlays, clip.stem, question, scorer
        ):
            console.print(f"saved {path}", soft_wrap=True)
