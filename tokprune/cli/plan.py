"""`tokprune plan`: which ratio reaches a latency or memory target, by roofline arithmetic or a measured profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tokprune.cli import options
from tokprune.cli.output import console_for, save_json
from tokprune.errors import OptionError

if TYPE_CHECKING:
    from tokprune.profiling.devices import Device
    from tokprune.profiling.plan import RatioPlan
    from tokprune.profiling.presets import Preset
    from tokprune.viz.html import Table

WIDTH = 100  # of a table that goes into a file or a pipe


@dataclass(frozen=True)
class Subject:
    """What a plan is about: a model on a device."""

    preset: Preset
    device: Device
    source: str  # where the device's numbers come from
    vision: Mapping[str, tuple[float, float]] | None = (
        None  # FLOPs and parameters of the tower by preset name, if known
    )
    text: int | None = None  # text tokens of the prompt that was measured


def find_subject(preset_name: str | None, model: str | None, gpu: str | None, measured: Path | None) -> Subject:
    """Model (of a preset, a config or a profile) and device (of a data sheet or a measured profile)."""
    from tokprune.profiling.devices import calibrate, device
    from tokprune.profiling.loaded import preset_of_folder, preset_of_report
    from tokprune.profiling.presets import preset
    from tokprune.profiling.report import ProfileReport

    if preset_name is not None and model is not None:
        raise OptionError("--preset and --model: give one of them.")
    report = ProfileReport.load(measured) if measured is not None else None
    if gpu is not None:
        place, source = device(gpu), "data sheets"
    elif report is not None:
        place, source = calibrate(report), "a measured profile"
    else:
        raise OptionError(
            "say which device: --gpu a100 (also h100, l4, ...), or --profile FILE of tokprune profile --json."
        )
    if preset_name is not None:
        return Subject(preset(preset_name), place, source)
    if model is not None:
        known, vision = preset_of_folder(model, folder_of(model))
    elif report is not None:
        known, vision = preset_of_report(report)
        plain = report.plain
        return Subject(known, place, source, {known.name: vision}, max(plain.prompt - plain.visual_full, 1))
    else:
        raise OptionError("say which model: --preset llava-1.5-7b, --model PATH, or --profile FILE.")
    return Subject(known, place, source, {known.name: vision})


def folder_of(model: str) -> Path | None:
    """Where the embedded model lies; None for any other."""
    if model != "demo":
        return None
    from tokprune.demo.loading import WEIGHTS

    return WEIGHTS


def plan(  # the options of the command
    preset: Annotated[str | None, typer.Option(help="The model, such as llava-1.5-7b.")] = None,
    model: Annotated[str | None, typer.Option(help="A hub id or path instead: its config and processor.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The device, such as a100, h100, l4.")] = None,
    measured: Annotated[
        Path | None, typer.Option("--profile", help="JSON of tokprune profile: its device, and its model by default.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="ttft, total or memory.")] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds for ttft and total, GiB for memory.")] = None,
    ratios: options.Ratios = "0.5,0.25,0.1,0.05",
    prompt_budget: Annotated[
        int | None, typer.Option(help="Tokens of a whole prompt, text included; its ratio joins --ratios.")
    ] = None,
    text: Annotated[int | None, typer.Option(help="Text tokens around the picture (64, or the profile's).")] = None,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    compare: Annotated[bool, typer.Option(help="Also look at larger models at equal cost (slower).")] = False,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
) -> None:
    """Estimate which keep ratio reaches a target on a GPU, and where pruning stops paying."""
    from tokprune.profiling.plan import Workload
    from tokprune.profiling.plan import plan as make_plan
    from tokprune.profiling.tables import to_rich

    options.at_least_one(text=text, batch=batch, new_tokens=new_tokens)
    if limit is not None and not limit > 0:
        raise OptionError(f"--limit is seconds (ttft, total) or GiB (memory) above 0, not {limit:g}.")
    subject = find_subject(preset, model, gpu, measured)
    known, place = subject.preset, subject.device
    words = text if text is not None else subject.text or 64
    within = [] if prompt_budget is None else [_ratio_within(prompt_budget, words, known.tokens(known.default_size))]
    steps = (1.0, *[r for r in sorted({*options.ratios(ratios), *within}, reverse=True) if r < 1])
    work = Workload(known.default_size, text=words, new_tokens=new_tokens, batch=batch)
    amount = limit * 2**30 if target == "memory" and limit is not None else limit
    made = make_plan(known, place, work, target, amount, ratios=steps, compare=compare, vision=subject.vision)  # type: ignore[arg-type]
    console = console_for(quiet, json_file, WIDTH)
    console.print(to_rich(_table(made), f"{known.name} on {place.name}, estimated from {subject.source}"))
    for line in made.advice:
        console.print(escape(f"- {line}"))
    save_json(console, json_file, made.to_dict())


def _ratio_within(budget: int, text: int, visual: int) -> float:
    """The keep ratio at which a prompt of `text` and `visual` tokens has `budget` of them; 1 where all fit."""
    from tokprune.budget import check_budget

    room = check_budget(budget, "prompt_budget") - text
    if room < 1:
        raise OptionError(f"--prompt-budget {budget} holds the {text} tokens of text (--text) and no picture.")
    return min(1.0, room / visual)


def _table(made: RatioPlan) -> Table:
    """The estimates, a row per ratio."""
    from tokprune.profiling.memory import readable
    from tokprune.viz.html import Table, Value

    rows = []
    for ratio, e in made.rows:
        ms = [Value(f"{1e3 * seconds:.1f}", seconds) for seconds in (e.vision, e.prefill, e.ttft, e.decode, e.total)]
        rows.append([f"{ratio:.4g}", e.visual, *ms, readable(e.memory), e.bound])
    heads = ("ratio", "visual", "vision", "prefill", "TTFT", "decode", "total", "memory", "bound by")
    return Table(heads, rows, units=("", "tokens", "ms", "ms", "ms", "ms", "ms", "", ""))
