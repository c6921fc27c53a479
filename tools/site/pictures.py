"""What each method does to the demo picture or clip, drawn while the site is built."""

from __future__ import annotations

import tempfile
from copy import copy
from functools import cache

from PIL import Image

import tokprune.demo
from tokprune.demo.asking import Asker, Medium, shown
from tokprune.errors import TokpruneError
from tokprune.methods.base import Method
from tokprune.registry import get_method, method_class
from tokprune.runtime.records import LastRun, StreamRecord
from tokprune.tokens import Selection
from tokprune.viz.kept import kept_on_clip, kept_on_image
from tokprune.viz.merge_map import stream_maps
from tools.site.evidence import ROOT

PICTURE = ROOT / "docs" / "images" / "scene.png"
QUESTION = "what color is the circle ?"
RATIO = {"pixels": 0.3, "encoder": 0.3, "connector": 0.1, "frames": 0.1, "decoder": 0.1}
INSIDE = "divprune"  # what wrappers run in their picture


@cache
def asker(clips: bool) -> Asker:
    """The demo VLM for pictures or for clips, loaded once."""
    load = tokprune.demo.load_clips if clips else tokprune.demo.load
    return Asker(*load(), scorer=tokprune.demo.load_scorer())


@cache
def clip() -> tuple[str, Medium]:
    """A question about a held-out clip, and its frames."""
    with tempfile.TemporaryDirectory() as folder:
        example = tokprune.demo.held_out_clips(1, folder=folder)[0]
        return example.question, shown(example)


def takes_ratio(name: str) -> bool | None:
    """Whether a method is put on with a ratio, or without; None: it needs more than the demo VLM has."""
    by = asker(method_class(name).info.video)
    for ratio in (0.1, None):
        try:
            tokprune.apply(by.model, _method(name), ratio=ratio, processor=by.processor, scorer=by.scorer).remove()
        except TokpruneError:
            continue
        return ratio is not None
    return None


def caption(name: str) -> str:
    """What the picture of a method shows."""
    cls = method_class(name)
    share = f"{RATIO[cls.stage]:.0%} of the visual tokens"
    inside = f", around `{INSIDE}`" if cls.info.wrapper else ""
    if cls.stage == "pixels":
        return f"Units of one colour are told by the one that was encoded ({share} encoded)."
    if cls.stage == "encoder":
        return f"Patches of one colour became one token inside the tower ({share} left); dropped ones fade."
    if cls.stage == "decoder":
        return f"What the LLM's last layers still see of the demo picture at {share}; asked: “{QUESTION}”"
    if cls.info.video:
        return f"Eight frames of a clip at {share}{inside}; asked: “{clip()[0]}”"
    return f"The demo picture at {share}{inside}; asked: “{QUESTION}”"


def draw(name: str) -> Image.Image | str:
    """The picture of one method, or the reason why there is none."""
    cls = method_class(name)
    if cls.stage not in RATIO:
        return (
            f"It acts in the stage `{cls.stage}`: no token leaves the picture before the LLM, so there is none to draw."
        )
    try:
        if cls.info.video:
            return _on_clip(name)
        return _on_picture(name, None if takes_ratio(name) is False else RATIO[cls.stage])
    except TokpruneError as error:
        return f"Not drawn on the demo VLM: {error}"


def deepest(prefill: LastRun) -> StreamRecord:
    """The first picture's record, with what the LLM's last layers still see of it where tokens went inside the LLM."""
    record = copy(prefill.streams[0])
    indices = record.selection.indices
    for drop in prefill.drops:
        if (chosen := drop.selections[record.row]) is not None:
            indices = indices[chosen.indices.to(indices.device)]
    if prefill.drops:
        record.selection = Selection(indices)
    return record


def _method(name: str) -> str | Method:
    return get_method(name, method=INSIDE) if method_class(name).info.wrapper else name


def _on_picture(name: str, ratio: float | None) -> Image.Image:
    by = asker(False)
    picture = Image.open(PICTURE).convert("RGB")
    inputs = by.prepare([QUESTION], [picture])
    with tokprune.apply(by.model, _method(name), ratio=ratio, processor=by.processor, scorer=by.scorer) as pruning:
        text = by.answers(inputs)[0]
        assert pruning.last is not None
        record = deepest(pruning.last)
        trace = pruning.encoder.trace if pruning.encoder is not None else None
        joined = {name: stream_maps(trace, record)} if trace is not None else None
    return kept_on_image(picture, {name: record}, by.processor, captions={name: f"answer: {text}"}, maps=joined)


def _on_clip(name: str) -> Image.Image:
    by = asker(True)
    question, frames = clip()
    with tokprune.apply(by.model, _method(name), ratio=0.1, processor=by.processor, scorer=by.scorer) as pruning:
        by.answers(by.prepare([question], [frames]))
        assert pruning.last is not None
        return kept_on_clip(frames, {name: pruning.last.streams}, by.processor)[0][1]  # type: ignore[arg-type]
