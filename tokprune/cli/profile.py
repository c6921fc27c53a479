"""`tokprune profile`: time, memory and FLOPs of a model on disk, or the arithmetic of one that is only thought of."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tokprune.cli.profile_inputs import (
    Work,
    check_device,
    chosen_dtype,
    config_case,
    from_model,
    from_preset,
    known_attention,
    preset_case,
)
from tokprune.errors import OptionError

WIDTH = 120  # of tables that go into a file or a pipe


@dataclass(frozen=True)
class Request:
    """What the command was asked for; the options of `tokprune profile`."""

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


def run_profile(asked: Request) -> None:
    """Measure, print the tables and write the files that were asked for."""
    _check(asked)
    console = Console(quiet=asked.quiet)
    if not console.is_terminal:
        console = Console(quiet=asked.quiet, width=max(console.width, WIDTH))
    if asked.flops_only:
        _arithmetic(asked, console)
        return
    work = from_preset(asked) if asked.preset is not None else from_model(asked, picked(asked.methods))
    for line in work.notes:
        console.print(escape(line), style="dim")
    report, kept = _measure(asked, work, console)
    console.print(report.table(console.width))
    for line in report.findings(min(asked.ratios, default=None)):
        console.print(escape(f"- {line}"))
    if report.warning:
        console.print(f"[yellow]{escape(report.warning)}[/]")
    for cell, why in report.failed.items():
        console.print(f"[yellow]{escape(f'{cell}: {why}')}[/]")
    for note in report.notes:
        console.print(escape(f"note: {note}"))
    _published(report.published, console)
    _write(asked, report, kept, work, console)
    if not any(cell.kind == "pruned" for cell in report.cells):
        raise OptionError(
            "no pruned run could be measured: " + "; ".join(f"{c}: {w}" for c, w in report.failed.items())
        )


def picked(names: Sequence[str]) -> list[Any]:
    """Methods by name, checked; names joined by "+" work together, one per stage."""
    from tokprune.registry import method_class

    out: list[Any] = []
    for name in names:
        parts = [part.strip() for part in name.split("+")]
        for part in parts:
            method_class(part)
        out.append(parts if len(parts) > 1 else parts[0])
    return out


def _check(asked: Request) -> None:
    """Refuse what cannot be measured before anything is loaded."""
    for name in ("batch", "repeats", "frames", "tokens"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name} {value} must be at least 1.")
    if asked.image is not None and asked.video is not None:
        raise OptionError("--image and --video: give one of them.")
    if asked.preset is None and asked.random_weights:
        raise OptionError("--random-weights needs a known model: --preset llava-1.5-7b --random-weights.")
    if asked.preset is not None and not (asked.flops_only or asked.random_weights):
        raise OptionError(
            f"--preset {asked.preset} has no weights: add --flops-only (arithmetic, any machine) or --random-weights (builds "
            "it for real time and memory)."
        )
    if asked.flops_only and asked.random_weights:
        raise OptionError("--flops-only counts without running, --random-weights runs; give one of them.")
    if asked.flops_only and asked.plots is not None:
        raise OptionError("--plots draws measured times, which --flops-only has none of; leave one of them out.")
    if not asked.flops_only:
        check_device(asked.device)
    chosen_dtype(asked.dtype)
    known_attention(asked.attn)
    picked(asked.methods)
    if asked.html is not None:
        from tokprune.viz.html import require

        require()
    if asked.plots is not None:
        from tokprune.viz.plots import require as require_plots

        require_plots()


def _arithmetic(asked: Request, console: Console) -> None:
    """FLOPs and memory of a preset at several keep ratios, on the meta device."""
    from tokprune.demo.models import machine
    from tokprune.profiling.arithmetic import arithmetic

    case = preset_case(asked) if asked.preset is not None else config_case(asked)
    result = arithmetic(
        case.preset,
        asked.ratios,
        size=case.size,
        frames=case.frames,
        text=asked.text,
        batch=asked.batch,
        new_tokens=asked.new_tokens,
        dtype=chosen_dtype(asked.dtype) or chosen_dtype("bfloat16"),  # type: ignore[arg-type]
        seen=case.seen,
    )
    for line in case.notes:
        console.print(escape(line), style="dim")
    console.print(result.table(console.width))
    if asked.json is not None:
        _save(result.save, asked.json, console)
    if asked.html is not None:
        from tokprune.profiling.pages import arithmetic_page
        from tokprune.viz.html import write

        write(arithmetic_page(result, command(), machine()), asked.html)
        console.print(f"saved {asked.html}", soft_wrap=True)


def _measure(asked: Request, work: Work, console: Console) -> tuple[Any, dict[str, Any]]:
    """The report, and what each pruned run kept of the first prompt."""
    from dataclasses import replace

    from tokprune.profiling.profile import profile

    kept: dict[str, Any] = {}

    def told(name: str, last: Any) -> None:
        if last is not None:
            kept[name] = [stream for stream in last.streams if stream.row == 0]

    with console.status("measuring") as status:
        report = profile(
            work.model,
            work.inputs,
            picked(asked.methods),
            asked.ratios,
            processor=work.processor,
            new_tokens=asked.new_tokens,
            repeats=asked.repeats,
            name=work.name,
            options=work.options,
            resized=work.resized,
            progress=lambda text: status.update(escape(text)),
            told=told,
        )
    return replace(report, command=command(), published=tuple(work.compare(report))), kept


def _published(rows: Sequence[Any], console: Console) -> None:
    if not rows:
        return
    from tokprune.profiling.published import CAUTION, lines

    console.print("Published, and ours beside it:")
    for line in lines(list(rows)):
        console.print(escape(f"- {line}"))
    console.print(escape(CAUTION), style="dim")


def _write(asked: Request, report: Any, kept: dict[str, Any], work: Work, console: Console) -> None:
    """The files that were asked for."""
    if asked.json is not None:
        _save(report.save, asked.json, console)
    if asked.html is None and asked.plots is None:
        return
    ratio = min((r for r in asked.ratios), default=1.0)
    shown = {c.name: kept[c.name] for c in report.cells if c.ratio == ratio and c.name in kept}
    pictures = work.pictures(shown, ratio)
    if asked.html is not None:
        from tokprune.profiling.pages import profile_page
        from tokprune.viz.html import Picture, write

        drawn = [Picture(image, caption, caption) for _, caption, image in pictures]
        write(profile_page(report, drawn), asked.html)
        console.print(f"saved {asked.html}", soft_wrap=True)
    if asked.plots is not None:
        from tokprune.cli.plots import draw_profile

        try:
            paths = draw_profile(report, asked.plots)
            for name, _, image in pictures:
                paths.append(asked.plots / f"{name}.png")
                image.save(paths[-1])
        except OSError as error:
            raise OptionError(f"cannot write pictures to {asked.plots}: {error}") from error
        for path in paths:
            console.print(f"saved {path}", soft_wrap=True)


def command() -> str:
    """What was typed."""
    return shlex.join(["tokprune", *sys.argv[1:]])


def _save(save: Callable[[Path], None], out: Path, console: Console) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save(out)
    except OSError as error:
        raise OptionError(f"cannot write {out}: {error}") from error
    console.print(f"saved {out}", soft_wrap=True)
