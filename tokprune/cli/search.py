"""`tokprune search`: the keep ratio of each layer of the LLM that costs least, or loses least."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokprune.cli import options
from tokprune.cli.output import console_for, plain_table, progress_bar, save_json, say_saved
from tokprune.environment import command_line, environment
from tokprune.errors import OptionError
from tokprune.files import check_writable
from tokprune.loading import DEMO, LoadOptions, check_device, check_dtype, load, no_bars
from tokprune.types import VLM, JsonObject

if TYPE_CHECKING:
    from tokprune.schedule import Schedule
    from tokprune.search.run import Searched, SearchGoal
    from tokprune.search.scores import ModelScore
    from tokprune.search.tasks import TaskScore

DEMO_SEED = 1
"""Of the demo's questions: others than those of `tokprune demo`."""
FAILED = 1


@dataclass(frozen=True)
class Asked:
    """What is searched by: the model, the questions, and how an answer counts."""

    model: str
    method: str
    tasks: tuple[str, ...]
    score: str
    questions: int
    batch_size: int
    device: str
    dtype: str

    def key(self) -> JsonObject:
        """What scores depend on."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("device", "batch_size")}


def search(  # the options of the command
    model: options.Model = "demo",
    method: Annotated[str, typer.Option(help="A method of the decoder stage.")] = "fastv",
    tasks: Annotated[
        str, typer.Option(help="lmms-eval tasks, separated by commas; for the demo VLM its own questions by default.")
    ] = "",
    min_accuracy: Annotated[
        float | None, typer.Option(help="Save what can be saved while this share of the whole model's score is left.")
    ] = None,
    max_flops: Annotated[
        float | None, typer.Option(help="Lose as little as possible at this share of the LLM's prefill FLOPs.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="With --score kl, in place of --min-accuracy: 0.003, for example.")
    ] = None,
    score: Annotated[
        str, typer.Option(help="accuracy, agreement (with the whole model's answers), or kl (of the next token).")
    ] = "agreement",
    strategy: Annotated[
        str | None, typer.Option(help="greedy (G-Search), sigmoid (P-Sigmoid) or withdraw (VTW); by what is asked for.")
    ] = None,
    questions: Annotated[int, typer.Option(help="Questions per task.")] = 70,
    every: Annotated[int, typer.Option(help="Drop in front of every so many layers at most; 4 for large models.")] = 1,
    trials: Annotated[int, typer.Option(help="Schedules that sigmoid tries.")] = 40,
    sampler: Annotated[str, typer.Option(help="Of sigmoid: optuna (Bayesian), or random.")] = "optuna",
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    batch_size: options.BatchSize = 25,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the pruning config goes; its scores are kept beside it.")
    ] = Path("out/search.json"),
    json_file: options.Json = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Find how many visual tokens each layer of the LLM needs. Interrupted, it goes on from the scores that it has."""
    from tokprune.search.run import SearchGoal
    from tokprune.search.scores import check_decoder, scheduled
    from tokprune.search.strategies import Trials

    options.at_least_one(questions=questions, every=every, trials=trials, batch_size=batch_size)
    check_device(device)
    check_dtype(dtype)
    wanted = SearchGoal(_floor(min_accuracy, max_kl, score), max_flops, strategy, trials=Trials(trials, sampler, seed))
    check_decoder(method)
    asked = Asked(model, method, tuple(options.names(tasks)), score, questions, batch_size, device, dtype)
    check_writable(out)
    console = console_for(quiet, json_file)
    found, evaluations = _run(asked, wanted, every, out, console, quiet)
    _print(console, found)
    config = scheduled(method, found.found.schedule)
    if config is not None:
        config.save(out)
        say_saved(console, [out])
    made_with = {"command": command_line(), "environment": environment()}
    save_json(console, json_file, found.to_dict() | {"asked": asked.key(), "evaluations": evaluations} | made_with)
    if not found.fits:
        console.print(f"[red]the score is below what was asked for[/]: {found.found.score:.4g}")
        raise typer.Exit(FAILED)


def _floor(min_accuracy: float | None, max_kl: float | None, score: str) -> float | None:
    """What `Wanted.floor` takes."""
    if score == "kl":
        if min_accuracy is not None or (max_kl is not None and max_kl <= 0):
            raise OptionError("--score kl goes with --max-kl, a positive number such as 0.003.")
        return None if max_kl is None else -max_kl
    if max_kl is not None:
        raise OptionError("--max-kl goes with --score kl.")
    if min_accuracy is not None and not 0 < min_accuracy <= 1:
        raise OptionError(f"--min-accuracy {min_accuracy} is a share of the whole model's score, in (0, 1].")
    return min_accuracy


def _run(
    asked: Asked, wanted: SearchGoal, every: int, out: Path, console: Console, quiet: bool
) -> tuple[Searched, int]:
    """Load, score, search; the number of schedules that were scored beside what was found."""
    from tokprune.profiling.formulas import DecoderShape
    from tokprune.search.journal import Journal
    from tokprune.search.run import search as run_search
    from tokprune.search.scores import droppable_layers

    journal = Journal(out.with_suffix(".scores.jsonl"), asked.key())
    if journal.remembered:
        console.print(f"{journal.remembered} schedules are scored already")
    with no_bars(quiet):
        score, model = _score(asked)
    layers = droppable_layers(model)[::every]
    with progress_bar(console, not quiet) as progress:
        bar = progress.add_task("schedules", total=wanted.evaluations(len(layers)))

        def tick(schedule: Schedule | None, reached: float) -> None:
            progress.advance(bar)

        shape = DecoderShape.of(model.config)
        found = run_search(journal.remembering(score, tick), layers, wanted, shape, score.tokens)
    return found, len(journal.known)


def _score(asked: Asked) -> tuple[ModelScore | TaskScore, VLM]:
    """The score, and the model that it asks."""
    if asked.tasks or asked.model != DEMO:
        return _task_score(asked)
    from tokprune.demo import held_out
    from tokprune.demo.asking import Asker
    from tokprune.demo.sweep import is_right
    from tokprune.search.scores import ModelScore

    loaded = load(DEMO, LoadOptions(asked.device, asked.dtype))
    asker = Asker(loaded.model, loaded.processor)
    examples = held_out(asked.questions, seed=DEMO_SEED)
    starts = range(0, len(examples), asked.batch_size)
    batches = [asker.inputs(examples[at : at + asked.batch_size]) for at in starts]
    score = ModelScore(
        loaded.model,
        loaded.processor,
        asked.method,
        batches,
        asked.score,
        right=lambda i, text: is_right(text, examples[i].answer),
        new_tokens=asker.new_tokens,
    )
    return score, loaded.model


def _task_score(asked: Asked) -> tuple[TaskScore, VLM]:
    from tokprune.evaluation.cells import SweepSettings
    from tokprune.evaluation.harness import Harness
    from tokprune.search.tasks import TaskScore

    if not asked.tasks:
        raise OptionError(f"say which questions {asked.model} is asked: --tasks mmbench_en_dev_lite, for example.")
    settings = SweepSettings(
        model=asked.model,
        limit=asked.questions,
        batch_size=asked.batch_size,
        device=asked.device,
        dtype=asked.dtype,
        model_args={"flops_samples": 0},
    )
    harness = Harness(asked.tasks, settings)
    return TaskScore(harness, asked.method, asked.tasks, asked.score), harness.model.engine().loaded.model


def _print(console: Console, searched: Searched) -> None:
    """A row per layer where something is dropped, and what it comes to."""
    data = searched.to_dict()
    schedule = searched.found.schedule
    if schedule is None:
        console.print(f"nothing can be dropped inside the LLM at this score ({searched.found.score:.4g})")
        return
    counts = schedule.counts(data["visual_tokens"])
    rows = [[f"{at}", f"{share:.3g}", f"{n}"] for (at, share), n in zip(schedule.steps, counts, strict=True)]
    console.print(plain_table(["from layer", "share left", f"of {data['visual_tokens']} tokens"], rows, left=0))
    console.print(
        f"score {searched.found.score:.4g} (whole model {searched.whole:.4g}); {100 * searched.flops:.3g} % of the "
        f"LLM's prefill FLOPs, {data['visual_tokens_on_average']:.4g} visual tokens per layer on average"
    )
