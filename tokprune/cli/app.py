"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokprune.errors import OptionError

app = typer.Typer(
    name="tokprune",
    help="Run vision-language models on a tenth of their visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def numbers(text: str) -> list[float]:
    """ "0.5,0.1" as numbers, or the error that shows the form."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise OptionError(
            f"--ratios {text!r} is not a list of numbers; write for example --ratios 0.5,0.25,0.1"
        ) from None


def names(text: str) -> list[str]:
    """ "a,b" as names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def version(show: bool) -> None:
    """Print the version and end."""
    if show:
        import tokprune

        typer.echo(f"tokprune {tokprune.__version__}")
        raise typer.Exit


@app.callback()
def root(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run vision-language models on a tenth of their visual tokens."""


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="Held-out questions per cell.")] = 210,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "none,random,uniform,divprune,hired",
    ratios: Annotated[str, typer.Option(help="Keep ratios, separated by commas.")] = "1,0.5,0.25,0.1,0.05",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the cells to this file.")] = None,
    overlays: Annotated[Path | None, typer.Option(help="Save pictures of the kept tokens in this folder.")] = None,
    image: Annotated[Path | None, typer.Option(help="Ask about your own picture instead.")] = None,
    question: Annotated[str | None, typer.Option(help="The question about --image.")] = None,
    model: Annotated[str, typer.Option(help="A hub id or path instead of the embedded demo VLM.")] = "demo",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no table.")] = False,
) -> None:
    """Ask the embedded VLM about pictures at several keep ratios: accuracy, tokens, prefill time and FLOPs."""
    from tokprune.cli.demo import run_demo, run_own_picture

    if (image is None) != (question is None):
        raise OptionError(
            "--image and --question go together: tokprune demo --image my.jpg --question 'what color is the circle ?'"
        )
    if image is not None and question is not None:
        run_own_picture(model, image, question, names(methods), numbers(ratios), device, overlays)
        return
    run_demo(model, questions, names(methods), numbers(ratios), json_file, overlays, device, seed, quiet)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this one.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only those of one stage.")] = None,
    query_aware: Annotated[
        bool | None, typer.Option("--query-aware/--query-agnostic", help="Only those that read the question, or not.")
    ] = None,
    merges: Annotated[
        bool | None, typer.Option("--merges/--selects", help="Only those that merge tokens, or not.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the methods, or explain one."""
    from tokprune.cli.methods import explain, show

    if name is not None:
        explain(name, as_json)
    else:
        show(stage, query_aware, merges, as_json)


@app.command()
def show(
    image: Annotated[Path, typer.Option(help="The picture.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the sheet goes (PNG, JPEG, ...).")] = Path("kept.png"),
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "random,divprune,hired,visionzip",
    ratio: Annotated[float, typer.Option(help="Share of visual tokens kept.")] = 0.1,
    question: Annotated[str, typer.Option(help="The question, which some methods read.")] = "what is in this picture ?",
    model: Annotated[str, typer.Option(help="A hub id or path, or the embedded demo VLM.")] = "demo",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Draw which tokens of a picture each method keeps."""
    from tokprune.cli.show import run_show

    run_show(model, image, question, names(methods), ratio, device, out)


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="A hub id or path, or the embedded demo VLM.")] = "demo",
    preset: Annotated[
        str | None, typer.Option(help="Arithmetic of a known model instead, without weights; needs --flops-only.")
    ] = None,
    flops_only: Annotated[
        bool, typer.Option("--flops-only", help="Count FLOPs and bytes of --preset on the meta device.")
    ] = False,
    methods: Annotated[str, typer.Option("--methods", "--method", help="Methods, separated by commas.")] = "divprune",
    ratios: Annotated[str, typer.Option("--ratios", "--ratio", help="Keep ratios, separated by commas.")] = "0.5,0.1",
    image: Annotated[Path | None, typer.Option(help="The picture; a drawn scene by default.")] = None,
    question: Annotated[str, typer.Option(help="The question about it.")] = "",
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(help="Timed runs of each cell.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Measure where the time goes and what pruning saves: stages, memory, FLOPs, beside the ideal."""
    from tokprune.cli.profile import run_arithmetic, run_profile

    if preset is not None or flops_only:
        if preset is None or not flops_only:
            raise OptionError(
                "--preset and --flops-only go together: tokprune profile --preset llava-1.5-7b --flops-only"
            )
        run_arithmetic(preset, numbers(ratios), 64, batch, new_tokens, json_file, quiet)
        return
    run_profile(
        model, image, question, names(methods), numbers(ratios), device, batch, new_tokens, repeats, json_file, quiet
    )


@app.command()
def plan(
    preset: Annotated[str, typer.Option(help="The model, such as llava-1.5-7b.")],
    gpu: Annotated[str, typer.Option(help="The device, such as a100, h100, l4.")],
    target: Annotated[str | None, typer.Option(help="ttft, total or memory.")] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds for ttft and total, GiB for memory.")] = None,
    ratios: Annotated[str, typer.Option(help="Keep ratios, separated by commas.")] = "0.5,0.25,0.1,0.05",
    text: Annotated[int, typer.Option(help="Text tokens around the picture.")] = 64,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    compare: Annotated[bool, typer.Option(help="Also look at larger models at equal cost (slower).")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Estimate which keep ratio reaches a target on a GPU, and where pruning stops paying."""
    from tokprune.cli.plan import run_plan

    run_plan(preset, gpu, target, limit, numbers(ratios), text, batch, new_tokens, compare, json_file, quiet)
