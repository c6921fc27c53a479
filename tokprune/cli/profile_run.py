"""What `tokprune profile` does: measures or counts, prints tables and writes pages, plots and JSON."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape

from tokprune.cli import options
from tokprune.cli.output import console_for, save_json, say_saved
from tokprune.cli.profile_inputs import ProfileRequest, Work, config_case, from_model, from_preset, preset_case
from tokprune.environment import command_line, machine
from tokprune.errors import OptionError, unknown
from tokprune.files import save_picture
from tokprune.loading import check_device, check_dtype
from tokprune.profiling.arithmetic import arithmetic
from tokprune.profiling.doubts import doubts
from tokprune.profiling.pages import arithmetic_page, profile_page
from tokprune.profiling.plots import save_plots
from tokprune.profiling.profile import profile as measure_profile
from tokprune.profiling.published import CAUTION, lines
from tokprune.profiling.report import ProfileReport
from tokprune.runtime.records import StreamRecord
from tokprune.viz.html import PagePicture, write
from tokprune.viz.html import require as require_jinja
from tokprune.viz.plots import require as require_matplotlib

WIDTH = 120  # of tables that go into a file or a pipe
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def run_profile(request: ProfileRequest) -> None:
    """Measure, print the tables and write the files that were asked for."""
    _check(request)
    console = console_for(request.quiet, request.json, WIDTH)
    if request.flops_only:
        _arithmetic(request, console)
        return
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
    if report.published:
        console.print("Published, and ours beside it:")
        for line in lines(list(report.published)):
            console.print(escape(f"- {line}"))
        console.print(escape(CAUTION), style="dim")
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
    if request.attn is not None and request.attn not in ATTENTION:
        raise unknown("--attn", request.attn, ATTENTION)
    if request.html is not None:
        require_jinja()
    if request.plots is not None:
        require_matplotlib()


def _arithmetic(request: ProfileRequest, console: Console) -> None:
    """FLOPs and memory of a preset at several keep ratios, on the meta device."""
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
        say_saved(console, [write(arithmetic_page(result, command_line(), machine()), request.html)])


def _measure(
    request: ProfileRequest, work: Work, console: Console
) -> tuple[ProfileReport, dict[str, list[StreamRecord]]]:
    """The report, and what each pruned run kept of the first prompt."""
    kept: dict[str, list[StreamRecord]] = {}

    def note_kept(name: str, last: object) -> None:
        streams = getattr(last, "streams", ())
        if streams:
            kept[name] = [stream for stream in streams if stream.row == 0]

    with console.status("measuring") as status:
        report = measure_profile(
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


def _write(
    request: ProfileRequest, report: ProfileReport, kept: dict[str, list[StreamRecord]], work: Work, console: Console
) -> None:
    """The files that were asked for."""
    save_json(console, request.json, report.to_dict())
    if request.html is None and request.plots is None:
        return
    ratio = min(request.ratios, default=1.0)
    shown = {c.name: kept[c.name] for c in report.cells if c.ratio == ratio and c.name in kept}
    pictures = work.pictures(shown, ratio)
    if request.html is not None:
        drawn = [PagePicture(image, caption, caption) for _, caption, image in pictures]
        say_saved(console, [write(profile_page(report, drawn), request.html)])
    if request.plots is not None:
        paths = save_plots(report, request.plots)
        paths += [save_picture(image, request.plots / f"{name}.png") for name, _, image in pictures]
        say_saved(console, paths)
