"""The commands and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokprune.cli.eval import evaluate
from tokprune.cli.run import run
from tokprune.errors import OptionError

app = typer.Typer(
    name="tokprune",
    help="Run vision-language models on a tenth of their visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("eval")(evaluate)
app.command("run")(run)


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
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out questions per cell; by default 210, of clips 30, of long ones 12."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas; by default none,random,uniform,divprune,hired, "
            "of clips none,uniform_frames,quota,evs,vidcom2."
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(help="Keep ratios, separated by commas; by default 1,0.5,0.25,0.1,0.05, of clips all but the 1."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the cells to this file.")] = None,
    overlays: Annotated[Path | None, typer.Option(help="Save pictures of the kept tokens in this folder.")] = None,
    image: Annotated[Path | None, typer.Option(help="Ask about your own picture instead.")] = None,
    video: Annotated[bool, typer.Option("--video", help="Clips (mp4 files) instead of pictures.")] = False,
    long: Annotated[
        bool, typer.Option("--long", help="With --video: clips of 16 to 32 scenes, one of which matters.")
    ] = False,
    clip: Annotated[Path | None, typer.Option(help="Ask about your own clip instead.")] = None,
    question: Annotated[str | None, typer.Option(help="The question about --image or --clip.")] = None,
    model: Annotated[str, typer.Option(help="A hub id or path instead of the embedded demo VLM.")] = "demo",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no table.")] = False,
) -> None:
    """Ask the embedded VLM about pictures or clips at several keep ratios: accuracy, tokens, prefill time and FLOPs."""
    from tokprune.cli.demo import METHODS, QUESTIONS, RATIOS, run_demo, run_own_picture
    from tokprune.cli.demo_video import check_clip_options, run_own_clip, run_video_demo

    if (image is None and clip is None) != (question is None):
        raise OptionError(
            "--image (or --clip) and --question go together: tokprune demo --image my.jpg --question "
            "'what color is the circle ?'"
        )
    check_clip_options(video, long, image, clip, model)
    given_methods = None if methods is None else names(methods)
    given_ratios = None if ratios is None else numbers(ratios)
    if clip is not None and question is not None:
        run_own_clip(clip, question, given_methods, given_ratios, device, overlays)
    elif video:
        run_video_demo(questions, given_methods, given_ratios, json_file, overlays, device, seed, quiet, long)
    elif image is not None and question is not None:
        run_own_picture(model, image, question, given_methods or METHODS, given_ratios or RATIOS, device, overlays)
    else:
        run_demo(
            model,
            questions or QUESTIONS,
            given_methods or METHODS,
            given_ratios or RATIOS,
            json_file,
            overlays,
            device,
            seed,
            quiet,
        )


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
    merge_map: Annotated[
        bool | None,
        typer.Option(
            "--merge-map/--kept",
            help="What methods inside the tower joined, or what the LLM got; maps where there are any.",
        ),
    ] = None,
) -> None:
    """Draw which tokens of a picture each method keeps, or joins inside the vision tower."""
    from tokprune.cli.show import run_show

    run_show(model, image, question, names(methods), ratio, device, out, merge_map)


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="A hub id or path, or the embedded demo VLM.")] = "demo",
    preset: Annotated[
        str | None, typer.Option(help="A known model without weights; with --flops-only or --random-weights.")
    ] = None,
    flops_only: Annotated[
        bool,
        typer.Option(
            "--flops-only", help="Arithmetic on the meta device, of --preset or a --model's config; nothing is run."
        ),
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build --preset for real: true times and bytes, no sense.")
    ] = False,
    methods: Annotated[
        str, typer.Option("--methods", "--method", help="Methods, separated by commas; a+b work together.")
    ] = "divprune",
    ratios: Annotated[str, typer.Option("--ratios", "--ratio", help="Keep ratios, separated by commas.")] = "0.5,0.1",
    image: Annotated[Path | None, typer.Option(help="The picture; a drawn scene by default.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video instead of a picture.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of --video (8), or of a preset's clip.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Scale the picture to about so many visual tokens.")] = None,
    question: Annotated[str, typer.Option(help="The question about it.")] = "",
    text: Annotated[int, typer.Option(help="Text tokens around the picture of --preset.")] = 64,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(help="Timed runs of each cell.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    attn: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2, ...")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with tables and pictures.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Save plots and pictures of the kept tokens here.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Measure where the time goes and what pruning saves: stages, memory, FLOPs, beside the ideal and a smaller picture."""
    from tokprune.cli.profile import Request, run_profile

    run_profile(
        Request(
            model,
            preset,
            flops_only,
            random_weights,
            names(methods),
            numbers(ratios),
            image,
            video,
            frames,
            tokens,
            question,
            text,
            batch,
            new_tokens,
            repeats,
            device,
            dtype,
            attn,
            json_file,
            html,
            plots,
            quiet,
        )
    )


@app.command()
def heatmap(
    image: Annotated[Path, typer.Option(help="The picture.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the sheet goes (PNG, JPEG, ...).")] = Path("heat.png"),
    signals: Annotated[
        str, typer.Option("--signals", "--signal", help="Signals of the tower: cls_attention, keys:-1, ...")
    ] = "",
    methods: Annotated[str, typer.Option("--methods", "--method", help="Or methods, for their scores.")] = "",
    question: Annotated[str, typer.Option(help="The question, which some methods read.")] = "what is in this picture ?",
    ratio: Annotated[float, typer.Option(help="Share of visual tokens that the methods keep.")] = 0.1,
    model: Annotated[str, typer.Option(help="A hub id or path, or the embedded demo VLM.")] = "demo",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Draw what the vision tower, or a method, thinks of each token: a heat map over the picture."""
    from tokprune.cli.heatmap import run_heatmap

    run_heatmap(model, image, names(signals), names(methods), question, ratio, device, out)


@app.command()
def plots(
    results: Annotated[Path, typer.Argument(help="The JSON that profile, demo or eval wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the pictures.")] = Path("plots"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Draw the plots of a results file: latency bars, accuracy over ratio, accuracy against cost."""
    from tokprune.cli.plots import run_plots

    run_plots(results, out, quiet)


@app.command()
def plan(
    preset: Annotated[str | None, typer.Option(help="The model, such as llava-1.5-7b.")] = None,
    model: Annotated[str | None, typer.Option(help="A hub id or path instead: its config and processor.")] = None,
    gpu: Annotated[str | None, typer.Option(help="The device, such as a100, h100, l4.")] = None,
    measured: Annotated[
        Path | None, typer.Option("--profile", help="JSON of tokprune profile: its device, and its model by default.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="ttft, total or memory.")] = None,
    limit: Annotated[float | None, typer.Option(help="Seconds for ttft and total, GiB for memory.")] = None,
    ratios: Annotated[str, typer.Option(help="Keep ratios, separated by commas.")] = "0.5,0.25,0.1,0.05",
    text: Annotated[int | None, typer.Option(help="Text tokens around the picture (64, or the profile's).")] = None,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    compare: Annotated[bool, typer.Option(help="Also look at larger models at equal cost (slower).")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Estimate which keep ratio reaches a target on a GPU, and where pruning stops paying."""
    from tokprune.cli.plan import run_plan

    run_plan(
        preset,
        model,
        gpu,
        measured,
        target,
        limit,
        numbers(ratios),
        text,
        batch,
        new_tokens,
        compare,
        json_file,
        quiet,
    )
