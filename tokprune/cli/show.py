"""`tokprune show`: one sheet with what each method keeps of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tokprune.errors import OptionError


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


def run_show(
    name: str, image: Path, question: str, methods: Sequence[str], ratio: float, device: str, out: Path
) -> None:
    """Draw the sheet and save it."""
    from tokprune.cli.demo import scorer_for
    from tokprune.demo.models import load_model
    from tokprune.demo.sweep import ANSWER_TOKENS, FREE_ANSWER_TOKENS, ask_at

    picture = open_picture(image)
    model, processor, own = load_model(name, device)
    scorer = scorer_for(own, methods, device)
    panels = []
    for method in methods:
        tokens = ANSWER_TOKENS if own else FREE_ANSWER_TOKENS
        answer, stream = ask_at(model, processor, picture, question, method, ratio, tokens, scorer)
        panels.append((method, answer, stream))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept_sheet(
            picture, question, panels, processor, f"{ratio:.3g} of the visual tokens kept, {model.config.model_type}"
        ).save(out)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot write {out}: {error}") from error
    Console().print(f"saved {out}", soft_wrap=True)
