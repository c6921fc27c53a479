"""`tokprune run`: one question about whole videos and pictures, answered by any VLM on fewer visual tokens."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tokprune.cli.run_video import Read, Reading, open_videos, parse_select, read
from tokprune.errors import OptionError, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")


def run(
    question: Annotated[str, typer.Option(help="What you want to know.")],
    video: Annotated[list[Path] | None, typer.Option(help="A video file; may be given several times.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    model: Annotated[str, typer.Option(help="A hub id or path, or the embedded demo VLM.")] = "demo",
    method: Annotated[str, typer.Option(help="A method, or several of different stages: quota+divprune.")] = "divprune",
    ratio: Annotated[float | None, typer.Option(help="Share of visual tokens kept; 0.1 if nothing is said.")] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens kept per video or picture, instead of --ratio.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="A field of the method: --option score=clip; of one of several: --option quota.score=clip."),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="demo, or open_clip:<model>/<weights>, for methods that compare text and pictures."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames read of a video; 16 if nothing is said.")] = None,
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
    positions: Annotated[str, typer.Option(help="Position ids of kept tokens: auto, keep or compact.")] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Also answer with all tokens.")] = False,
    strip: Annotated[Path | None, typer.Option(help="Draw what was kept of the first video (or picture).")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write answer, report and times to this file.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Ask any model about videos and pictures; print the answer, what was kept, and where the time went."""
    from rich.console import Console

    if not video and not image:
        raise OptionError("give something to look at: --video clip.mp4 or --image photo.jpg (or both).")
    if not question.strip():
        raise OptionError("--question is empty; write for example --question 'What happens?'")
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    if select is not None and frames is not None:
        raise OptionError("--select says how many frames, such as --select aks:16; leave out --frames.")
    if not video and any(v is not None for v in (frames, fps, start, end, select)):
        raise OptionError("--frames, --fps, --start, --end and --select are about --video, and none is given.")
    methods = build_methods(method, option or (), scorer)
    ratio = 0.1 if ratio is None and budget is None else ratio
    amount = {"ratio": ratio, "budget": budget}
    check_amount(methods, amount, positions)
    reading = Reading(frames, fps, start, end, backend, rule, parse_select(select))
    pictures = [_picture(path) for path in image or ()]
    files = open_videos(video or ())  # before the model: what is no video should not cost its loading
    loaded, processor = _load(model, bool(video), bool(image), device, dtype)
    eye = _scorer(scorer, model, methods, reading, processor, device)
    reads = [read(index, reading, question, eye, processor) for index in files]
    result = ask(loaded, processor, question, reads, pictures, methods, amount, positions, eye, max_new_tokens, compare)
    console = Console()
    console.print(result["answer"] or "(empty answer)", markup=False, highlight=False, soft_wrap=True)
    console.print()
    if compare:
        whole = result["unpruned"]
        console.print(f"all tokens: {whole['answer']}", markup=False, highlight=False, soft_wrap=True)
        console.print()
    console.print(str(result["report"]), markup=False, highlight=False, soft_wrap=True)
    for found in reads:
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    console.print(_times(result, compare), markup=False, highlight=False, soft_wrap=True)
    if strip is not None:
        _draw(strip, reads, pictures, result["streams"], processor, question)
        console.print(f"saved {strip}", soft_wrap=True)
    if json_file is not None:
        _write(json_file, result, reads, question, model)
        console.print(f"saved {json_file}", soft_wrap=True)


def build_methods(text: str, options: Sequence[str], scorer: str | None) -> list[Any]:
    """ "a+b" as methods, with their options; a scorer that is named is used by the frames method that can."""
    import dataclasses

    from tokprune.registry import get_method, method_class

    names = [part.strip() for part in text.replace(",", "+").split("+") if part.strip()]
    if not names:
        raise OptionError("--method is empty; write for example --method quota")
    known = {name: method_class(name).info.name for name in names}
    fields: dict[str, dict[str, Any]] = {name: {} for name in known.values()}
    for item in options:
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
            fields[name].setdefault("score", "clip")
    return [get_method(name, **given) for name, given in fields.items()]


def _value(text: str) -> Any:
    """An option's value: JSON where it is some, else the words themselves."""
    try:
        value = json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
    return tuple(value) if isinstance(value, list) else value


def check_amount(methods: Sequence[Any], amount: dict[str, Any], positions: str) -> None:
    """Refuse what cannot be asked for before a model is loaded."""
    from tokprune.config import PruneConfig

    PruneConfig.build(list(methods), positions=positions, **amount)


def _picture(path: Path) -> Any:
    from tokprune.cli.show import open_picture

    return open_picture(path)


def _load(name: str, video: bool, image: bool, device: str, dtype: str) -> tuple[Any, Any]:
    """The model and its processor; the demo has one model for clips and one for pictures."""
    import torch

    from tokprune.demo.models import load_model

    if name == "demo" and video and image:
        raise OptionError(
            "the embedded demo has one model for clips and one for pictures; give --video or --image, or a --model that knows both."
        )
    if name == "demo" and video:
        import tokprune.demo

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise OptionError(f"--device {device}: this torch sees no GPU; use --device cpu.")
        model: Any
        model, processor = tokprune.demo.load_clips(device=device)
    else:
        model, processor, _ = load_model(name, device)
    return (model if dtype == "auto" else model.to(getattr(torch, dtype))), processor


def _scorer(name: str | None, model: str, methods: Sequence[Any], reading: Reading, processor: Any, device: str) -> Any:
    """The text-image scorer: as named, or the demo's own where the demo model needs one."""
    from tokprune.cli.run_video import FEATURED, SCORED

    if name is None:
        asked = any(getattr(m, "score", None) == "clip" or "clip_image" in getattr(m, "needs", ()) for m in methods)
        if model != "demo" or not (asked or (reading.select and reading.select[0] in (*SCORED, *FEATURED))):
            return None
        name = "demo"
    from tokprune.adapters.scorers import load_scorer

    scorer = load_scorer(name, processor)
    inner = getattr(scorer, "model", getattr(scorer, "clip", None))
    if inner is not None and device != "cpu":
        inner.to(device)
    return scorer


def ask(
    model: Any,
    processor: Any,
    question: str,
    reads: Sequence[Read],
    pictures: Sequence[Any],
    methods: Sequence[Any],
    amount: dict[str, Any],
    positions: str,
    scorer: Any,
    max_new_tokens: int,
    compare: bool,
) -> dict[str, Any]:
    """The answer with the report and the times, and with `compare` the unpruned one."""
    import tokprune
    from tokprune.adapters.prompting import answer, build_inputs

    began = time.perf_counter()
    inputs = build_inputs(
        model, processor, question, images=list(pictures) or None, videos=[r.video for r in reads] or None
    )
    result: dict[str, Any] = {"prepare_seconds": time.perf_counter() - began}
    with tokprune.apply(
        model, list(methods), **amount, positions=positions, query=question, processor=processor, scorer=scorer
    ) as pruning:
        began = time.perf_counter()
        result["answer"] = answer(model, processor, inputs, max_new_tokens)[0]
        result["answer_seconds"] = time.perf_counter() - began
        result["report"] = pruning.report()
        result["streams"] = [] if pruning.last is None else pruning.last.streams
    if compare:
        began = time.perf_counter()
        text = answer(model, processor, inputs, max_new_tokens)[0]
        result["unpruned"] = {"answer": text, "answer_seconds": time.perf_counter() - began}
    return result


def _times(result: dict[str, Any], compare: bool) -> str:
    more = f", {result['unpruned']['answer_seconds']:.2f} s with all tokens (run second)" if compare else ""
    return f"prompt prepared in {result['prepare_seconds']:.2f} s, answered in {result['answer_seconds']:.2f} s{more}"


def _draw(
    path: Path, reads: Sequence[Read], pictures: Sequence[Any], streams: Sequence[Any], processor: Any, question: str
) -> None:
    """The first video as a strip, or the first picture as a sheet, with the kept patches bright."""
    from tokprune.viz.geometry import of_processor
    from tokprune.viz.strip import frame_strip

    kind = "video" if reads else "image"
    stream = next((s for s in streams if (s.layout.kind == "video") == bool(reads)), None)
    if stream is None:
        raise OptionError(
            f"--strip: the model was given the {kind} in another form (frames as pictures), so there is no strip to draw."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if reads:
            frames = reads[0].video.frames
            geometry = of_processor(processor, frames.shape[1:3], None, stream.layout)
            frame_strip(frames, stream.layout, stream.selection, geometry, title=question).save(path)
        else:
            from tokprune.cli.show import kept_sheet

            kept_sheet(pictures[0], question, [("kept", "", stream)], processor, "the tokens that were kept").save(path)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write {path}: {error}") from error


def _write(path: Path, result: dict[str, Any], reads: Sequence[Read], question: str, model: str) -> None:
    from tokprune.demo.models import machine

    videos = [
        {
            "path": str(r.video.path),
            "frames": r.video.indices.tolist(),
            "timestamps": r.video.timestamps.tolist(),
            "total": r.video.total,
            "rule": r.how or r.video.rule,
            "backend": r.video.backend,
            "reason": r.video.reason,
            "read_seconds": r.seconds,
            "select_seconds": r.select_seconds,
            "warnings": list(r.video.warnings),
        }
        for r in reads
    ]
    data = {
        "type": "tokprune.run",
        "version": 1,
        "model": model,
        "question": question,
        "command": " ".join(["tokprune", *sys.argv[1:]]),
        "environment": machine(),
        "videos": videos,
        **{k: v for k, v in result.items() if k not in ("report", "streams")},
        "report": result["report"].to_dict(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error}") from error
