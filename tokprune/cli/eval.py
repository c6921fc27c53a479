"""`tokprune eval`: what pruning loses on benchmarks, compared with other runs and with what was published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokprune.cli import options
from tokprune.errors import OptionError
from tokprune.loading import check_device, check_dtype

if TYPE_CHECKING:
    from tokprune.config import PruneConfig

DEFAULT_METHODS = "none,random,divprune,hired"


def evaluate(  # the options of the command
    model: Annotated[
        str | None, typer.Option(help="A hub id or path, or demo, the embedded VLM (the default).")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lmms-eval tasks, separated by commas; tokprune_scenes by default.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            "--method",
            help="Methods, separated by commas, and resize (smaller pictures): none,random,divprune,hired by default.",
        ),
    ] = None,
    ratios: options.Ratios = "0.5,0.25,0.1",
    prompt_budget: Annotated[
        str | None,
        typer.Option(help="Instead of --ratios: tokens of a whole prompt, text included, separated by commas."),
    ] = None,
    config: options.Config = None,
    limit: Annotated[str | None, typer.Option(help="Questions per task; all of them by default.")] = None,
    out: options.Results = Path("out/eval"),
    batch_size: options.BatchSize = 1,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of everything that draws.")] = 0,
    frames: Annotated[int | None, typer.Option(help="Frames of a video.")] = None,
    positions: options.Positions = "auto",
    prompts: Annotated[
        str | None, typer.Option(help="Whose wording of the questions: a model of lmms-eval, such as qwen3_vl.")
    ] = None,
    model_args: Annotated[
        str, typer.Option(help="More for the model, such as processor.max_pixels=602112,option.hired.alpha=0.6")
    ] = "",
    include_path: Annotated[list[Path] | None, typer.Option(help="A folder with task YAMLs of your own.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run cells again that failed before.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown to this file.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write the table as LaTeX to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Save plots in this folder.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one HTML file with tables and plots.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Run nothing: compare two results.json, or their folders, question by question."),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            help="Published numbers: without --model, or for a model of the tables (llava-1.5-7b), print them; for a "
            "checkpoint, run and set them beside.",
        ),
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what pruning loses on your tasks at each keep ratio. Exit code 1 when a cell failed."""
    from tokprune.cli.eval_run import EvalRequest, Outputs, compare_runs, print_reference, run
    from tokprune.evaluation.cells import BASELINE, SweepSettings, config_cells, plan
    from tokprune.evaluation.lmms_options import pruning_config

    outputs = Outputs(csv=csv, markdown=markdown, latex=latex, plots=plots, html=html)
    if compare is not None:
        compare_runs(*compare, outputs, quiet)
        return
    method_names, task_names = options.names(methods or ""), options.names(tasks or "")
    if reference and print_reference(model, method_names, task_names, outputs, quiet):
        return
    check_device(device)
    check_dtype(dtype)
    names = options.methods(methods or (DEFAULT_METHODS if config is None else "none"), smaller=True)
    whole = [n for n in names if prompt_budget is None or n == BASELINE]
    cells = plan(task_names or ["tokprune_scenes"], whole or [BASELINE], options.ratios(ratios))
    pruned: list[PruneConfig] = []
    if config is not None:
        pruned.append(options.config_of(config, positions=positions))
        positions = pruned[-1].positions
        if pruned[-1].prompt_budget is None:
            options.ratio_of(pruned[-1], config)
    settings = SweepSettings(
        model=model or "demo",
        limit=count(limit),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
        frames=frames,
        positions=positions,
        prompts=prompts,
        model_args=pairs(model_args),
    )
    for name in [n for n in names if prompt_budget is not None and n != BASELINE]:
        own = settings.options(name)
        for n in options.counts(prompt_budget or ""):
            made = pruning_config(name, positions=positions, options=own, seed=seed, prompt_budget=n)
            pruned += [] if made is None else [made]
    for pruning in pruned:
        more, settings = config_cells(cells, pruning, settings)
        cells = (*cells, *more)
    request = EvalRequest(
        cells=cells,
        settings=settings,
        out=out,
        folders=include_path or [],
        retry_failed=retry_failed,
        outputs=outputs,
        reference=reference,
        quiet=quiet,
    )
    raise typer.Exit(run(request))


def count(text: str | None) -> int | None:
    """--limit as a number of questions; a share is refused, since lmms-eval applies the first task's count to all."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise OptionError(
            f"--limit {text!r} is not a whole number; write how many questions each task gets: --limit 500."
        ) from None


def pairs(text: str) -> dict[str, object]:
    """ "a=1,b=x" as a dict; true, false, none and numbers are converted."""
    out: dict[str, object] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise OptionError(f"--model-args {part!r} is no name=value; write such as processor.max_pixels=602112.")
        out[name.strip()] = _value(value.strip())
    return out


def _value(text: str) -> object:
    words: dict[str, object] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
