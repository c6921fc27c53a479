"""`tokprune show`: one sheet with what each method keeps of a picture, or joins inside the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tokprune.errors import OptionError


@dataclass(frozen=True)
class Shown:
    """What one method made of the picture. maps: groups of the tower's patches, for methods of the encoder stage."""

    method: str
    answer: str
    stream: Any
    maps: Sequence[Any] = ()


def open_picture(path: Path) -> Any:
    """A picture file as RGB, or the error that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise OptionError(f"cannot read the picture {path}: {error}") from error


def kept_sheet(image: Any, question: str, panels: Sequence[tuple[str, str, Any]], processor: Any, subtitle: str) -> Any:
    """The picture beside what each method kept of it. panels: (method, answer or "", StreamRecord)."""
    from tokprune.viz.geometry import of_processor
    from tokprune.viz.sheet import method_sheet

    layout = panels[0][2].layout
    geometry = of_processor(processor, (image.height, image.width), None, layout)
    selections = {method: stream.selection for method, _, stream in panels}
    captions = {method: f"answer: {answer}" for method, answer, _ in panels if answer}
    return method_sheet(image, layout, selections, geometry, title=question, subtitle=subtitle, captions=captions)


MERGED = "Inside the tower, patches of one colour and outline became one token; dropped ones fade."


def map_sheet(image: Any, question: str, panels: Sequence[Shown], processor: Any, subtitle: str) -> Any:
    """The picture beside what each method did: merge maps for methods inside the tower, kept tokens for the others."""
    from tokprune.viz import style
    from tokprune.viz.geometry import of_processor
    from tokprune.viz.merge_map import draw_merge_map
    from tokprune.viz.overlay import draw_overlay
    from tokprune.viz.sheet import Panel, sheet

    longest = 420
    size = (image.height, image.width)
    original, _ = style.enlarge(style.to_rgb(image), longest)
    pictures = [Panel(original, "input", f"{len(panels[0].stream.layout.group)} tokens")]
    for panel in panels:
        layout, selection = panel.stream.layout, panel.stream.selection
        geometry = of_processor(processor, size, None, layout)
        if panel.maps:
            picture = draw_merge_map(image, panel.maps, geometry, longest=longest)
        else:
            picture = draw_overlay(image, layout, selection, geometry, longest=longest)
        total, count = len(layout.group), len(selection)
        caption = f"{count} of {total} tokens ({100 * count / total:.3g} %)"
        pictures.append(Panel(picture, panel.method, f"{caption}, answer: {panel.answer}" if panel.answer else caption))
    return sheet(pictures, question, f"{subtitle}. {MERGED}")


def ask(
    model: Any, processor: Any, picture: Any, question: str, method: str, ratio: float, tokens: int, scorer: Any
) -> Shown:
    """One answer about the picture under one method, and what was kept and joined."""
    import tokprune
    from tokprune.demo.sweep import answer_batch, build_inputs
    from tokprune.viz.merge_map import stream_maps

    with tokprune.apply(model, method, ratio=ratio, processor=processor, scorer=scorer) as pruning:
        inputs = build_inputs(processor, [question], [picture], model)
        answer = answer_batch(model, processor, inputs, tokens)[0]
        if pruning.last is None:
            raise OptionError(f"the model saw no picture under {method}.")
        stream, trace = pruning.last.streams[0], None if pruning.encoder is None else pruning.encoder.trace
        return Shown(method, answer, stream, () if trace is None else stream_maps(trace, stream))


def run_show(
    name: str,
    image: Path,
    question: str,
    methods: Sequence[str],
    ratio: float,
    device: str,
    out: Path,
    merge_map: bool | None = None,
) -> None:
    """Draw the sheet and save it. merge_map: groups inside the tower instead of kept tokens; None: for methods of the
    encoder stage.
    """
    from tokprune.cli.demo import scorer_for
    from tokprune.demo.models import load_model
    from tokprune.demo.sweep import ANSWER_TOKENS, FREE_ANSWER_TOKENS
    from tokprune.registry import method_class

    inside = [m for m in methods if method_class(m).stage == "encoder"]
    if merge_map and not inside:
        raise OptionError(
            f"--merge-map draws what is joined inside the vision tower, and none of {', '.join(methods)} works there; "
            "write --methods tome (tokprune methods --stage encoder lists the others)."
        )
    picture = open_picture(image)
    model, processor, own = load_model(name, device)
    scorer = scorer_for(own, methods, device)
    tokens = ANSWER_TOKENS if own else FREE_ANSWER_TOKENS
    panels = [ask(model, processor, picture, question, m, ratio, tokens, scorer) for m in methods]
    subtitle = f"{ratio:.3g} of the visual tokens kept, {model.config.model_type}"
    if merge_map is False or not inside:
        page = kept_sheet(picture, question, [(p.method, p.answer, p.stream) for p in panels], processor, subtitle)
    else:
        page = map_sheet(picture, question, panels, processor, subtitle)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.save(out)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write {out}: {error}") from error
    Console().print(f"saved {out}", soft_wrap=True)
