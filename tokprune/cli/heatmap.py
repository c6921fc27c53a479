"""`tokprune heatmap`: a signal of the vision tower, or a method's scores, as colours over the picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokprune.cli import options
from tokprune.cli.output import console_for, say_saved
from tokprune.errors import OptionError
from tokprune.files import read_picture, save_picture
from tokprune.loading import Loaded, LoadOptions, check_device, demo_scorer, load, split_methods

if TYPE_CHECKING:
    from torch import Tensor

    from tokprune.tokens import Layout
    from tokprune.types import Inputs


def heatmap(  # the options of the command
    image: options.Picture,
    out: options.Sheet = Path("heat.png"),
    signals: Annotated[
        str,
        typer.Option(
            "--signals",
            "--signal",
            help="Signals of the tower (cls_attention, keys:-1), or of layer l of the LLM for a token or word of its "
            "answer: llm_attention:<l>, llm_attention:<l>:<token>.",
        ),
    ] = "",
    methods: Annotated[str, typer.Option("--methods", "--method", help="Or methods, for their scores.")] = "",
    question: options.Question = options.QUESTION,
    ratio: options.Ratio = 0.1,
    pruned_by: Annotated[
        str, typer.Option(help="A method that prunes while llm_attention is looked at; dropped tokens stay grey.")
    ] = "",
    model: options.Model = "demo",
    device: options.Device = "cpu",
) -> None:
    """Draw for each token where the vision tower or the LLM looks, or the scores of a method: a heat map."""
    from tokprune.adapters.prompting import build_inputs
    from tokprune.budget import check_ratio
    from tokprune.viz import style
    from tokprune.viz.answer_map import SIGNAL
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
    panels = [Panel(original, "input", question if method_names or pruned_by else "")]
    for name in (*signal_names, *method_names):
        if name.split(":")[0] == SIGNAL:
            values, layout, source = looked_at(loaded, inputs, name, pruned_by, ratio)
        elif name in signal_names:
            values, layout, source = values_of(loaded.model, inputs, processor=processor, signal=name)
        else:
            values, layout, source = values_of(
                loaded.model, inputs, processor=processor, scorer=scorer, method=name, ratio=ratio
            )
        geometry = of_processor(processor, (picture.height, picture.width), None, layout)
        panels.append(Panel(draw_heatmap(picture, layout, values, geometry, longest=420), name, source))
    page = sheet(panels, subtitle="Pale yellow is high, dark blue is low; pale grey was never seen.")
    say_saved(console_for(), [save_picture(page, out)])


def looked_at(loaded: Loaded, inputs: Inputs, name: str, pruned_by: str, ratio: float) -> tuple[Tensor, Layout, str]:
    """Values, layout and source of a signal llm_attention:<layer>[:<token or word>], pruned or not."""
    import contextlib

    import tokprune
    from tokprune.viz.answer_map import answer_map

    _, _, rest = name.partition(":")
    layer, _, token = rest.partition(":")
    if not layer:
        raise OptionError(f"signal {name!r} names no layer; write {name}:-1 for the last layer of the LLM.")
    methods = split_methods(pruned_by) if pruned_by else []
    pruned: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if methods:
        scorer = demo_scorer(loaded, methods)
        pruned = tokprune.apply(loaded.model, methods, ratio=ratio, processor=loaded.processor, scorer=scorer)
    with pruned:
        number = token.lstrip("-").isdigit()
        found = answer_map(
            loaded.model, loaded.processor, inputs, layer, int(token or 0) if number or not token else token
        )
    return found.values, found.layout, found.source + (f"; pruned by {pruned_by} at {ratio:g}" if methods else "")
