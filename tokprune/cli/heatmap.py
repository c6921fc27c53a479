"""`tokprune heatmap`: a signal of the vision tower, or a method's scores, as colours over the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokprune.cli import options
from tokprune.cli.output import console_for, say_saved
from tokprune.errors import OptionError


def heatmap(  # the options of the command
    image: options.Picture,
    out: options.Sheet = Path("heat.png"),
    signals: Annotated[
        str, typer.Option("--signals", "--signal", help="Signals of the tower: cls_attention, keys:-1, ...")
    ] = "",
    methods: Annotated[str, typer.Option("--methods", "--method", help="Or methods, for their scores.")] = "",
    question: options.Question = options.QUESTION,
    ratio: options.Ratio = 0.1,
    model: options.Model = "demo",
    device: options.Device = "cpu",
) -> None:
    """Draw a signal of the vision tower, or the scores of a method, for each token: a heat map over the picture."""
    from tokprune.adapters.prompting import build_inputs
    from tokprune.budget import check_ratio
    from tokprune.files import read_picture, save_picture
    from tokprune.loading import LoadOptions, check_device, demo_scorer, load
    from tokprune.viz import style
    from tokprune.viz.geometry import of_processor
    from tokprune.viz.heatmap import draw_heatmap
    from tokprune.viz.sheet import Panel, sheet
    from tokprune.viz.signal_map import values_of

    signal_names, method_names = options.names(signals), options.methods(methods)
    if not signal_names and not method_names:
        raise OptionError("say what to draw: --signals cls_attention, or --methods hired for the scores of a method.")
    check_device(device)
    check_ratio(ratio)
    picture = read_picture(image)
    loaded = load(model, LoadOptions(device))
    processor = loaded.processor
    scorer = demo_scorer(loaded, method_names)
    inputs = build_inputs(loaded.model, processor, question, images=[picture])
    original, _ = style.enlarge(picture, 420)
    panels = [Panel(original, "input", question if method_names else "")]
    for name in (*signal_names, *method_names):
        if name in signal_names:
            values, layout, source = values_of(loaded.model, inputs, processor=processor, signal=name)
        else:
            values, layout, source = values_of(
                loaded.model, inputs, processor=processor, scorer=scorer, method=name, ratio=ratio
            )
        geometry = of_processor(processor, (picture.height, picture.width), None, layout)
        panels.append(Panel(draw_heatmap(picture, layout, values, geometry, longest=420), name, source))
    page = sheet(panels, subtitle="Pale yellow is high, dark blue is low; pale grey was never seen.")
    say_saved(console_for(), [save_picture(page, out)])
