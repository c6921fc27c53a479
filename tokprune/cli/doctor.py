"""`tokprune doctor`: whether this installation, and a given model, work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tokprune.cli import options
from tokprune.cli.output import console_for, save_json
from tokprune.errors import OptionError
from tokprune.files import STDOUT
from tokprune.loading import LoadOptions, check_device, load

if TYPE_CHECKING:
    from tokprune.runtime.reach import Reach, ReachAnswer
    from tokprune.testing.doctor import Diagnosis, Package
    from tokprune.testing.self_test import Check

MARKS = {True: "[green]ok[/]", False: "[red]failed[/]", None: "[yellow]not tested[/]"}


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Test pruning on this model: a hub id, a folder, or demo, the embedded one.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build --model from its config, without reading its weights.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json_file: options.Json = None,
) -> None:
    """Check versions, devices and optional parts, and with --model prove in seconds that pruning is exact on it."""
    from tokprune.testing.doctor import diagnose

    if random_weights and model in (None, "demo"):
        raise OptionError("--random-weights builds a --model from its config: give a hub id or a folder.")
    diagnosis = diagnose() if model is None else diagnose(model, *_test(model, random_weights, device))
    if json_file != STDOUT:
        _print(diagnosis)
    save_json(console_for(json=json_file), json_file, diagnosis.as_dict())
    if not diagnosis.ok:
        raise typer.Exit(1)


def _test(name: str, random_weights: bool, device: str) -> tuple[tuple[Check, ...], Reach]:
    from tokprune.runtime.reach import reach
    from tokprune.testing.self_test import prompts, self_test

    loaded = load(name, LoadOptions(device=check_device(device), random_weights=random_weights))
    make = prompts(loaded.model, loaded.processor)
    return tuple(self_test(loaded.model, make)), reach(loaded.model, make([0]))


def _print(diagnosis: Diagnosis) -> None:
    console = Console(soft_wrap=True, emoji=False)  # signals are called keys:-1
    console.print(f"[bold]tokprune {diagnosis.tokprune}[/], Python {diagnosis.python}")
    for package in diagnosis.packages:
        console.print(f"  {_line(package)}")
    console.print("[bold]devices[/] " + escape(", ".join(diagnosis.devices)))
    console.print("[bold]optional parts[/]")
    for extra in diagnosis.extras:
        parts = ", ".join(_line(package) for package in extra.packages)
        wanting = any(package.ok is None for package in extra.packages)
        console.print(f"  {extra.name}: {parts}" + (f" -> {escape(extra.install)}" if wanting else ""))
    for note in diagnosis.notes:
        console.print(f"[yellow]{escape(note)}[/]")
    if diagnosis.model is not None:
        _print_checks(console, diagnosis)


def _print_checks(console: Console, diagnosis: Diagnosis) -> None:
    console.print(f"[bold]self-test of {escape(str(diagnosis.model))}[/]")
    for check in diagnosis.checks:
        figures = "" if check.apart is None else f"  (apart {check.apart:.2g}, allowed {check.allowed:.2g})"
        detail = f": {escape(check.detail)}" if check.detail else ""
        console.print(f"  {MARKS[check.ok]} {escape(check.name)}{figures}{detail}")

    if diagnosis.reach is not None:
        _print_answers(console, "signals of its vision tower", diagnosis.reach.signals)
        _print_answers(console, "encoder stage", diagnosis.reach.encoder)


def _print_answers(console: Console, title: str, answers: dict[str, ReachAnswer]) -> None:
    """One line per thing that works; those that are refused for the same reason share one."""
    console.print(f"[bold]{title}[/]")
    lines: dict[tuple[bool, str], list[str]] = {}
    for name, answer in answers.items():
        lines.setdefault((answer.works, answer.detail), []).append(name)
    for (works, detail), names in lines.items():
        mark = "[green]works[/]" if works else "[yellow]refused[/]"
        console.print(f"  {mark} {', '.join(names)}: {escape(detail)}")


def _line(package: Package) -> str:
    if package.version is None:
        return f"[yellow]{package.name} missing[/]" if package.ok is None else f"[red]{package.name} missing[/]"
    name = f"{package.name} {escape(package.version)}"
    return name if package.ok else f"[red]{name}, tested: {escape(package.range)}[/]"
