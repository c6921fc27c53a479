"""`tokprune profile`: time, memory and FLOPs of a model on disk, or the arithmetic of one that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokprune.cli import options


def profile(  # the options of the command
    model: options.Model = "demo",
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
        str | None,
        typer.Option("--methods", "--method", help="Methods, separated by commas, divprune by default; a+b together."),
    ] = None,
    ratios: Annotated[
        str | None, typer.Option("--ratios", "--ratio", help="Keep ratios, separated by commas; 0.5,0.1 by default.")
    ] = None,
    config: options.Config = None,
    image: Annotated[Path | None, typer.Option(help="The picture; a drawn scene by default.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video instead of a picture.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of --video (8), or of a preset's clip.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Scale the picture to about so many visual tokens.")] = None,
    question: Annotated[str, typer.Option(help="The question about it.")] = "",
    text: Annotated[int, typer.Option(help="Text tokens around the picture of --preset.")] = 64,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 16,
    repeats: Annotated[int, typer.Option(help="Timed runs of each cell.")] = 5,
    device: options.Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    attn: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2, ...")] = None,
    json_file: options.Json = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page with tables and pictures.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Save plots and pictures of the kept tokens here.")] = None,
    quiet: options.Quiet = False,
) -> None:
    """Measure where the time goes and what pruning saves: stages, memory, FLOPs, beside the ideal and a smaller
    picture."""
    fields = dict(locals())  # each option is a field of the request
    fields["json"] = fields.pop("json_file")
    from tokprune.cli.profile_run import ProfileRequest, run_profile
    from tokprune.scaling import RESIZE

    names = options.methods(methods or "divprune", smaller=True)  # the smaller picture is always measured
    fields["methods"], fields["ratios"] = [n for n in names if n != RESIZE], options.ratios(ratios or "0.5,0.1")
    if config is not None:
        fields["config"] = pruning = options.config_of(config, methods=methods, ratios=ratios)
        fields["ratios"] = [options.ratio_of(pruning, config)]
    run_profile(ProfileRequest(**fields))
