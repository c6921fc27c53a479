"""`tokprune demo`: the table, the pictures and the JSON of a sweep over keep ratios."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tokprune.cli.show import kept_sheet, open_picture
from tokprune.errors import OptionError

METHODS = ("none", "random", "uniform", "divprune", "hired")
RATIOS = (1.0, 0.5, 0.25, 0.1, 0.05)
QUESTIONS = 210
SHOWN = 4  # pictures in the overlay sheet


def table_of(cells: Sequence[Any]) -> Table:
    """The cells as a table; the baseline first."""
    base = next((c for c in cells if c.method == "none"), None)
    table = Table(header_style="bold")
    for column in ("method", "keep ratio", "tokens", "accuracy", "prefill", "FLOPs/answer"):
        table.add_column(column, justify="left" if column == "method" else "right")
    last = None
    for c in cells:
        if last is not None and c.method != last:
            table.add_section()
        last = c.method
        flops = f"{c.flops / 1e9:.3f} G" + (f" ({c.flops / base.flops:.0%})" if base and c is not base else "")
        table.add_row(
            c.method,
            f"{c.ratio:g}",
            f"{c.kept:.0f}/{c.total:.0f}",
            f"{c.accuracy:.1%}",
            f"{c.prefill_ms:.2f} ms",
            flops,
        )
    return table


def run_demo(
    name: str,
    questions: int,
    methods: Sequence[str],
    ratios: Sequence[float],
    json_file: Path | None,
    overlays: Path | None,
    device: str,
    seed: int,
    quiet: bool,
) -> None:
    """The sweep over held-out scenes."""
    from tokprune.budget import check_ratio
    from tokprune.demo.models import load_model
    from tokprune.demo.scenes import held_out
    from tokprune.demo.sweep import plan_cells, run_cell
    from tokprune.registry import method_class

    for method in methods:
        method_class(method)
    for ratio in ratios:
        check_ratio(ratio)
    console = Console(quiet=quiet)
    started = time.perf_counter()
    model, processor, own = load_model(name, device)
    examples = held_out(questions, seed)
    # Neighbours in a batch need not share a scene; the same order for every cell keeps the comparison paired.
    plan = plan_cells(methods, ratios)
    scorer = scorer_for(own, methods, device)
    cells = ask_cells(
        console,
        plan,
        len(examples),
        quiet,
        lambda method, ratio, tick: run_cell(
            model, processor, examples, method, ratio, own_model=own, scorer=scorer, tick=tick
        ),
    )
    if overlays is not None:
        for path in save_overlays(
            model, processor, examples, [m for m in methods if m != "none"], ratios, overlays, own, scorer
        ):
            console.print(f"saved {path}", soft_wrap=True)
    if json_file is not None:
        write_json(json_file, name, cells, seed, len(examples))
        console.print(f"saved {json_file}", soft_wrap=True)
    console.print(f"{len(plan)} cells of {len(examples)} questions in {time.perf_counter() - started:.0f} s")


def ask_cells(
    console: Console,
    plan: Sequence[tuple[str, float]],
    questions: int,
    quiet: bool,
    ask: Callable[[str, float, Callable[[int], None]], Any],
) -> list[Any]:
    """Every cell of the plan under one progress bar, then their table. ask: method, ratio and what to call with each batch's size."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    cells = []
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        bar = progress.add_task("asking", total=len(plan) * questions)
        for method, ratio in plan:
            progress.update(bar, description=f"{method} at {ratio:g}")
            cells.append(ask(method, ratio, lambda n: progress.advance(bar, n)))
    console.print(table_of(cells))
    for cell in cells:
        if cell.method == "none":
            types = ", ".join(f"{k} {v:.0%}" for k, v in cell.per_type.items())
            console.print(f"all tokens, by question type: {types}")
    return cells


def scorer_for(own: bool, methods: Sequence[str], device: str) -> Any:
    """The demo's own text-image scorer, when a method compares the question with the patches."""
    from tokprune.registry import method_class

    if not own or not any(method_class(m).info.query_aware for m in methods):
        return None
    import tokprune.demo

    return tokprune.demo.load_scorer(device=device)


def write_json(path: Path, model: str, cells: Sequence[Any], seed: int, questions: int) -> None:
    """The cells with what they were measured on, versioned."""
    from tokprune.demo.models import machine

    data = {
        "type": "tokprune.demo",
        "version": 1,
        "model": model,
        "seed": seed,
        "questions": questions,
        "command": " ".join(["tokprune", *sys.argv[1:]]),
        "environment": machine(),
        "cells": [c.to_dict() for c in cells],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error}") from error


def save_overlays(
    model: Any,
    processor: Any,
    examples: Sequence[Any],
    methods: Sequence[str],
    ratios: Sequence[float],
    folder: Path,
    own: bool,
    scorer: Any,
) -> list[Path]:
    """Sheets of the kept tokens: a row of pictures, a column of methods, at the ratio nearest to 10 %."""
    from tokprune.demo.sweep import ANSWER_TOKENS, FREE_ANSWER_TOKENS, ONE_WORD, ask_at

    ratio = min(ratios, key=lambda r: abs(r - 0.1))
    chosen: list[Any] = []
    seen: set[str] = set()
    for example in examples:
        if example.type not in seen and example.scene.seed not in {e.scene.seed for e in chosen}:
            seen.add(example.type)
            chosen.append(example)
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, example in enumerate(chosen[:SHOWN]):
            panels = []
            for method in methods:
                question = example.question if own else example.question + ONE_WORD
                tokens = ANSWER_TOKENS if own else FREE_ANSWER_TOKENS
                answer, stream = ask_at(model, processor, example.image, question, method, ratio, tokens, scorer)
                panels.append((method, answer, stream))
            path = folder / f"kept_{i + 1}_{example.type}.png"
            kept_sheet(
                example.image,
                example.question,
                panels,
                processor,
                f"right answer: {example.answer}; {ratio:.0%} of the visual tokens kept",
            ).save(path)
            paths.append(path)
    except OSError as error:
        raise OptionError(f"cannot write pictures to {folder}: {error}") from error
    return paths


def run_own_picture(
    name: str,
    image: Path,
    question: str,
    methods: Sequence[str],
    ratios: Sequence[float],
    device: str,
    overlays: Path | None,
) -> None:
    """The user's own picture and question, at every method and ratio."""
    from tokprune.demo.models import load_model
    from tokprune.demo.sweep import ANSWER_TOKENS, FREE_ANSWER_TOKENS, ask_at, plan_cells

    picture = open_picture(image)
    model, processor, own = load_model(name, device)
    scorer = scorer_for(own, methods, device)
    console = Console()
    table = Table(title=escape(question), title_justify="left", header_style="bold")
    for column in ("method", "keep ratio", "tokens", "answer"):
        table.add_column(column)
    panels = []
    for method, ratio in plan_cells(methods, ratios):
        answer, stream = ask_at(
            model, processor, picture, question, method, ratio, ANSWER_TOKENS if own else FREE_ANSWER_TOKENS * 4, scorer
        )
        table.add_row(method, f"{ratio:g}", f"{stream.kept}/{stream.total}" if stream else "", escape(answer))
        if method != "none" and ratio == min(ratios, key=lambda r: abs(r - 0.1)):
            panels.append((method, answer, stream))
    console.print(table)
    if own:
        console.print("The embedded model knows drawn shapes, colours and characters only; use --model for a real one.")
    if overlays is not None and panels:
        overlays.mkdir(parents=True, exist_ok=True)
        path = overlays / f"kept_{image.stem}.png"
        kept_sheet(picture, question, panels, processor, "the kept tokens of each method").save(path)
        console.print(f"saved {path}", soft_wrap=True)
