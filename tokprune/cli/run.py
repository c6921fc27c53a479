"""`tokprune run`: one question about whole videos and pictures, answered by any VLM on fewer visual tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokprune.cli import options
from tokprune.cli.output import console_for, save_json, say_saved
from tokprune.cli.run_video import FEATURED, SCORED, Reading, VideoRead, parse_frames, parse_select, read_frames
from tokprune.environment import command_line, machine
from tokprune.errors import OptionError
from tokprune.files import read_picture, save_picture
from tokprune.loading import Loaded, LoadOptions, check_device, check_dtype, load, no_bars, split_methods
from tokprune.registry import get_method, method_class
from tokprune.types import JsonObject, Processor

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokprune.config import PruneConfig
    from tokprune.methods.base import Method
    from tokprune.report import Report
    from tokprune.runtime.encoder.report import EncoderReport
    from tokprune.runtime.records import StreamRecord


@dataclass(frozen=True)
class RunRequest:
    """What is asked, of what, and how. config: the pruning. scorer: the name of a text-image scorer."""

    question: str
    model: str
    config: PruneConfig
    reading: Reading
    scorer: str | None
    max_new_tokens: int
    compare: bool


@dataclass
class RunAnswer:
    """What came of it. unpruned: the answer with all tokens and its seconds, where it was asked for."""

    text: str
    report: Report | EncoderReport
    prepare_seconds: float
    answer_seconds: float
    streams: Sequence[StreamRecord] = field(default_factory=list)
    unpruned: tuple[str, float] | None = None


def run(  # the options of the command
    question: Annotated[str, typer.Option(help="What you want to know.")],
    video: Annotated[list[Path] | None, typer.Option(help="A video file; may be given several times.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    model: options.Model = "demo",
    method: Annotated[
        str | None,
        typer.Option(help="A method, or several of different stages: quota+divprune; divprune if nothing is said."),
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of visual tokens kept; 0.1 if nothing is said.")] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens kept per video or picture, instead of --ratio.")] = None,
    prompt_budget: Annotated[
        int | None, typer.Option(help="Tokens of the whole prompt, text included, instead of --ratio.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="A field of the method: --option score=clip; of one of several: --option quota.score=clip."),
    ] = None,
    config: options.Config = None,
    scorer: Annotated[
        str | None, typer.Option(help="demo, open_clip:<model>/<weights>, or vlm:<hub id> (asked about frames).")
    ] = None,
    frames: Annotated[
        str | None,
        typer.Option(help="Frames read of a video; 16 if nothing is said; quota: 96, and 64 more per hour (QuoTA)."),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second; with --frames, that many at most.")] = None,
    rule: Annotated[
        str, typer.Option(help="How --frames are spread: linspace_unique, linspace, linspace_rounded, centers, floor.")
    ] = "linspace_unique",
    start: Annotated[float | None, typer.Option(help="Read from this second.")] = None,
    end: Annotated[float | None, typer.Option(help="Read to this second.")] = None,
    select: Annotated[
        str | None,
        typer.Option(help="Choose frames before the encoder: RULE:N, such as aks:16, of candidates at --fps (1)."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Who decodes: auto, pyav, torchcodec, decord.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    positions: options.Positions = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Also answer with all tokens.")] = False,
    longer_context: Annotated[
        float,
        typer.Option(help="Let the LLM see so many times the positions it was trained on (NTK-aware RoPE scaling)."),
    ] = 1.0,
    strip: Annotated[Path | None, typer.Option(help="Draw what was kept of the first video (or picture).")] = None,
    json_file: options.Json = None,
    device: options.Device = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer alone.")] = False,
) -> None:
    """Ask any model about videos and pictures; print the answer, what was kept, and where the time went."""
    from tokprune.adapters.rope_scaling import longer_context as stretched
    from tokprune.config import PruneConfig
    from tokprune.video import scan

    count = parse_frames(frames)
    _check(question, video, image, model, Reading(count, fps, start, end), select)
    options.at_least_one(max_new_tokens=max_new_tokens)
    check_device(device)
    check_dtype(dtype)
    if config is not None:
        typed = {"method": method, "ratio": ratio, "budget": budget, "option": option, "positions": positions}
        pruning = options.config_of(config, **typed, prompt_budget=prompt_budget)
        pruning = dataclasses.replace(pruning, query=pruning.query or question)
    else:
        ratio = 0.1 if ratio is None and budget is None and prompt_budget is None else ratio
        methods = build_methods(method or "divprune", option or (), scorer)
        pruning = PruneConfig.build(methods, ratio, budget, positions, question, prompt_budget)
    reading = Reading(count, fps, start, end, backend, rule, parse_select(select))
    request = RunRequest(question, model, pruning, reading, scorer, max_new_tokens, compare)
    pictures = [read_picture(path) for path in image or ()]
    files = [scan(path) for path in video or ()]  # before the model: what is no video should not cost its loading
    with no_bars(quiet):
        loaded = load(model, LoadOptions(device, dtype), bool(video))
    judge = _scorer(request, loaded)
    reads = [read_frames(index, reading, question, judge, loaded.processor) for index in files]
    with contextlib.nullcontext() if longer_context == 1 else stretched(loaded.model, longer_context):
        answer = ask(request, loaded, reads, pictures, judge)
    console = console_for(json=json_file)
    _print(answer, reads, console, quiet)
    if strip is not None:
        say_saved(console, [_draw(strip, reads, pictures, answer.streams, loaded.processor, question)])
    save_json(console, json_file, _data(request, answer, reads))


def _check(
    question: str,
    video: Sequence[Path] | None,
    image: Sequence[Path] | None,
    model: str,
    reading: Reading,
    select: str | None,
) -> None:
    """Refuse what does not go together before anything is opened."""
    if not video and not image:
        raise OptionError("give something to look at: --video clip.mp4 or --image photo.jpg (or both).")
    if not question.strip():
        raise OptionError("--question is empty; write for example --question 'What happens?'")
    if select is not None and reading.frames is not None:
        raise OptionError("--select says how many frames, such as --select aks:16; leave out --frames.")
    if not video and (reading != Reading() or select is not None):
        raise OptionError("--frames, --fps, --start, --end and --select are about --video, and none is given.")
    if model == "demo" and video and image:
        raise OptionError(
            "the embedded demo has one model for clips and one for pictures; give --video or --image, or a --model "
            "that knows both."
        )


def build_methods(text: str, settings: Sequence[str], scorer: str | None) -> list[Method]:
    """ "a+b" as methods, with their options; a scorer that is named is used by the frames method that can."""
    fields: dict[str, JsonObject] = {name: {} for name in split_methods(text)}
    for item in settings:
        key, sign, value = item.partition("=")
        owner, dot, field = key.strip().rpartition(".")
        if not sign or not field:
            raise OptionError(f"--option {item!r} is not name=value; write for example --option score=clip")
        if not dot and len(fields) > 1:
            raise OptionError(f"--option {item!r}: of which method? Write --option {next(iter(fields))}.{item}")
        owner = owner or next(iter(fields))
        if owner not in fields:
            raise OptionError(f"--option {item!r} names {owner!r}, which is not in --method {text}.")
        fields[owner][field] = _value(value.strip())
    for name in fields:
        cls = method_class(name)
        scores = cls.stage == "frames" and any(f.name == "score" for f in dataclasses.fields(cls))
        if scorer is not None and scores:
            fields[name].setdefault("score", "self" if scorer.startswith("vlm:") else "clip")
    return [get_method(name, **values) for name, values in fields.items()]


def _value(text: str) -> object:
    """An option's value: JSON where it is some, else the words themselves."""
    try:
        value = json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
    return tuple(value) if isinstance(value, list) else value


def _scorer(request: RunRequest, loaded: Loaded) -> object:
    """The text-image scorer: as named, or the demo's own where the demo model needs one."""
    name, select = request.scorer, request.reading.select
    if name is None:
        methods = request.config.methods
        wanted = any(getattr(m, "score", None) == "clip" or "clip_image" in getattr(m, "needs", ()) for m in methods)
        if not loaded.embedded or not (wanted or (select is not None and select[0] in (*SCORED, *FEATURED))):
            return None
        name = "demo"
    from tokprune.runtime.scorers import load_scorer

    scorer = load_scorer(name, loaded.processor)
    inner = getattr(scorer, "model", getattr(scorer, "clip", None))
    if inner is not None:
        inner.to(loaded.model.device)
    return scorer


def ask(
    request: RunRequest, loaded: Loaded, reads: Sequence[VideoRead], pictures: Sequence[Image], scorer: object
) -> RunAnswer:
    """The answer with the report and the times, and with `compare` the unpruned one."""
    import tokprune
    from tokprune.adapters.prompting import answer, build_inputs

    model, processor, config = loaded.model, loaded.processor, request.config
    began = time.perf_counter()
    videos = [r.video for r in reads] or None
    inputs = build_inputs(model, processor, request.question, images=list(pictures) or None, videos=videos)
    prepared = time.perf_counter() - began

    def timed() -> tuple[str, float]:
        if request.compare:  # two times stand beside each other: neither pays for the first run of its shapes
            answer(model, processor, inputs, 2)
        began = time.perf_counter()
        text = answer(model, processor, inputs, request.max_new_tokens)[0]
        return text, time.perf_counter() - began

    with tokprune.apply(model, config, processor=processor, scorer=scorer) as pruning:
        text, seconds = timed()
        streams = [] if pruning.last is None else pruning.last.streams
        result = RunAnswer(text, pruning.report(), prepared, seconds, streams)
    if request.compare:
        result.unpruned = timed()
    return result


def _print(answer: RunAnswer, reads: Sequence[VideoRead], console: Console, quiet: bool) -> None:
    """The answer, and unless `quiet` what was kept and where the time went."""
    lines = [answer.text or "(empty answer)"]
    if answer.unpruned is not None:
        lines += ["", f"all tokens: {answer.unpruned[0]}"]
    if not quiet:
        more = "" if answer.unpruned is None else f", {answer.unpruned[1]:.2f} s with all tokens (each after a warm-up)"
        times = f"prompt prepared in {answer.prepare_seconds:.2f} s, answered in {answer.answer_seconds:.2f} s{more}"
        lines += ["", str(answer.report), *map(str, reads), times]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _draw(
    path: Path,
    reads: Sequence[VideoRead],
    pictures: Sequence[Image],
    streams: Sequence[StreamRecord],
    processor: Processor,
    question: str,
) -> Path:
    """The first video as a strip, or the first picture as a sheet, with the kept patches bright."""
    from tokprune.viz.kept import kept_on_clip, kept_on_image

    stream = next((s for s in streams if (s.layout.kind == "video") == bool(reads)), None)
    if stream is None:
        kind = "video" if reads else "image"
        raise OptionError(
            f"--strip: the model was given the {kind} in another form (frames as pictures), so there is no strip to "
            f"draw."
        )
    if reads:
        drawn = kept_on_clip(reads[0].video.frames, {question: [stream]}, processor)[0][1]
    else:
        note = "the tokens that were kept"
        drawn = kept_on_image(pictures[0], {"kept": stream}, processor, title=question, subtitle=note)
    return save_picture(drawn, path)


def _data(request: RunRequest, answer: RunAnswer, reads: Sequence[VideoRead]) -> dict[str, object]:
    """The answer as versioned plain data, with what was read and what it was made with."""
    data: dict[str, object] = {
        "type": "tokprune.run",
        "version": 1,
        "model": request.model,
        "question": request.question,
        "command": command_line(),
        "environment": machine(),
        "videos": [r.to_dict() for r in reads],
        "prepare_seconds": answer.prepare_seconds,
        "answer": answer.text,
        "answer_seconds": answer.answer_seconds,
        "report": answer.report.to_dict(),
    }
    if answer.unpruned is not None:
        data["unpruned"] = {"answer": answer.unpruned[0], "answer_seconds": answer.unpruned[1]}
    return data
