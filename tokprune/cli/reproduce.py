"""`tokprune reproduce`: a published table run here, the measured numbers beside the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tokprune.cli import options
from tokprune.cli.output import console_for, plain_table, resumable, save_json
from tokprune.loading import check_device, check_dtype

if TYPE_CHECKING:
    from tokprune.evaluation.cells import SweepSettings
    from tokprune.evaluation.reproduce import Outcome, Recipe
    from tokprune.evaluation.sweep import Sweep

DIFFERENT = 1  # exit code


def reproduce(  # the options of the command
    table: Annotated[str | None, typer.Argument(help="A recipe; without one they are listed.")] = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint elsewhere: a hub id or a folder.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", "--task", help="Only these of its tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task; all of them by default.")] = None,
    scorer: options.Scorer = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and run nothing.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Questions at once.")] = None,
    out: options.Results = Path("out/reproduce"),
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    json_file: options.Json = None,
    quiet: options.Quiet = False,
) -> None:
    """Run a published table and set the measured numbers beside it. Exit code 1 where one differs or was not run."""
    from tokprune.evaluation.cells import SweepSettings
    from tokprune.evaluation.reproduce import DIFFERS, NOT_RUN, TYPE, VERSION, find, outcomes

    console = console_for(quiet, json_file, 120)
    if table is None:
        _list(console)
        return
    recipe = find(table)
    check_device(device)
    check_dtype(dtype)
    options.at_least_one(limit=limit, batch_size=batch_size)
    names = options.names(tasks or "")
    _say(recipe, names, console)
    if dry_run:
        return
    given = {"limit": limit, "batch_size": batch_size}
    fixed = {**recipe.settings, **{k: v for k, v in given.items() if v is not None}, "device": device, "dtype": dtype}
    args = {**recipe.options(), **({} if scorer is None else {"scorer": scorer})}
    settings = SweepSettings(model=model or recipe.checkpoint, model_args=args, **fixed)  # type: ignore[arg-type]
    with resumable(console):
        sweep = _run(recipe, settings, names, out / table.replace("/", "_"), quiet)
    rows = outcomes(recipe, sweep)
    _print(rows, console)
    data = {"type": TYPE, "version": VERSION, "recipe": recipe.name, "source": recipe.source, "url": recipe.url}
    data |= {"settings": sweep.settings.to_dict(), "environment": sweep.environment, "rows": [vars(r) for r in rows]}
    save_json(console, json_file, data)
    if not rows or any(r.verdict in (DIFFERS, NOT_RUN) for r in rows):
        raise typer.Exit(DIFFERENT)


def _run(recipe: Recipe, settings: SweepSettings, tasks: list[str], out: Path, quiet: bool) -> Sweep:
    """The cells of a recipe through lmms-eval; finished ones are read from the results folder."""
    from tokprune.cli.eval_run import EvalRequest, run_cells
    from tokprune.evaluation.team import Team

    request = EvalRequest(recipe.cells(tasks), settings, out, retry_failed=True, quiet=quiet)
    store = request.store().open()
    try:
        return run_cells(request, store, Console(stderr=True, quiet=quiet), Team())
    finally:
        store.close()


def _list(console: Console) -> None:
    """All recipes: those that run, then those that do not, with the reason."""
    from tokprune.evaluation.reproduce import recipes

    known = recipes().values()
    rows = [(r.name, f"{len(r.rows)} x {len(r.benchmarks)}", r.title) for r in known if not r.missing]
    console.print(plain_table(("recipe", "rows x benchmarks", "table"), rows, left=3))
    for recipe in known:
        if recipe.missing:
            console.print(escape(f"not run: {recipe.name}: {recipe.missing}"), style="dim", soft_wrap=True)


def _say(recipe: Recipe, tasks: list[str], console: Console) -> None:
    cells = recipe.cells(tasks)
    console.print(escape(recipe.title), style="bold", soft_wrap=True)
    for line in (recipe.url, recipe.note):
        if line:
            console.print(escape(line), style="dim", soft_wrap=True)
    settings = ", ".join(f"{c.method} at {c.ratio:.4g}" for c in cells if c.task == cells[0].task)
    where = ", ".join(dict.fromkeys(c.task for c in cells))
    console.print(escape(f"{recipe.checkpoint}: {settings}; on {where}; {len(cells)} cells"), soft_wrap=True)


def _print(rows: list[Outcome], console: Console) -> None:
    from tokprune.evaluation.reproduce import AGREES, UNDECIDED

    body = []
    for r in rows:
        ours = "" if r.ours is None else f"{r.ours:.4g}"
        if r.low is not None and r.high is not None:
            ours += f" [{r.low:.4g}, {r.high:.4g}]"
        body.append((r.benchmark, r.label, f"{r.published:g}", ours, str(r.questions or ""), r.verdict))
    heads = ("benchmark", "row", "published", "measured [95 %]", "questions", "verdict")
    console.print(plain_table(heads, body, left=2))
    for why in dict.fromkeys(f"{r.label} on {r.benchmark}: {r.why}" for r in rows if r.why):
        console.print(escape(f"not run: {why}"), style="dim", soft_wrap=True)
    agreeing = sum(r.verdict == AGREES for r in rows)
    console.print(f"{agreeing} of {len(rows)} agree: within 1 point, or 1 % of numbers above 100")
    if any(r.verdict == UNDECIDED for r in rows):
        console.print("undecided: a part of the questions does not contradict the number, and cannot confirm it")
