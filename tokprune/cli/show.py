"""`tokprune show`: one sheet with what each method keeps of a picture, or joins inside the vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokprune.cli import options
from tokprune.cli.output import console_for, say_saved
from tokprune.errors import OptionError
from tokprune.files import read_picture, save_picture
from tokprune.loading import LoadOptions, check_device, demo_scorer, load
from tokprune.registry import method_class

MERGED = "Inside the tower, patches of one colour and outline became one token; dropped ones fade."


def show(  # the options of the command
    image: options.Picture,
    out: options.Sheet = Path("kept.png"),
    methods: Annotated[
        str, typer.Option("--methods", "--method", help="Methods, separated by commas.")
    ] = "random,divprune,hired,visionzip",
    ratio: options.Ratio = 0.1,
    question: options.Question = options.QUESTION,
    model: options.Model = "demo",
    device: options.Device = "cpu",
    merge_map: Annotated[
        bool | None,
        typer.Option(
            "--merge-map/--kept",
            help="What methods inside the tower joined, or what the LLM got; maps where there are any.",
        ),
    ] = None,
) -> None:
    """Draw which tokens of a picture each method keeps, or joins inside the vision tower."""
    from tokprune.budget import check_ratio
    from tokprune.demo.asking import Asker
    from tokprune.viz.kept import kept_on_image

    names = options.methods(methods)
    maps = any(method_class(part).stage in ("pixels", "encoder") for name in names for part in name.split("+"))
    if merge_map and not maps:
        raise OptionError(
            f"--merge-map draws what is joined inside the vision tower, and none of {', '.join(names)} works there; "
            "write --methods tome (tokprune methods --stage encoder lists the others)."
        )
    maps = maps and merge_map is not False
    check_device(device)
    check_ratio(ratio)
    picture = read_picture(image)
    loaded = load(model, LoadOptions(device))
    asker = Asker(loaded.model, loaded.processor, loaded.embedded, demo_scorer(loaded, names))
    answers = [asker.ask(question, picture, name, ratio, maps=maps) for name in names]
    records = {a.method: a.stream for a in answers if a.stream is not None}
    captions = {a.method: f"answer: {a.text}" for a in answers if a.text}
    note = f"{ratio:.3g} of the visual tokens kept, {asker.model.config.model_type}"
    joined = {a.method: a.maps for a in answers} if maps else None
    note = f"{note}. {MERGED}" if maps else note
    page = kept_on_image(
        picture, records, asker.processor, title=question, subtitle=note, captions=captions, maps=joined
    )
    say_saved(console_for(), [save_picture(page, out)])
