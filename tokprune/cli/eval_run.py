"""What `tokprune eval` does: runs the sweep with a progress bar, prints the table, writes what was asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from tokprune.cli.output import console_for, progress_bar, resumable, say_saved
from tokprune.environment import environment
from tokprune.errors import OptionError, missing_extra
from tokprune.evaluation import export
from tokprune.evaluation.cells import BASELINE, OPTION, Cell, CellResult, SweepSettings, build_methods
from tokprune.evaluation.errors import Failure
from tokprune.evaluation.results import load, results_json, timing_json
from tokprune.evaluation.store import Store
from tokprune.evaluation.sweep import Sweep, Watcher, run_sweep, survey
from tokprune.evaluation.table import Row, rows_of
from tokprune.evaluation.team import Team
from tokprune.files import check_writable, write_text
from tokprune.loading import DEMO, DEMO_CLIPS, check_reachable

if TYPE_CHECKING:
    from tokprune.evaluation.harness import Harness

DONE, FAILED = 0, 1  # exit codes


@dataclass(frozen=True)
class Outputs:
    """Files to write besides the results folder."""

    csv: Path | None = None
    markdown: Path | None = None
    latex: Path | None = None
    plots: Path | None = None
    html: Path | None = None

    def check(self) -> None:
        """Say now what would fail after hours: missing packages, places that cannot be written."""
        from importlib.util import find_spec

        from tokprune.evaluation.harness import installed

        if not installed():  # its extra brings what plots need
            raise missing_extra("lmms-eval", "eval", "tokprune eval")
        if (self.plots or self.html) and find_spec("matplotlib") is None:
            raise missing_extra("matplotlib", "plot", "drawing plots")
        if self.html:
            from tokprune.viz.html import require

            require()
        probe = None if self.plots is None else self.plots / "plot.png"
        for path in (self.csv, self.markdown, self.latex, self.html, probe):
            if path is not None:
                check_writable(path)

    def write(self, rows: Sequence[Row], against: str = BASELINE) -> list[Path]:
        """The table files."""
        wanted = {"csv": self.csv, "markdown": self.markdown, "latex": self.latex}
        return [export.write(rows, kind, path, against) for kind, path in wanted.items() if path is not None]


class Bars(Watcher):
    """Progress bars of a sweep: cells, and questions of the cell in work."""

    def __init__(self, console: Console, enabled: bool) -> None:
        self.console = console
        self.progress = progress_bar(console, enabled)
        self.cells = self.progress.add_task("cells", total=None)
        self.questions = self.progress.add_task("", total=None, visible=False)

    def start(self, cells: Sequence[Cell], finished: int) -> None:
        """Show how much is left."""
        self.progress.update(self.cells, total=len(cells), completed=finished)
        if finished:
            self.console.print(f"{finished} of {len(cells)} cells are finished already")

    def begin(self, cell: Cell) -> None:
        """A new bar for the questions."""
        self.progress.reset(self.questions, description=str(cell), total=None, visible=True)

    def tick(self, done: int, total: int) -> None:
        """Questions answered."""
        self.progress.update(self.questions, completed=done, total=total)

    def finish(self, cell: Cell, result: CellResult | None) -> None:
        """A line per cell, so that a log of the run reads well."""
        self.progress.advance(self.cells)
        if result is not None:
            self.console.print(f"[dim]{escape(str(cell))}: {result.main} {result.metrics[result.main]:.4g}[/]")

    def fail(self, failed: Failure) -> None:
        """A line that says why."""
        self.progress.advance(self.cells)
        self.console.print(f"[red]failed[/] {escape(str(failed.cell))}: {escape(failed.reason)}", soft_wrap=True)


@dataclass(frozen=True)
class EvalRequest:
    """A sweep to run and what to make of it. out: the results folder. folders: more places with task YAMLs."""

    cells: Sequence[Cell]
    settings: SweepSettings
    out: Path
    folders: Sequence[Path] = ()
    retry_failed: bool = False
    outputs: Outputs = field(default_factory=Outputs)
    reference: bool = False
    quiet: bool = False

    def store(self) -> Store:
        """The results folder, not opened yet; refuses what would fail later."""
        for method in dict.fromkeys(c.method for c in self.cells):
            build_methods(method, self.settings)
        check_options(self.cells, self.settings)
        self.outputs.check()
        if self.settings.model not in (DEMO, DEMO_CLIPS):
            check_reachable(self.settings.model, self.settings.model_args.get("revision"))
        return Store(self.out, self.settings, environment(self.settings.device))


def run(request: EvalRequest) -> int:
    """Run the sweep and return the exit code."""
    team, store = Team.launched(), request.store()
    console = Console(file=sys.stderr, quiet=request.quiet or not team.leads)
    if team.leads:
        store.open()
    try:
        with resumable(console):
            sweep = run_cells(request, store, console, team)
            if not team.leads:
                return DONE
            store.write("timing.json", timing_json(sweep))
            written = [store.write("results.json", results_json(sweep, ["tokprune", *sys.argv[1:]]))]
    finally:
        store.close()
    return _show(sweep, written, request)


def run_cells(request: EvalRequest, store: Store, console: Console, team: Team) -> Sweep:
    """Run the cells that are not finished, under progress bars."""
    bars = Bars(console, not request.quiet and team.leads)
    # A finished sweep shows its table at once; loading lmms-eval and the model takes a while.
    idle = team.size == 1 and not survey(request.cells, store, request.retry_failed).todo
    harness = None if idle else _harness(request, store, bars, console)
    try:
        with bars.progress:
            return run_sweep(
                request.cells,
                store,
                harness or _nothing,
                watcher=bars,
                retry_failed=request.retry_failed,
                team=harness.team if harness is not None else Team(),
            )
    finally:
        if harness is not None:
            harness.close()


def _harness(request: EvalRequest, store: Store, bars: Bars, console: Console) -> Harness:
    from tokprune.evaluation.harness import Harness

    with console.status("loading lmms-eval and the model"):
        return Harness(
            list(dict.fromkeys(c.task for c in request.cells)),
            request.settings,
            request.folders,
            lambda cell: store.path(cell) / "log.txt",
            bars.tick,
        )


def _nothing(cell: Cell) -> CellResult | None:
    raise RuntimeError(f"{cell} was finished a moment ago, and is not any more")


def check_options(cells: Sequence[Cell], settings: SweepSettings) -> None:
    """Refuse options of methods that are not in the sweep: they would do nothing."""
    names = {part for cell in cells for part in cell.method.split("+")}
    names |= {str(method["name"]) for of in settings.prompt_budgets for method in settings.configs[of]}
    for name in settings.model_args:
        if name.startswith(OPTION) and name.removeprefix(OPTION).partition(".")[0] not in names:
            raise OptionError(
                f"--model-args {name}=... belongs to no method of this sweep; write option.<method>.<field>, with a "
                f"method of {', '.join(sorted(names))}."
            )


def _show(sweep: Sweep, written: list[Path], request: EvalRequest) -> int:
    """Print the table and the failures, write the files, return the exit code."""
    outputs, console = request.outputs, console_for(request.quiet)
    rows = rows_of(sweep)
    if rows:
        console.print(export.terminal(rows, f"{sweep.settings.model}, {_questions(rows)}"))
        for table in export.details(sweep):
            console.print(table)
        written += outputs.write(rows)
    if request.reference:
        from tokprune.evaluation.reference.beside import beside

        console.print(beside(sweep))
    if rows and (outputs.plots or outputs.html):
        from tokprune.evaluation import report

        figures = report.figures(rows)
        if outputs.plots is not None:
            written += report.save_plots(figures, outputs.plots)
        if outputs.html is not None:
            written.append(report.write_html(sweep, rows, figures, outputs.html, request.reference))
    say_saved(console, written)
    _print_failures(sweep)
    return FAILED if sweep.failures else DONE


def _print_failures(sweep: Sweep) -> None:
    errors = Console(file=sys.stderr)
    for failed in sweep.failures:
        errors.print(
            f"[bold red]failed:[/] {escape(f'{failed.cell}: {failed.error}: {failed.reason}')}", soft_wrap=True
        )
    if sweep.failures:
        errors.print(
            f"{len(sweep.failures)} of {len(sweep.failures) + len(sweep.results)} cells failed; mend what they name "
            f"and add --retry-failed to the same command"
        )


def _questions(rows: Sequence[Row]) -> str:
    counts = sorted({r.questions for r in rows})
    return f"{counts[0]} questions" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} questions"


def compare_runs(first: Path, second: Path, outputs: Outputs, quiet: bool) -> None:
    """Print and write the paired comparison of two results files."""
    from tokprune.evaluation.compare import compare_sweeps

    outputs.check()
    comparison = compare_sweeps(load(first), load(second))
    console = console_for(quiet)
    console.print(comparison.table(str(first), str(second)))
    say_saved(console, outputs.write(comparison.rows, f"the same cells of {first}"))


def print_reference(
    model: str | None, methods: Sequence[str], tasks: Sequence[str], outputs: Outputs, quiet: bool
) -> bool:
    """Print the published tables, unless `model` is a checkpoint to run; whether that was done."""
    from tokprune.evaluation.reference import known_model, select, terminal, to_text

    if model is not None and not known_model(model):
        return False
    matches = select(model, methods, tasks)
    console = console_for(quiet)
    for chosen in matches:
        for table in chosen.tables:
            console.print(terminal(chosen, table))
        for claim in chosen.claims if not methods and not tasks else ():
            console.print(f"- {escape(claim)}")
        console.print()
    console.print("none of these was measured by us; compare within one table only (docs/reference.md)")
    if outputs.markdown is not None:
        say_saved(console, [write_text(outputs.markdown, to_text(matches))])
    return True
