"""What `tokprune profile` measures: a model with a prompt around a picture, a clip or a wanted number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from numpy import uint8
from numpy.typing import NDArray
from PIL import Image

from tokprune.adapters.prompting import build_inputs
from tokprune.cli import options
from tokprune.cli.plan import folder_of
from tokprune.config import PruneConfig
from tokprune.demo.scenes import held_out
from tokprune.errors import OptionError
from tokprune.files import read_picture
from tokprune.loading import Loaded, LoadOptions, check_device, check_dtype, demo_scorer, load, no_bars
from tokprune.profiling.build import build_random
from tokprune.profiling.inputs import random_inputs
from tokprune.profiling.loaded import preset_of_folder
from tokprune.profiling.memory import readable
from tokprune.profiling.presets import Preset, preset
from tokprune.profiling.published import comparison, measured_in
from tokprune.profiling.report import ProfileReport
from tokprune.profiling.resize import at_count, preset_size, scaled_frames, scaled_picture, shrinking
from tokprune.profiling.runs import is_out_of_memory, visual_columns
from tokprune.runtime.records import StreamRecord
from tokprune.types import VLM, Fields, Inputs, JsonObject, MethodLike, Processor
from tokprune.video import Video, read_video
from tokprune.viz.kept import kept_on_clip, kept_on_image

PICTURE = 768  # side of the drawn picture that a real model is shown when none is given
FRAMES = 8


@dataclass(frozen=True)
class ProfileRequest:
    """The options of `tokprune profile`. methods: names, with "+" of several of different stages."""

    model: str = "demo"
    preset: str | None = None
    flops_only: bool = False
    random_weights: bool = False
    methods: Sequence[str] = ("divprune",)
    ratios: Sequence[float] = (0.5, 0.1)
    image: Path | None = None
    video: Path | None = None
    frames: int | None = None
    tokens: int | None = None
    question: str = ""
    text: int = 64
    batch: int = 1
    new_tokens: int = 16
    repeats: int = 5
    device: str = "cpu"
    dtype: str | None = None
    attn: str | None = None
    json: Path | None = None
    html: Path | None = None
    plots: Path | None = None
    quiet: bool = False
    config: PruneConfig | None = None

    @property
    def staged_methods(self) -> list[MethodLike]:
        """The methods as `profile` takes them: a name, or a list of names or methods that work together."""
        if self.config is not None:
            return [self.config.methods]
        return [name.split("+") if "+" in name else name for name in self.methods]


@dataclass
class Work:
    """One model and one prompt. resized: keep ratio -> inputs of a smaller picture. compare: report -> published rows.
    image, frames: what the model was shown, for pictures of what was kept; None for made-up pixels."""

    model: VLM
    inputs: Inputs
    name: str
    processor: Processor | None = None
    options: JsonObject = field(default_factory=dict)
    resized: Callable[[float], Fields] | None = None
    notes: list[str] = field(default_factory=list)
    compare: Callable[[ProfileReport], Sequence[JsonObject]] = lambda report: ()
    image: Image.Image | None = None
    frames: NDArray[uint8] | None = None

    def pictures(
        self, records: Mapping[str, Sequence[StreamRecord]], ratio: float
    ) -> list[tuple[str, str, Image.Image]]:
        """File name, caption and picture of what each run kept; none for made-up pixels."""
        records = {name: streams for name, streams in records.items() if streams}
        if not records or self.processor is None:
            return []
        caption = f"what each method keeps at ratio {ratio:g}"
        if self.frames is not None:
            strips = kept_on_clip(self.frames, records, self.processor)
            return [(f"kept_{name.replace(' ', '_')}", f"{name}: tokens kept in each frame", im) for name, im in strips]
        if self.image is None:
            return []
        first = {name: streams[0] for name, streams in records.items()}
        return [("kept", caption.capitalize() + ".", kept_on_image(self.image, first, self.processor, title=caption))]


@dataclass(frozen=True)
class Case:
    """A preset with its picture size (height, width) or clip. seen: FLOPs of its tower, where known."""

    preset: Preset
    size: tuple[int, int]
    frames: int | None
    notes: list[str]
    seen: float | None = None


def config_case(request: ProfileRequest) -> Case:
    """The model of a request by its config and processor alone; its weights are not read."""
    if request.video is not None or request.tokens is not None or request.frames is not None:
        raise OptionError(
            "--flops-only with --model counts one picture: give --image, not --video, --frames or --tokens."
        )
    size = (768, 1024)
    if request.image is not None:
        picture = read_picture(request.image)
        size = (picture.height, picture.width)
    known, (seen, _) = preset_of_folder(request.model, folder_of(request.model), size)
    note = f"{request.model}: by its config and processor alone, for a picture of {size[0]} x {size[1]} px"
    return Case(known, size, None, [note], seen)


def preset_case(request: ProfileRequest) -> Case:
    """The preset and size of a request: of its picture or clip, of the wanted tokens, or the preset's usual one."""
    known = preset(str(request.preset))
    size, frames, notes = known.default_size, request.frames, []
    if request.image is not None:
        picture = read_picture(request.image)
        size = (picture.height, picture.width)
    elif request.video is not None:
        clip = read_video(request.video, frames=request.frames or FRAMES)
        size, frames = clip.frames.shape[1:3], len(clip)
    if request.tokens is not None:
        size, got = preset_size(known, request.tokens, frames)
        what = "" if got == request.tokens else f" (the nearest to {request.tokens} that its picture sizes give)"
        notes.append(f"{known.name}: {size[0]} x {size[1]} px give {got} visual tokens{what}")
    return Case(known, size, frames, notes)


def from_preset(request: ProfileRequest) -> Work:
    """A preset built with random weights, and a prompt that is right in every shape."""
    case = preset_case(request)
    known, place = case.preset, check_device(request.device)
    dtype = check_dtype(request.dtype) or torch.bfloat16
    try:
        model = build_random(known, place, dtype, request.attn or "sdpa")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        need = readable(known.parameters * dtype.itemsize)
        raise OptionError(
            f"{known.name} needs {need} for its weights as {str(dtype).removeprefix('torch.')}, more than {place} has "
            f"free; take a smaller preset, or --flops-only."
        ) from error

    def inputs(size: tuple[int, int]) -> JsonObject:
        return random_inputs(known, model, size, text=request.text, batch=request.batch, frames=case.frames)

    full = known.tokens(case.size, case.frames)

    def resized(ratio: float) -> JsonObject:
        return inputs(preset_size(known, max(1, round(ratio * full)), case.frames)[0])

    clip = f", {case.frames} frames" if case.frames else ""
    notes = [
        *case.notes,
        f"random weights: times and bytes are real, answers mean nothing ({full} visual tokens{clip})",
    ]
    return Work(
        model,
        inputs(case.size),
        f"{known.name} (random weights)",
        resized=resized,
        notes=notes,
        compare=lambda report: _beside(known, report),
    )


def _beside(known: Preset, report: ProfileReport) -> list[JsonObject]:
    plain = report.find("plain")
    vision = 0
    if plain is not None and plain.flops:
        vision = (int(plain.flops["vision"]) + int(plain.flops["projector"])) // report.batch
    return comparison(known.published, known.decoder, vision, measured_in(report))


def from_model(request: ProfileRequest) -> Work:
    """A model on disk, on the hub or the embedded one, and a prompt around the picture or clip that was given."""
    # What cannot be read is said before a model is loaded.
    clip = read_video(request.video, frames=request.frames or FRAMES) if request.video is not None else None
    picture = read_picture(request.image) if request.image is not None else None
    with no_bars(request.quiet):
        loaded = load(request.model, LoadOptions(request.device, request.dtype, request.attn), clip is not None)
    work = _image_work(request, loaded, picture) if clip is None else _clip_work(request, loaded, clip)
    scorer = demo_scorer(loaded, request.methods if request.config is None else request.config.methods)
    work.options = {} if scorer is None else {"scorer": scorer}
    if request.config is not None:
        work.options["positions"] = request.config.positions
    return work


def _image_work(request: ProfileRequest, loaded: Loaded, picture: Image.Image | None) -> Work:
    question = request.question
    if picture is None:
        example = held_out(1)[0]
        picture, question = example.image, question or example.question
        if not loaded.embedded:
            picture = picture.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    shown_picture: Image.Image = picture
    words = [question or options.QUESTION] * request.batch

    def at_scale(factor: float) -> Fields:
        shown = shown_picture if factor == 1.0 else scaled_picture(shown_picture, factor)
        return dict(build_inputs(loaded.model, loaded.processor, words, images=[[shown]] * request.batch))

    where = str(request.image) if request.image is not None else "a drawn scene"
    work = _scaled_work(request, loaded, at_scale, f"{where}, {picture.width} x {picture.height} px")
    work.image = shown_picture
    return work


def _clip_work(request: ProfileRequest, loaded: Loaded, clip: Video) -> Work:
    words = [request.question or "what happens in this video ?"] * request.batch

    def at_scale(factor: float) -> Fields:
        frames = clip.frames if factor == 1.0 else scaled_frames(clip.frames, factor)
        return dict(
            build_inputs(loaded.model, loaded.processor, words, videos=[[(frames, clip.timestamps)]] * request.batch)
        )

    height, width = clip.frames.shape[1:3]
    what = f"{request.video}, {len(clip)} of {clip.total} frames, {width} x {height} px"
    work = _scaled_work(request, loaded, at_scale, what)
    work.frames = clip.frames
    return work


def _scaled_work(request: ProfileRequest, loaded: Loaded, at_scale: Callable[[float], Fields], what: str) -> Work:
    """The prompt at its own size or at the wanted number of tokens, and its smaller rivals."""

    def count(inputs: Inputs) -> int:
        return visual_columns(loaded.model, inputs)

    inputs = at_scale(1.0)
    full = count(inputs)
    notes = [f"{what}: {full} visual tokens"]
    if request.tokens is not None:
        inputs, got = at_count(at_scale, count, request.tokens, full)
        exact = "" if got == request.tokens else f", the nearest to {request.tokens} that picture sizes give"
        notes.append(f"scaled to {got} visual tokens{exact}")

    resized = shrinking(at_scale, count, full, count(inputs))
    return Work(loaded.model, inputs, request.model, loaded.processor, resized=resized, notes=notes)
