"""Which signals there are, and which blocks of the vision tower each is read from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from tokprune.adapters.families import EncoderCall, family_of
from tokprune.adapters.tower_kinds import reader_of
from tokprune.adapters.towers import tower_blocks, tower_of
from tokprune.errors import MissingSignalError, OptionError, unknown
from tokprune.runtime.probe import AttentionProbe
from tokprune.types import Inputs

CLS_KINDS = ("cls_attention", "cls_logits", "cls_attention_1head", "value_attention")
"""Signals that [CLS] gives; in a tower without it they tell what a token receives."""

NAMES = (*CLS_KINDS, "received_attention", "keys", "value_norm", "encoder_features", "clip_image")
"""Signals of the vision tower; all but the last two take a block: "keys:-1", "received_attention:0.348"."""

LLM_SIGNALS = ("llm_attention", "llm_logits", "llm_question")
"""Signals of the LLM, all with a layer: "llm_attention:2"; `runtime.lookahead` makes them."""

ELSEWHERE = ("clip_text", "frame_scores", *LLM_SIGNALS)
"""Needs that do not come from the vision tower; they are passed over."""


def of_tower(needs: Iterable[str]) -> list[str]:
    """Those of `needs` that come from the vision tower."""
    return [name for name in needs if name.partition(":")[0] not in ELSEWHERE]


def block_index(spec: str | int | float, count: int, where: str = "the vision tower") -> int:
    """The 0-based block that `spec` means in a tower of `count` blocks. where: what has them, for the error.

    "8" is block 8, "-1" the last one; a fraction in (0, 1) is a relative depth: "0.348" is block
    round(0.348 * (count - 1)), so that block 8 of a 24-block tower carries over to towers of any depth.
    """
    text = str(spec).strip()
    try:
        index = int(text)
    except ValueError:
        try:
            depth = float(text)
        except ValueError:
            depth = math.nan
        if not 0.0 < depth < 1.0:
            raise OptionError(
                f"{text!r} does not name a block; write its 0-based number (0 to {count - 1}), a negative one that "
                "counts from the end (-1 is the last), or a relative depth between 0 and 1 such as 0.348."
            ) from None
        return round(depth * (count - 1))
    if not -count <= index < count:
        raise OptionError(
            f"block {index} does not exist: {where} has {count} blocks (0 to {count - 1}, or -{count} to -1). "
            f"To mean the same depth in every model write a fraction, such as {8 / 23:.3f} for block 8 of 24."
        )
    return index % count


def selected_block(base: nn.Module, count: int, kwargs: Inputs | None = None) -> int:
    """The block whose output goes to the projector; with windowed attention, the last block that sees everything."""
    full = getattr(tower_of(base), "fullatt_block_indexes", None)
    if full:
        return block_index(int(max(full)), count)
    layers = _feature_layers(base, kwargs)
    return count - 1 if layers is None else max(block_of_layer(layers[0], count), 0)


def _feature_layers(base: nn.Module, kwargs: Inputs | None) -> list[int] | None:
    """The hidden states the model selects, or None when it takes the tower's last output."""
    call = EncoderCall(base, "image", kwargs or {}, None)
    return family_of(base, kwargs).feature_layers(call)


def block_of_layer(layer: int, count: int) -> int:
    """The block whose output is hidden state `layer`; -1 for the embeddings (hidden state 0)."""
    if not -count - 1 <= layer <= count:
        raise OptionError(f"vision_feature_layer={layer} does not exist: the tower gives {count + 1} hidden states.")
    return layer - 1 if layer >= 0 else count + layer


def parse_needs(needs: Iterable[str]) -> list[tuple[str, str, str | None]]:
    """(name, kind, block or None) of each signal, those of other modules left out."""
    parsed = []
    for name in dict.fromkeys(needs):
        kind, colon, block = name.partition(":")
        if kind in ELSEWHERE:
            continue
        if kind not in NAMES:
            raise unknown("signal", kind, (*NAMES, *ELSEWHERE))
        if colon and kind in ("encoder_features", "clip_image"):
            raise OptionError(f"signal {name!r}: {kind} takes no block; write {kind!r}.")
        parsed.append((name, kind, block if colon else None))
    return parsed


def signal_block(base: nn.Module, spec: str | None, count: int, kwargs: Inputs | None = None) -> int:
    """The block that a signal with block `spec` is read from; None: the last one that attends, of those selected."""
    if spec is not None:
        return block_index(spec, count)
    chosen, blocks = selected_block(base, count, kwargs), tower_blocks(tower_of(base))
    attends = [i for i in range(chosen + 1) if reader_of(blocks[i]) is not None]  # LFM3's towers mix with convolutions
    return attends[-1] if attends else chosen


def signal_probe(base: nn.Module, needs: Sequence[str]) -> AttentionProbe:
    """A probe of what `needs` can be computed from, for the vision tower of `base`; nothing is hooked before `install`.

    Raises MissingSignalError for a tower that cannot tell.
    """
    blocks: set[int] = set()
    outputs: set[int] = set()
    for name, kind, spec in parse_needs(needs):
        if kind == "clip_image":
            continue
        layers = _feature_layers(base, None) if kind == "encoder_features" else None
        if kind == "encoder_features" and layers is None:
            continue  # the tower's last output is in the result of the call
        try:
            count = len(tower_blocks(tower_of(base)))
        except MissingSignalError as error:
            raise MissingSignalError(f"{model_type(base)} cannot give {name!r}: {error}") from None
        if layers is not None:
            outputs |= {b for b in (block_of_layer(layer, count) for layer in layers) if b >= 0}
        else:
            blocks.add(signal_block(base, spec, count))
    return AttentionProbe(tower_of(base), blocks, outputs)


def model_type(base: nn.Module) -> str:
    """Of a multimodal base model, as its config has it."""
    config: Any = base.config
    return str(config.model_type)
