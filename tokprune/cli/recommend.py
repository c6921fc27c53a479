"""`tokprune recommend`: which method and ratio, found on one's own pictures or tasks, written as a config."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tokprune.cli import options
from tokprune.cli.output import console_for, plain_table, resumable, save_json, say_saved
from tokprune.environment import environment
from tokprune.errors import OptionError
from tokprune.files import write_json
from tokprune.loading import LoadOptions, check_device, check_dtype, load, no_bars

if TYPE_CHECKING:
    from tokprune.cli.eval_run import Bars
    from tokprune.evaluation.cells import Cell, CellResult, SweepSettings
    from tokprune.evaluation.own_pictures import PictureQuestion
    from tokprune.evaluation.recommend import Advice
    from tokprune.evaluation.sweep import Sweep

NOTHING_FOUND = 1  # exit code
WORDY = 4  # words of a mean answer from which on word for word is a harsh judge
WIDTH = 100  # of a table that goes into a file or a pipe


def recommend(  # the options of the command
    model: options.Model = "demo",
    images: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures; its questions.json or questions.csv (image, question, answer) if any."
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", "--task", help="Or a task of lmms-eval, labelled.")] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="What to ask about every picture of a folder without a list of questions.")
    ] = None,
    max_loss: Annotated[str, typer.Option(help="What may be lost: 1%, or 0.01.")] = "1%",
    latency: Annotated[
        str | None, typer.Option(help="Time to the first token that must be met: 200ms, 0.2s; then least loss wins.")
    ] = None,
    methods: Annotated[str | None, typer.Option("--methods", "--method", help="The short list; a+b together.")] = None,
    ratios: Annotated[str | None, typer.Option("--ratios", "--ratio", help="Keep ratios to try.")] = None,
    scorer: options.Scorer = None,
    limit: Annotated[int | None, typer.Option(help="Questions at most.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer about --images.")] = 16,
    out: Annotated[
        Path, typer.Option(help="Results, and prune.json; an interrupted search goes on from there.")
    ] = Path("out/recommend"),
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    json_file: options.Json = None,
    quiet: options.Quiet = False,
) -> None:
    """Find the fastest method and ratio within a loss on your own pictures. Exit code 1 where there is none.

    Without answers, what counts is whether the pruned model says what the unpruned one says.
    """
    from tokprune.evaluation import recommend as found
    from tokprune.evaluation.cells import BASELINE, SweepSettings

    check_device(device)
    check_dtype(dtype)
    options.at_least_one(limit=limit, max_new_tokens=max_new_tokens)
    if (images is None) == (tasks is None):
        raise OptionError("give --images FOLDER (your own pictures), or --tasks NAME (labelled), one of them.")
    loss, in_time = share(max_loss), None if latency is None else milliseconds(latency)
    request = Request(
        model_settings=SweepSettings(
            model, limit, device=device, dtype=dtype, model_args={} if scorer is None else {"scorer": scorer}
        ),
        images=images,
        task=tasks,
        asked=question or [options.QUESTION],
        longest=max_new_tokens,
        out=out,
        methods=[m for m in options.methods(methods or ",".join(found.METHODS)) if m != BASELINE],
        ratios=options.ratios(ratios) if ratios else list(found.RATIOS),
        loss=loss,
        quiet=quiet,
    )
    console = console_for(quiet, json_file, WIDTH)
    with resumable(console):
        sweep, skipped = search(request, console)
    advice = found.advise(sweep, skipped, loss, in_time)
    _print(advice, console)
    words = [len(s.answer.split()) for s in sweep.results[0].samples]
    if advice.metric == "agreement" and sum(words) > WORDY * len(words):
        console.print("- long answers seldom agree word for word: ask for short ones (--question), or give answers")
    config = out / "prune.json"
    config.unlink(missing_ok=True)  # of an earlier search
    if advice.best is not None:
        found.config_for(advice.best, sweep.settings).save(config)
        say_saved(console, [config])
        console.print(escape(f"use it: tokprune run --config {config} ..., or PruneConfig.load({str(config)!r})"))
    data = {**advice.to_dict(), "settings": sweep.settings.to_dict(), "environment": sweep.environment}
    write_json(out / "recommend.json", data)
    save_json(console, json_file, data)
    if advice.best is None:
        raise typer.Exit(NOTHING_FOUND)


@dataclass(frozen=True)
class Request:
    """What is to be tried on what. asked: of every picture of a folder without a list. longest: answer about it."""

    model_settings: SweepSettings
    images: Path | None
    task: str | None
    asked: Sequence[str]
    longest: int
    out: Path
    methods: Sequence[str]
    ratios: Sequence[float]
    loss: float
    quiet: bool

    def questions(self) -> list[PictureQuestion]:
        """Those about the user's own pictures."""
        from tokprune.evaluation.own_pictures import read_questions

        return [] if self.images is None else read_questions(self.images, self.asked, self.model_settings.limit)

    def settings(self, questions: Sequence[PictureQuestion]) -> SweepSettings:
        """What decides whether a finished cell can be used again: model and questions."""
        from tokprune.evaluation.own_pictures import fingerprint

        if self.images is None:
            return self.model_settings
        own = {"questions": fingerprint(questions), "max_new_tokens": self.longest}
        return replace(self.model_settings, model_args={**self.model_settings.model_args, **own})


def search(request: Request, console: Console) -> tuple[Sweep, dict[str, str]]:
    """Run the short list under a progress bar; what is in the results folder already is read from there."""
    from tokprune.cli.eval_run import Bars
    from tokprune.evaluation import recommend as found
    from tokprune.evaluation.cells import build_methods
    from tokprune.evaluation.own_pictures import TASK
    from tokprune.evaluation.store import Store
    from tokprune.evaluation.sweep import run_sweep

    questions = request.questions()
    settings = request.settings(questions)
    for method in request.methods:
        build_methods(method, settings)

    class Quieter(Bars):
        def start(self, cells: Sequence[Cell], finished: int) -> None:
            """The search asks for cells in parts; one line for each part that is finished says nothing."""
            self.progress.update(self.cells, total=1 + len(request.methods) * len(request.ratios))
            self.progress.advance(self.cells, finished)

    bars = Quieter(Console(stderr=True, quiet=request.quiet), not request.quiet)
    runner = _Runner(request, settings, questions, bars)
    store = Store(request.out, settings, environment(settings.device)).open()

    def run(cells: Sequence[Cell]) -> Sweep:
        sweep = run_sweep(cells, store, runner, watcher=bars)
        runner.baseline = runner.baseline or next((r for r in sweep.results if r.cell.baseline), None)
        return sweep

    try:
        with bars.progress:
            sweep, skipped = found.search(run, request.task or TASK, request.methods, request.ratios, request.loss)
            return runner.timed(sweep), skipped
    finally:
        store.close()


@dataclass
class _Runner:
    """Runs cells on a model that is opened when the first one is not finished yet."""

    request: Request
    settings: SweepSettings
    questions: Sequence[PictureQuestion]
    bars: Bars
    baseline: CellResult | None = None
    inner: Any = None

    def __call__(self, cell: Cell) -> CellResult | None:
        if self.inner is None:
            self.inner = self._tasks() if self.request.images is None else self._pictures()
        return self.inner(cell)

    def timed(self, sweep: Sweep) -> Sweep:
        """The sweep with times to the first token that were taken in turns, for the settings that may be chosen."""
        from tokprune.evaluation.recommend import LEVEL, tried
        from tokprune.evaluation.table import TTFT

        if self.request.images is None:
            return sweep
        base = next(r for r in sweep.results if r.cell.baseline)
        near = [r.cell for r in sweep.results if tried(base, r, LEVEL).within(self.request.loss)]
        if len(near) < 2:  # the baseline alone
            return sweep
        self.inner = self.inner or self._pictures()
        times = self.inner.first_token_ms(near)
        timing = {cell: {TTFT: ms} for cell, ms in times.items()}
        sweep.results = [replace(r, timing={**r.timing, **timing.get(r.cell, {})}) for r in sweep.results]
        return sweep

    def _tasks(self) -> Callable[[Cell], CellResult | None]:
        from tokprune.evaluation.harness import Harness

        return Harness([str(self.request.task)], self.settings, tick=self.bars.tick)

    def _pictures(self) -> Callable[[Cell], CellResult | None]:
        from tokprune.evaluation.own_pictures import OwnPictures
        from tokprune.runtime.scorers import load_scorer

        s = self.settings
        with no_bars(self.request.quiet):
            loaded = load(s.model, LoadOptions(s.device, s.dtype))
        name = s.model_args.get("scorer")
        scorer = None if name is None else load_scorer(str(name), loaded.processor)
        own = OwnPictures(loaded, self.questions, s, self.request.longest, scorer, self.bars.tick)
        if self.baseline is not None:
            own.remember(self.baseline)
        return own


def _print(advice: Advice, console: Console) -> None:
    """The settings as a table, what was not run, and the advice."""
    from tokprune.evaluation.recommend import interval, lines

    rows = []
    for t in advice.tried:
        kl = "" if t.kl is None else f"{t.kl:.3f}"
        mark = "proven" if t.proven(advice.max_loss) else "within" if t.within(advice.max_loss) else ""
        tokens = "" if t.kept is None or t.total is None else f"{t.kept:.0f}/{t.total:.0f}"
        time = "" if t.ttft_ms is None else f"{t.ttft_ms:.3g} ms"
        rows.append((t.method, f"{t.ratio:g}", tokens, time, interval(t), kl, mark))
    count = advice.tried[0].questions if advice.tried else 0
    base = "" if advice.base_ttft_ms is None else f", first token after {advice.base_ttft_ms:.3g} ms"
    title = f"{count} questions; all tokens: {advice.metric} {advice.base_score:.3g}{base}"
    heads = ("method", "ratio", "tokens", "first token", "loss [95 %]", "KL", "")
    console.print(plain_table(heads, rows, title))
    kind = "answers that differ from the unpruned ones" if advice.metric == "agreement" else f"{advice.metric} lost"
    console.print(f"loss: {escape(kind)}; its intervals hold for all {len(rows)} settings at once", style="dim")
    for name, why in {**advice.skipped, **advice.failed}.items():
        console.print(escape(f"not run: {name}: {why}"), style="dim", soft_wrap=True)
    for line in lines(advice):
        console.print(escape(f"- {line}"), soft_wrap=True)


def share(text: str) -> float:
    """ "1%" or "0.01" as 0.01."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(%?)\s*", text)
    try:
        value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise OptionError(f"--max-loss {text!r} is no share below 1; write --max-loss 1% or --max-loss 0.01.")
    return value


def milliseconds(text: str) -> float:
    """ "200ms" or "0.2s" as 200."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise OptionError(f"--latency {text!r} is no time; write --latency 200ms or --latency 0.2s.")
    return float(match[1]) * (1000 if match[2] == "s" else 1)
