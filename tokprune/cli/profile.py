"""`tokprune profile`: time, memory and FLOPs of a model on disk, or the arithmetic of one that is not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tokprune.cli import options
from tokprune.cli.output import console_for, save_json, say_saved
from tokprune.cli.profile_inputs import Work, config_case, from_model, from_preset, known_attention, preset_case
from tokprune.environment import command_line, machine
from tokprune.errors import OptionError
from tokprune.files import save_picture
from tokprune.loading import check_device, check_dtype
from tokprune.types import MethodLike

if TYPE_CHECKING:
    from tokprune.config import PruneConfig
    from tokprune.profiling.report import ProfileReport
    from tokprune.runtime.records import StreamRecord

WIDTH = 120  # of tables that go into a file or a pipe


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


def profile(  # the options of the command
    model: options.Model = "demo",
    preset: Annotated[
        str | None, typer.Option(help="A known model without weights; with --flops-only or --random-weights.")
    ] = None,
    flops_only: Annotated[
        bool,
        typer.Option(
            "--flops-only", help="Arithmetic on the meta device, of --preset or a --model's config; nothing is run."
        ),
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build --preset for real: true times and bytes, no sense.")
    ] = False,
    methods: Annotated[
        str | None,
        typer.Option("--methods", "--method", help="Methods, separated by commas, divprune by default; a+b together."),
    ] = None,
    ratios: Annotated[
        str | None, typer.Option("--ratios", "--ratio", help="Keep ratios, separated by commas; 0.5,0.1 by default.")
    ] = None,
    config: options.Config = None,
    image: Annotated[Path | None, typer.Option(help="The picture; a drawn scene by default.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video instead of a picture.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of --video (8), or of a preset's clip.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Scale the picture to about so many visual tokens.")] = None,
    question: Annotated[str, typer.Option(help="The question about it.")] = "",
    text: Annotated[int, typer.Option(help="Text tokens around the picture of --preset.")] = 64,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(help="Timed runs of each cell.")] = 5,
    device: options.Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    attn: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2, ...")] = None,
    json_file: options.Json = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with tables and pictures.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Save plots and pictures of the kept tokens here.")] = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure where the time goes and what pruning saves: stages, memory, FLOPs, beside the ideal and a smaller
    picture."""
    fields = dict(locals())  # each option is a field of the request
    fields["json"] = fields.pop("json_file")
    from tokprune.scaling import RESIZE

    names = options.methods(methods or "divprune", smaller=True)  # the smaller picture is always measured
    fields["methods"], fields["ratios"] = [n for n in names if n != RESIZE], options.ratios(ratios or "0.5,0.1")
    if config is not None:
        fields["config"] = pruning = options.config_of(config, methods=methods, ratios=ratios)
        fields["ratios"] = [options.ratio_of(pruning, config)]
    run_profile(ProfileRequest(**fields))


def run_profile(request: ProfileRequest) -> None:
    """Measure, print the tables and write the files that were asked for."""
    _check(request)
    console = console_for(request.quiet, request.json, WIDTH)
    if request.flops_only:
        _arithmetic(request, console)
        return
    from tokprune.profiling.doubts import doubts

    work = from_preset(request) if request.preset is not None else from_model(request)
    for line in work.notes:
        console.print(escape(line), style="dim")
    report, kept = _measure(request, work, console)
    console.print(report.table(console.width))
    for line in report.findings(min(request.ratios, default=None)):
        console.print(escape(f"- {line}"))
    for line in doubts(report):
        console.print(f"[yellow]- {escape(line)}[/]")
    if report.warning:
        console.print(f"[yellow]{escape(report.warning)}[/]")
    for cell, why in report.failed.items():
        console.print(f"[yellow]{escape(f'{cell}: {why}')}[/]")
    for note in report.notes:
        console.print(escape(f"note: {note}"))
    _published(report.published, console)
    _write(request, report, kept, work, console)
    if not any(cell.kind == "pruned" for cell in report.cells):
        raise OptionError(
            "no pruned run could be measured: " + "; ".join(f"{c}: {w}" for c, w in report.failed.items())
        )


def _check(request: ProfileRequest) -> None:
    """Refuse what cannot be measured before anything is loaded."""

    options.at_least_one(batch=request.batch, repeats=request.repeats, frames=request.frames, tokens=request.tokens)
    if request.image is not None and request.video is not None:
        raise OptionError("--image and --video: give one of them.")
    if request.preset is None and request.random_weights:
        raise OptionError("--random-weights needs a known model: --preset llava-1.5-7b --random-weights.")
    if request.preset is not None and not (request.flops_only or request.random_weights):
        raise OptionError(
            f"--preset {request.preset} has no weights: add --flops-only (arithmetic, any machine) or "
            f"--random-weights (builds it for real time and memory)."
        )
    if request.flops_only and request.random_weights:
        raise OptionError("--flops-only counts without running, --random-weights runs; give one of them.")
    if request.flops_only and request.plots is not None:
        raise OptionError("--plots draws measured times, which --flops-only has none of; leave one of them out.")
    if not request.flops_only:
        check_device(request.device)
    check_dtype(request.dtype)
    known_attention(request.attn)
    if request.html is not None:
        from tokprune.viz.html import require

        require()
    if request.plots is not None:
        from tokprune.viz.plots import require as require_plots

        require_plots()


def _arithmetic(request: ProfileRequest, console: Console) -> None:
    """FLOPs and memory of a preset at several keep ratios, on the meta device."""
    import torch

    from tokprune.profiling.arithmetic import arithmetic

    case = preset_case(request) if request.preset is not None else config_case(request)
    result = arithmetic(
        case.preset,
        request.ratios,
        size=case.size,
        frames=case.frames,
        text=request.text,
        batch=request.batch,
        new_tokens=request.new_tokens,
        dtype=check_dtype(request.dtype) or torch.bfloat16,
        seen=case.seen,
    )
    for line in case.notes:
        console.print(escape(line), style="dim")
    console.print(result.table(console.width))
    save_json(console, request.json, result.to_dict())
    if request.html is not None:
        from tokprune.profiling.pages import arithmetic_page
        from tokprune.viz.html import write

        say_saved(console, [write(arithmetic_page(result, command_line(), machine()), request.html)])


def _measure(
    request: ProfileRequest, work: Work, console: Console
) -> tuple[ProfileReport, dict[str, list[StreamRecord]]]:
    """The report, and what each pruned run kept of the first prompt."""
    from dataclasses import replace

    from tokprune.profiling.profile import profile as measure

    kept: dict[str, list[StreamRecord]] = {}

    def note_kept(name: str, last: object) -> None:
        streams = getattr(last, "streams", ())
        if streams:
            kept[name] = [stream for stream in streams if stream.row == 0]

    with console.status("measuring") as status:
        report = measure(
            work.model,
            work.inputs,
            request.staged_methods,
            request.ratios,
            processor=work.processor,
            new_tokens=request.new_tokens,
            repeats=request.repeats,
            name=work.name,
            options=work.options,
            resized=work.resized,
            progress=lambda text: status.update(escape(text)),
            on_pruned=note_kept,
        )
    return replace(report, command=command_line(), published=tuple(work.compare(report))), kept


def _published(rows: Sequence[dict[str, object]], console: Console) -> None:
    if not rows:
        return
    from tokprune.profiling.published import CAUTION, lines

    console.print("Published, and ours beside it:")
    for line in lines(list(rows)):
        console.print(escape(f"- {line}"))
    console.print(escape(CAUTION), style="dim")


def _write(
    request: ProfileRequest,
    report: ProfileReport,
    kept: dict[str, list[StreamRecord]],
    work: Work,
    console: Console,
) -> None:
    """The files that were asked for."""

    save_json(console, request.json, report.to_dict())
    if request.html is None and request.plots is None:
        return
    ratio = min(request.ratios, default=1.0)
    shown = {c.name: kept[c.name] for c in report.cells if c.ratio == ratio and c.name in kept}
    pictures = work.pictures(shown, ratio)
    if request.html is not None:
        from tokprune.profiling.pages import profile_page
        from tokprune.viz.html import PagePicture, write

        drawn = [PagePicture(image, caption, caption) for _, caption, image in pictures]
        say_saved(console, [write(profile_page(report, drawn), request.html)])
    if request.plots is not None:
        from tokprune.profiling.plots import save_plots

        paths = save_plots(report, request.plots)
        paths += [save_picture(image, request.plots / f"{name}.png") for name, _, image in pictures]
        say_saved(console, paths)
