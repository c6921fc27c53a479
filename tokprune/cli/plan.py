"""`tokprune plan`: which ratio reaches a latency or memory target on a GPU, by roofline arithmetic or from a measured profile."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from tokprune.errors import OptionError

if TYPE_CHECKING:
    from tokprune.profiling.devices import Device
    from tokprune.profiling.presets import Preset


@dataclass(frozen=True)
class Asked:
    """What a plan is about. vision: FLOPs and parameters of the tower by preset name, where they are known already.
    text: text tokens of the prompt. source: where the device's numbers come from."""

    preset: Preset
    device: Device
    source: str
    vision: Mapping[str, tuple[float, float]] | None = None
    text: int | None = None


def subject(preset_name: str | None, model: str | None, gpu: str | None, measured: Path | None) -> Asked:
    """Model and device: of a preset, a model's config or a profile, on a data sheet or on the machine that was measured."""
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
        return Asked(preset(preset_name), place, source)
    if model is not None:
        known, vision = preset_of_folder(model, folder_of(model))
    elif report is not None:
        known, vision = preset_of_report(report)
        plain = report.plain
        return Asked(known, place, source, {known.name: vision}, max(plain.prompt - plain.visual_full, 1))
    else:
        raise OptionError("say which model: --preset llava-1.5-7b, --model PATH, or --profile FILE.")
    return Asked(known, place, source, {known.name: vision})


def folder_of(model: str) -> Path | None:
    """Where the embedded model lies; None for any other."""
    if model != "demo":
        return None
    from tokprune.demo.loading import WEIGHTS

    return WEIGHTS


def run_plan(
    preset_name: str | None,
    model: str | None,
    gpu: str | None,
    measured: Path | None,
    target: str | None,
    limit: float | None,
    ratios: Sequence[float],
    text: int | None,
    batch: int,
    new_tokens: int,
    compare: bool,
    out: Path | None,
    quiet: bool,
) -> None:
    """Print the estimates and the advice. limit: seconds for ttft and total, GiB for memory."""
    from tokprune.profiling.memory import readable
    from tokprune.profiling.plan import Workload, plan
    from tokprune.profiling.tables import to_rich
    from tokprune.viz.html import Table, Value

    for name, value in (("text", text), ("batch", batch), ("new-tokens", new_tokens)):
        if value is not None and value < 1:
            raise OptionError(f"--{name} {value} must be at least 1.")
    asked = subject(preset_name, model, gpu, measured)
    if target == "memory" and limit is not None:
        limit *= 2**30
    known, place = asked.preset, asked.device
    words = text if text is not None else asked.text or 64
    work = Workload(known.default_size, text=words, new_tokens=new_tokens, batch=batch)
    steps = (1.0, *[r for r in ratios if r < 1])
    made: Any = plan(known, place, work, target, limit, ratios=steps, compare=compare, vision=asked.vision)  # type: ignore[arg-type]
    console = Console(quiet=quiet)
    if not console.is_terminal:
        console = Console(quiet=quiet, width=max(console.width, 100))
    rows = []
    for ratio, e in made.rows:
        ms = [Value(f"{1e3 * seconds:.1f}", seconds) for seconds in (e.vision, e.prefill, e.ttft, e.decode, e.total)]
        rows.append([f"{ratio:g}", e.visual, *ms, readable(e.memory), e.bound])
    heads = ("ratio", "visual", "vision", "prefill", "TTFT", "decode", "total", "memory", "bound by")
    table = Table(heads, rows, units=("", "tokens", "ms", "ms", "ms", "ms", "ms", "", ""))
    console.print(to_rich(table, f"{known.name} on {place.name}, estimated from {asked.source}"))
    for line in made.advice:
        console.print(escape(f"- {line}"))
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(made.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot write {out}: {error}") from error
        console.print(f"saved {out}", soft_wrap=True)
