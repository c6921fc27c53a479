"""`tokprune demo`: a sweep over keep ratios on pictures or clips, or the user's own picture or clip."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokprune.cli import options
from tokprune.cli.output import console_for, plain_table, progress_bar, save_json, say_saved
from tokprune.environment import command_line, machine
from tokprune.errors import OptionError, missing_extra
from tokprune.files import read_picture, save_picture
from tokprune.loading import LoadOptions, check_device, demo_scorer, load, no_bars

if TYPE_CHECKING:
    from tokprune.demo.asking import Answered, Asker, Medium
    from tokprune.demo.clips import ClipExample
    from tokprune.demo.scenes import Example
    from tokprune.demo.sweep import SettingResult

OWN_FRAMES = 8  # read from the user's own clip
FREE_ANSWER = 48  # tokens of a real model's answer to the user's own question


@dataclass(frozen=True)
class Defaults:
    """What is asked when nothing is said. drawn: how many pictures or clips `--overlays` draws."""

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    questions: int
    drawn: int


PICTURES = Defaults(("none", "random", "uniform", "divprune", "hired"), (1.0, 0.5, 0.25, 0.1, 0.05), 210, 4)
CLIPS = Defaults(("none", "uniform_frames", "quota", "evs", "vidcom2"), (0.5, 0.25, 0.1, 0.05), 30, 3)
LONG_CLIPS = Defaults(CLIPS.methods, CLIPS.ratios, 12, 3)


@dataclass(frozen=True)
class DemoRequest:
    """The options of `tokprune demo`, checked against each other."""

    methods: Sequence[str]
    ratios: Sequence[float]
    questions: int
    drawn: int
    model: str
    device: str
    seed: int
    quiet: bool
    video: bool
    long: bool
    json: Path | None
    overlays: Path | None
    image: Path | None
    clip: Path | None
    question: str | None


def demo(  # the options of the command
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out questions per cell; by default 210, of clips 30, of long ones 12."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "--method",
            help="Methods, separated by commas; by default none,random,uniform,divprune,hired, "
            "of clips none,uniform_frames,quota,evs,vidcom2.",
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            "--ratios",
            "--ratio",
            help="Keep ratios, separated by commas; by default 1,0.5,0.25,0.1,0.05, of clips all but the 1.",
        ),
    ] = None,
    json_file: options.Json = None,
    overlays: Annotated[Path | None, typer.Option(help="Save pictures of the kept tokens in this folder.")] = None,
    image: Annotated[Path | None, typer.Option(help="Ask about your own picture instead.")] = None,
    video: Annotated[bool, typer.Option("--video", help="Clips (mp4 files) instead of pictures.")] = False,
    long: Annotated[
        bool, typer.Option("--long", help="With --video: clips of 16 to 32 scenes, one of which matters.")
    ] = False,
    clip: Annotated[Path | None, typer.Option(help="Ask about your own clip instead.")] = None,
    question: Annotated[str | None, typer.Option(help="The question about --image or --clip.")] = None,
    model: options.Model = "demo",
    device: options.Device = "cpu",
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
    quiet: options.Quiet = False,
) -> None:
    """Ask the embedded VLM about pictures or clips at several keep ratios: accuracy, tokens, prefill time and FLOPs."""
    fields = dict(locals())  # each option is a field of the request
    fields["video"] = clips = video or clip is not None
    usual = LONG_CLIPS if long else CLIPS if clips else PICTURES
    fields["json"], fields["drawn"] = fields.pop("json_file"), usual.drawn
    fields["methods"] = usual.methods if methods is None else options.methods(methods)
    fields["ratios"] = usual.ratios if ratios is None else options.ratios(ratios)
    fields["questions"] = questions or usual.questions
    request = DemoRequest(**fields)
    _check(request)
    if question is not None:
        _ask_own(request)
    else:
        _sweep(request)


def _check(request: DemoRequest) -> None:
    """The error for options that do not go together."""
    if (request.image is None and request.clip is None) != (request.question is None):
        raise OptionError(
            "--image (or --clip) and --question go together: tokprune demo --image my.jpg --question "
            "'what color is the circle ?'"
        )
    if request.long and not request.video:
        raise OptionError("--long is about clips; write tokprune demo --video --long.")
    if request.image is not None and request.video:
        raise OptionError(
            "--image asks about a picture; leave out --video and --clip, or ask about a clip: --clip my.mp4."
        )
    if request.model != "demo" and request.video:
        raise OptionError(
            f"the clips are asked of the embedded model only; leave out --model {request.model}, or evaluate it with "
            "tokprune eval."
        )
    if request.question is not None and request.json is not None:
        raise OptionError(
            "--json holds the cells of a sweep; leave it out with --question, or write tokprune run --json."
        )
    if not request.methods or not request.ratios:
        raise OptionError("--methods or --ratios is empty; leave it out for the usual ones.")
    check_device(request.device)
    if request.video:
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise missing_extra("av", "video", "tokprune demo --video") from error


def open_asker(request: DemoRequest) -> Asker:
    """The model with the scorer that its methods need."""
    from tokprune.demo.asking import Asker

    with no_bars(request.quiet):
        loaded = load(request.model, LoadOptions(request.device), request.video)
    return Asker(loaded.model, loaded.processor, loaded.embedded, demo_scorer(loaded, request.methods))


def _sweep(request: DemoRequest) -> None:
    """Held-out scenes, or mp4 files of 3 to 8 scenes (16 to 32 with --long), at every method and ratio."""
    from tokprune.demo import held_out, held_out_clips
    from tokprune.demo.sweep import plan_cells

    console = console_for(request.quiet, request.json)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tokprune-clips-") as folder:
        examples: list[Example] | list[ClipExample]
        if request.video:
            examples = held_out_clips(request.questions, request.seed, folder, request.long)
            files = len({e.path for e in examples})
            console.print(
                f"{len(examples)} questions about {files} mp4 files (H.264), {examples[0].frames} frames of each, "
                "64 tokens a frame"
            )
        else:
            examples = held_out(request.questions, request.seed)
        asker = open_asker(request)
        plan = plan_cells(request.methods, request.ratios)
        cells = _ask_all(console, request, asker, examples, plan)
        if request.overlays is not None:
            say_saved(console, _draw_some(request, asker, examples, request.overlays))
    name = {False: request.model, True: "demo clips, long" if request.long else "demo clips"}[request.video]
    save_json(console, request.json, demo_data(name, cells, request.seed, len(examples)))
    console.print(f"{len(plan)} cells of {len(examples)} questions in {time.perf_counter() - started:.0f} s")


def _ask_all(
    console: Console,
    request: DemoRequest,
    asker: Asker,
    examples: Sequence[Example] | Sequence[ClipExample],
    plan: Sequence[tuple[str, float]],
) -> list[SettingResult]:
    """Every cell of the plan under one progress bar, then their table."""
    from tokprune.demo.sweep import run_cell

    cells = []
    with progress_bar(console, not request.quiet) as progress:
        bar = progress.add_task("asking", total=len(plan) * len(examples))
        # The same order of questions in every cell keeps the comparison paired.
        for method, ratio in plan:
            progress.update(bar, description=f"{method} at {ratio:g}")
            cells.append(run_cell(asker, examples, method, ratio, lambda n: progress.advance(bar, n)))
    console.print(_table(cells))
    for cell in cells:
        if cell.method == "none":
            types = ", ".join(f"{k} {v:.0%}" for k, v in cell.per_type.items())
            console.print(f"all tokens, by question type: {types}")
    return cells


def _table(cells: Sequence[SettingResult]) -> object:
    """The cells as a table; the baseline first, a line between methods."""
    base = next((c for c in cells if c.method == "none"), None)
    rows = []
    for c in cells:
        part = f" ({c.flops / base.flops:.0%})" if base and c is not base else ""
        kept, prefill = f"{c.kept:.0f}/{c.total:.0f}", f"{c.prefill_ms:.2f} ms"
        rows.append((c.method, f"{c.ratio:g}", kept, f"{c.accuracy:.1%}", prefill, f"{c.flops / 1e9:.3f} G{part}"))
    table = plain_table(("method", "keep ratio", "tokens", "accuracy", "prefill", "FLOPs/answer"), rows)
    for row, (now, after) in zip(table.rows, itertools.pairwise(cells), strict=False):
        row.end_section = now.method != after.method
    return table


def demo_data(model: str, cells: Sequence[SettingResult], seed: int, questions: int) -> dict[str, object]:
    """The cells with what they were measured on, versioned."""
    return {
        "type": "tokprune.demo",
        "version": 1,
        "model": model,
        "seed": seed,
        "questions": questions,
        "command": command_line(),
        "environment": machine(),
        "cells": [c.to_dict() for c in cells],
    }


def _draw_some(
    request: DemoRequest, asker: Asker, examples: Sequence[Example] | Sequence[ClipExample], folder: Path
) -> list[Path]:
    """What was kept of some examples at the ratio nearest to 10 %."""
    from tokprune.demo.asking import ONE_WORD, shown
    from tokprune.demo.clips import ClipExample
    from tokprune.demo.sweep import near_tenth, one_of_each_type

    ratio = near_tenth(request.ratios)
    methods = [m for m in request.methods if m != "none"]
    paths = []
    for i, example in enumerate(one_of_each_type(examples)[: request.drawn] if methods else ()):
        question = example.question if asker.embedded else example.question + ONE_WORD
        answers = [asker.ask(question, shown(example), m, ratio) for m in methods]
        name = f"kept_{i + 1}_{example.type}"
        if isinstance(example, ClipExample):
            name = f"{example.path.stem}-{example.type}"
        title = f"{example.question}  (right: {example.answer})"
        paths += save_kept(
            asker, shown(example), answers, folder / name, title, f"{ratio:.0%} of the visual tokens kept"
        )
    return paths


def save_kept(
    asker: Asker, medium: Medium, answers: Sequence[Answered], path: Path, title: str, note: str
) -> list[Path]:
    """Draw what each method kept: of a picture a sheet `path`.png, of a clip a strip `path`-METHOD.png each."""
    from PIL.Image import Image

    from tokprune.viz.kept import kept_on_clip, kept_on_image

    records = {a.method: a.stream for a in answers if a.stream is not None}
    if isinstance(medium, Image):
        captions = {a.method: f"answer: {a.text}" for a in answers if a.text}
        page = kept_on_image(medium, records, asker.processor, title=title, subtitle=note, captions=captions)
        return [save_picture(page, path.with_name(f"{path.name}.png"))]
    paths = []
    for a in (a for a in answers if a.method in records):
        heading = f"{title}, answer: {a.text}"
        for _, picture in kept_on_clip(medium, {a.method: [records[a.method]]}, asker.processor, title=heading):
            paths.append(save_picture(picture, path.with_name(f"{path.name}-{a.method}.png")))
    return paths


def _ask_own(request: DemoRequest) -> None:
    """The user's own picture or clip and question, at every method and ratio."""
    from tokprune.demo.sweep import near_tenth, plan_cells
    from tokprune.video import read_video

    question, console = request.question or "", console_for(request.quiet)
    medium: Medium
    if request.clip is not None:
        video = read_video(request.clip, frames=OWN_FRAMES)
        medium, source = video.frames, str(video)
    else:
        medium, source = read_picture(request.image or ""), ""
    asker = open_asker(request)
    tokens = None if asker.embedded else FREE_ANSWER
    answers = [
        asker.ask(question, medium, method, ratio, tokens)
        for method, ratio in plan_cells(request.methods, request.ratios)
    ]
    heads = ("method", "keep ratio", "tokens", "answer")
    counts = [f"{a.stream.kept}/{a.stream.total}" if a.stream else "" for a in answers]
    rows = [(a.method, f"{a.ratio:g}", kept, a.text) for a, kept in zip(answers, counts, strict=True)]
    console.print(plain_table(heads, rows, question, left=len(heads)))
    if source:
        console.print(source, markup=False, soft_wrap=True)
    if asker.embedded:
        console.print("The embedded model knows drawn shapes, colours and characters only; use --model for a real one.")
    drawn = [a for a in answers if a.method != "none" and a.ratio == near_tenth(request.ratios)]
    if request.overlays is not None and drawn:
        path = request.clip or request.image or Path("own")
        name = path.stem if request.clip is not None else f"kept_{path.stem}"
        note = "the kept tokens of each method"
        say_saved(console, save_kept(asker, medium, drawn, request.overlays / name, question, note))
