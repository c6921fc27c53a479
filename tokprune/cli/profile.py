"""`tokprune profile`: time, memory and FLOPs of a model on disk, or the arithmetic of one that is only thought of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tokprune.errors import OptionError


def run_arithmetic(
    preset_name: str, ratios: Sequence[float], text: int, batch: int, new_tokens: int, out: Path | None, quiet: bool
) -> None:
    """FLOPs and memory of a preset at several keep ratios, on the meta device."""
    from tokprune.profiling.arithmetic import arithmetic
    from tokprune.profiling.presets import preset

    result = arithmetic(preset(preset_name), ratios, text=text, batch=batch, new_tokens=new_tokens)
    Console(quiet=quiet).print(result.table())
    if out is not None:
        _save(result, out, quiet)


def run_profile(
    name: str,
    image: Path | None,
    question: str,
    methods: Sequence[str],
    ratios: Sequence[float],
    device: str,
    batch: int,
    new_tokens: int,
    repeats: int,
    out: Path | None,
    quiet: bool,
) -> None:
    """Measure a model on one picture: plain, pruned, ideal and resized cells in interleaved order."""
    from tokprune.cli.show import open_picture
    from tokprune.demo.models import load_model
    from tokprune.demo.scenes import held_out
    from tokprune.demo.sweep import build_inputs
    from tokprune.profiling.profile import profile
    from tokprune.registry import method_class

    if batch < 1:
        raise OptionError(f"--batch {batch} must be at least 1.")
    for method in methods:
        method_class(method)
    console = Console(quiet=quiet)
    model, processor, own = load_model(name, device)
    if image is not None:
        picture = open_picture(image)
    else:
        example = held_out(1)[0]
        picture, question = example.image, question or example.question
    inputs = build_inputs(processor, [question or "what is in this picture ?"] * batch, [picture] * batch, model)
    options: dict[str, Any] = {}
    if own and any(method_class(m).info.query_aware for m in methods):
        import tokprune.demo

        options["scorer"] = tokprune.demo.load_scorer(device=device)
    with console.status("measuring") as status:
        report = profile(
            model,
            inputs,
            methods,
            ratios,
            processor=processor,
            new_tokens=new_tokens,
            repeats=repeats,
            name=name,
            options=options,
            progress=lambda text: status.update(text),
        )
    console.print(report.table())
    for cell, why in report.failed.items():
        console.print(f"[yellow]{cell}: {why}[/]")
    for note in report.notes:
        console.print(f"note: {note}")
    if out is not None:
        _save(report, out, quiet)


def _save(result: Any, out: Path, quiet: bool) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        result.save(out)
    except OSError as error:
        raise OptionError(f"cannot write {out}: {error}") from error
    Console(quiet=quiet).print(f"saved {out}", soft_wrap=True)
