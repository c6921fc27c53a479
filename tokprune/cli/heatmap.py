"""`tokprune heatmap`: a signal of the vision tower, or a method's scores, as colours over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tokprune.errors import OptionError


def run_heatmap(
    name: str,
    image: Path,
    signals: Sequence[str],
    methods: Sequence[str],
    question: str,
    ratio: float,
    device: str,
    out: Path,
) -> None:
    """Draw the sheet of heat maps and save it."""
    from tokprune.adapters.prompting import build_inputs
    from tokprune.cli.demo import scorer_for
    from tokprune.cli.profile_inputs import check_device
    from tokprune.cli.show import open_picture
    from tokprune.demo.models import load_model
    from tokprune.viz import style
    from tokprune.viz.geometry import of_processor
    from tokprune.viz.heatmap import draw_heatmap
    from tokprune.viz.sheet import Panel, sheet
    from tokprune.viz.signal_map import values_of

    if not signals and not methods:
        raise OptionError("say what to draw: --signals cls_attention, or --methods hired for the scores of a method.")
    check_device(device)
    picture = open_picture(image)
    model, processor, own = load_model(name, device)
    scorer = scorer_for(own, methods, device)
    inputs = build_inputs(model, processor, question, images=[picture])
    original, _ = style.enlarge(style.to_rgb(picture), 420)
    panels = [Panel(original, "input", question if methods else "")]
    asked: list[tuple[str, dict[str, Any]]] = [(s, {"signal": s}) for s in signals]
    asked += [(m, {"method": m, "ratio": ratio}) for m in methods]
    for label, what in asked:
        values, layout, source = values_of(model, inputs, processor=processor, scorer=scorer, **what)
        geometry = of_processor(processor, (picture.height, picture.width), None, layout)
        drawn = draw_heatmap(picture, layout, values, geometry, longest=420)
        panels.append(Panel(drawn, label, source))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet(panels, subtitle="Pale yellow is high, dark blue is low; pale grey was never seen.").save(out)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write {out}: {error}") from error
    Console().print(f"saved {out}", soft_wrap=True)
