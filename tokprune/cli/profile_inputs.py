"""What `tokprune profile` measures: a model with its prompt, made from a picture, a clip or a wanted number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.errors import OptionError, unknown

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from tokprune.cli.profile import Request
    from tokprune.profiling.presets import Preset

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
QUESTION = "what is in this picture ?"
PICTURE = 768  # side of the drawn picture that a real model is shown when none is given
FRAMES = 8


@dataclass
class Work:
    """One model and one prompt. resized: share of tokens -> inputs of a smaller picture. compare: report -> published rows.
    image, frames: what the model was shown, for pictures of what was kept; None for made-up pixels."""

    model: Any
    inputs: Mapping[str, Any]
    name: str
    processor: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    resized: Callable[[float], Mapping[str, Any]] | None = None
    notes: list[str] = field(default_factory=list)
    compare: Callable[[Any], Sequence[Any]] = lambda report: ()
    image: Any = None
    frames: Any = None

    def pictures(self, records: Mapping[str, Any], ratio: float) -> list[tuple[str, str, Image.Image]]:
        """File name, caption and picture of what each run kept; none for made-up pixels."""
        from tokprune.viz.kept import kept_on_clip, kept_on_image

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


def check_device(name: str) -> torch.device:
    """The device called `name`, or the error that says which there are."""
    import torch

    try:
        place = torch.device(name)
    except RuntimeError:
        raise unknown("--device", name, ("cpu", "cuda", "cuda:0", "mps", "xpu")) from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"--device {name}: this torch sees no GPU; use --device cpu, or --preset ... --flops-only.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from cuda:0.")
    return place


def chosen_dtype(name: str | None) -> torch.dtype | None:
    """The dtype called `name`; None when none was asked for."""
    import torch

    if name is None:
        return None
    if name.lower() not in DTYPES:
        raise unknown("--dtype", name, DTYPES)
    found: torch.dtype = getattr(torch, DTYPES[name.lower()])
    return found


def _clip(path: Path, frames: int | None) -> Any:
    from tokprune.video import read_video

    return read_video(path, frames=frames or FRAMES)


@dataclass(frozen=True)
class Case:
    """A preset with the picture size (height, width) or clip that it is asked about. seen: its tower's FLOPs, where known."""

    preset: Preset
    size: tuple[int, int]
    frames: int | None
    notes: list[str]
    seen: float | None = None


def config_case(asked: Request) -> Case:
    """The model of a request by its config and processor alone; its weights are not read."""
    from tokprune.cli.plan import folder_of
    from tokprune.cli.show import open_picture
    from tokprune.profiling.loaded import preset_of_folder

    if asked.video is not None or asked.tokens is not None or asked.frames is not None:
        raise OptionError(
            "--flops-only with --model counts one picture: give --image, not --video, --frames or --tokens."
        )
    size = (768, 1024)
    if asked.image is not None:
        picture = open_picture(asked.image)
        size = (picture.height, picture.width)
    known, (seen, _) = preset_of_folder(asked.model, folder_of(asked.model), size)
    note = f"{asked.model}: by its config and processor alone, for a picture of {size[0]} x {size[1]} px"
    return Case(known, size, None, [note], seen)


def preset_case(asked: Request) -> Case:
    """The preset and size of a request: of its picture or clip, of the wanted number of tokens, or the preset's usual one."""
    from tokprune.cli.show import open_picture
    from tokprune.profiling.presets import preset
    from tokprune.profiling.resize import preset_size

    known = preset(str(asked.preset))
    size, frames, notes = known.default_size, asked.frames, []
    if asked.image is not None:
        picture = open_picture(asked.image)
        size = (picture.height, picture.width)
    elif asked.video is not None:
        clip = _clip(asked.video, asked.frames)
        size, frames = clip.frames.shape[1:3], len(clip)
    if asked.tokens is not None:
        size, got = preset_size(known, asked.tokens, frames)
        what = "" if got == asked.tokens else f" (the nearest to {asked.tokens} that its picture sizes give)"
        notes.append(f"{known.name}: {size[0]} x {size[1]} px give {got} visual tokens{what}")
    return Case(known, size, frames, notes)


def from_preset(asked: Request) -> Work:
    """A preset built with random weights, and a prompt that is right in every shape."""
    import torch

    from tokprune.profiling.build import build_random
    from tokprune.profiling.inputs import random_inputs
    from tokprune.profiling.memory import readable
    from tokprune.profiling.resize import preset_size
    from tokprune.profiling.runs import is_out_of_memory

    case = preset_case(asked)
    known, place = case.preset, check_device(asked.device)
    dtype = chosen_dtype(asked.dtype) or torch.bfloat16
    try:
        model = build_random(known, place, dtype, asked.attn or "sdpa")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        need = readable(known.parameters * dtype.itemsize)
        raise OptionError(
            f"{known.name} needs {need} for its weights as {str(dtype).removeprefix('torch.')}, more than {place} has free; "
            "take a smaller preset, or --flops-only."
        ) from error

    def inputs(size: tuple[int, int]) -> dict[str, Any]:
        return random_inputs(known, model, size, text=asked.text, batch=asked.batch, frames=case.frames)

    full = known.tokens(case.size, case.frames)

    def resized(share: float) -> dict[str, Any]:
        return inputs(preset_size(known, max(1, round(share * full)), case.frames)[0])

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


def _beside(known: Preset, report: Any) -> list[dict[str, Any]]:
    from tokprune.profiling.published import comparison, measured_in

    plain = report.find("plain")
    vision = 0
    if plain is not None and plain.flops:
        vision = (int(plain.flops["vision"]) + int(plain.flops["projector"])) // report.batch
    return comparison(known.published, known.decoder, vision, measured_in(report))


def known_attention(name: str | None) -> None:
    """Refuse an attention implementation that transformers has not."""
    allowed = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
    if name is not None and name not in allowed:
        raise unknown("--attn", name, allowed)


def from_model(asked: Request, methods: Sequence[Any]) -> Work:
    """A model on disk, on the hub or the embedded one, and a prompt around the picture or clip that was given."""
    from tokprune.cli.show import open_picture
    from tokprune.profiling.runs import is_out_of_memory

    # What cannot be read is said before a model is loaded.
    clip = _clip(asked.video, asked.frames) if asked.video is not None else None
    picture = open_picture(asked.image) if asked.image is not None else None
    try:
        model, processor, own = _load(asked)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OptionError(
            f"{asked.model} does not fit on {asked.device}; try --dtype bfloat16 or another device."
        ) from error
    if asked.attn is not None:
        try:
            model.set_attn_implementation(asked.attn)
        except (ValueError, ImportError) as error:
            raise OptionError(f"--attn {asked.attn}: {error}") from error
    made = (
        _clip_work(asked, model, processor, clip)
        if clip is not None
        else _image_work(asked, model, processor, own, picture)
    )
    if own:
        made.options = _scorer(asked, methods)
    return made


def _load(asked: Request) -> tuple[Any, Any, bool]:
    from tokprune.demo.models import load_model

    if asked.model == "demo" and asked.video is not None:
        import tokprune.demo

        model, processor = tokprune.demo.load_clips(device=asked.device)
        own = True
    else:
        model, processor, own = load_model(asked.model, asked.device)
    dtype = chosen_dtype(asked.dtype)
    moved: Any = model
    return moved.to(dtype) if dtype is not None else moved, processor, own


def _scorer(asked: Request, methods: Sequence[Any]) -> dict[str, Any]:
    """The demo's own text-image scorer, where a method compares the question with what it sees."""
    import tokprune.demo
    from tokprune.registry import method_class

    names = [n for m in methods for n in ([m] if isinstance(m, str) else m)]
    if not any(method_class(n).info.query_aware for n in names):
        return {}
    return {"scorer": tokprune.demo.load_scorer(device=asked.device)}


def _image_work(asked: Request, model: Any, processor: Any, own: bool, picture: Any) -> Work:
    from PIL import Image

    from tokprune.adapters.prompting import build_inputs
    from tokprune.profiling.resize import scaled_picture

    question = asked.question
    if picture is None:
        from tokprune.demo.scenes import held_out

        example = held_out(1)[0]
        picture, question = example.image, question or example.question
        if not own:
            picture = picture.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    words = [question or QUESTION] * asked.batch

    def at_scale(factor: float) -> Mapping[str, Any]:
        shown = picture if factor == 1.0 else scaled_picture(picture, factor)
        return dict(build_inputs(model, processor, words, images=[[shown]] * asked.batch))

    where = str(asked.image) if asked.image is not None else "a drawn scene"
    made = _scaled_work(asked, model, processor, at_scale, f"{where}, {picture.width} x {picture.height} px")
    made.image = picture
    return made


def _clip_work(asked: Request, model: Any, processor: Any, clip: Any) -> Work:
    from tokprune.adapters.prompting import build_inputs
    from tokprune.profiling.resize import scaled_frames

    words = [asked.question or "what happens in this video ?"] * asked.batch

    def at_scale(factor: float) -> Mapping[str, Any]:
        frames = clip.frames if factor == 1.0 else scaled_frames(clip.frames, factor)
        return dict(build_inputs(model, processor, words, videos=[[(frames, clip.timestamps)]] * asked.batch))

    height, width = clip.frames.shape[1:3]
    what = f"{asked.video}, {len(clip)} of {clip.total} frames, {width} x {height} px"
    made = _scaled_work(asked, model, processor, at_scale, what)
    made.frames = clip.frames
    return made


def _scaled_work(
    asked: Request, model: Any, processor: Any, at_scale: Callable[[float], Mapping[str, Any]], what: str
) -> Work:
    """The prompt at its own size or at the wanted number of tokens, and its smaller rivals."""
    from tokprune.profiling.resize import at_count
    from tokprune.profiling.runs import visual_columns

    def count(inputs: Mapping[str, Any]) -> int:
        return visual_columns(model, inputs)

    inputs = at_scale(1.0)
    full = count(inputs)
    notes = [f"{what}: {full} visual tokens"]
    if asked.tokens is not None:
        inputs, got = at_count(at_scale, count, asked.tokens, full)
        exact = "" if got == asked.tokens else f", the nearest to {asked.tokens} that picture sizes give"
        notes.append(f"scaled to {got} visual tokens{exact}")

    def resized(share: float) -> Mapping[str, Any]:
        return at_count(at_scale, count, max(1.0, share * count(inputs)), full)[0]

    return Work(model, inputs, asked.model, processor, resized=resized, notes=notes)
