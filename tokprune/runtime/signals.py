"""Signals: what the vision tower tells about each visual token, computed when a method needs it, in the rows' order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokprune.adapters.families import FAMILIES, EncoderCall, UnknownGeometryError, arrange, family_of
from tokprune.adapters.tower_kinds import reader_of
from tokprune.adapters.towers import FEATURES_ALONE, tower_blocks, tower_of
from tokprune.errors import MissingSignalError, OptionError, unknown
from tokprune.ops.numeric import wide
from tokprune.runtime.probe import AttentionProbe, Projections
from tokprune.types import Inputs

if TYPE_CHECKING:
    from tokprune.runtime.encoder.stage import EncoderStage

__all__ = ["SignalSet", "block_index", "compute_signals", "required_blocks", "tower_blocks", "tower_of"]

CLS_KINDS = ("cls_attention", "cls_logits", "cls_attention_1head", "value_attention")
"""Signals that [CLS] gives; in a tower without it they tell what a token receives."""

NAMES = (*CLS_KINDS, "received_attention", "keys", "value_norm", "encoder_features", "clip_image")
"""Signals of this module; all but the last two take a block: "keys:-1", "received_attention:0.348"."""

LLM_SIGNALS = ("llm_attention", "llm_logits", "llm_question")
"""Signals of the LLM, all with a layer: "llm_attention:2"; `runtime.lookahead` makes them."""

ELSEWHERE = ("clip_text", "frame_scores", *LLM_SIGNALS)
"""Needs that do not come from the vision tower; they are passed over here."""


def block_values(kind: str, seen: Projections, cls: bool, frame: Tensor | None = None) -> tuple[Tensor, str]:
    """Signal `kind` of all tokens of one block, special ones included, and what it is in words. -> (B, N, ...).

    cls: the first token is [CLS]. frame: (N,) queries of the frame of each row, as of `Projections.received`.
    """
    if kind == "keys":
        return wide(seen.k).transpose(1, 2), "keys"
    if kind == "value_norm":
        return mean_value_norm(seen.v), "L1 norm of the head-mean values"
    logits, one_head = kind == "cls_logits", kind == "cls_attention_1head"
    what = {"cls_logits": "logits", "cls_attention_1head": "attention, heads taken as one,"}.get(kind, "attention")
    values = kind == "value_attention"
    if kind in CLS_KINDS and cls:
        if values:
            return seen.cls_value_row(), "[CLS] row of value similarities"
        return seen.cls_row(logits, one_head), f"[CLS] row of {what}"
    received = seen.received(logits, one_head, values, frame)
    return received, f"received {'value similarities' if values else what}"


def mean_value_norm(values: Tensor) -> Tensor:
    """L1 norm of each token's value vector after its heads were averaged. (..., H, S, d) -> (..., S) in float32.

    Averaged first, so heads that disagree cancel; the sum of the heads' norms ranks tokens differently.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    return wide.mean(-3).abs().sum(-1)


@dataclass(frozen=True)
class SignalSet:
    """The signals of one encoder call, by name."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """(R, ...) over all flattened rows in placeholder order, separators 0."""
    sources: dict[str, str] = field(default_factory=dict)
    """How each was obtained, for the report."""


@runtime_checkable
class PatchScorer(Protocol):
    """A model that gives the signal `clip_image`."""

    def embed_image(self, pixel_values: Tensor) -> Tensor:
        """Pictures (U, 3, H, W) as the processor normalised them -> (U, N, E), one per patch in raster order."""


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
    return count - 1 if layers is None else max(_block_of_layer(layers[0], count), 0)


def _feature_layers(base: nn.Module, kwargs: Inputs | None) -> list[int] | None:
    """The hidden states the model selects, or None when it takes the tower's last output."""
    call = EncoderCall(base, "image", kwargs or {}, None)
    return family_of(base, kwargs).feature_layers(call)


def _block_of_layer(layer: int, count: int) -> int:
    """The block whose output is hidden state `layer`; -1 for the embeddings (hidden state 0)."""
    if not -count - 1 <= layer <= count:
        raise OptionError(f"vision_feature_layer={layer} does not exist: the tower gives {count + 1} hidden states.")
    return layer - 1 if layer >= 0 else count + layer


def _parse(needs: Iterable[str]) -> list[tuple[str, str, str | None]]:
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


def _block(base: nn.Module, spec: str | None, count: int, kwargs: Inputs | None = None) -> int:
    if spec is not None:
        return block_index(spec, count)
    chosen, blocks = selected_block(base, count, kwargs), tower_blocks(tower_of(base))
    attends = [i for i in range(chosen + 1) if reader_of(blocks[i]) is not None]  # LFM3's towers mix with convolutions
    return attends[-1] if attends else chosen


def required_blocks(base: nn.Module, needs: Sequence[str]) -> AttentionProbe:
    """A probe that listens to what `needs` can be computed from, installed on the vision tower of `base`.

    Nothing is hooked when nothing needs a block. Raises MissingSignalError for a tower that cannot tell.
    """
    return signal_probe(base, needs).install()


def signal_probe(base: nn.Module, needs: Sequence[str]) -> AttentionProbe:
    """A probe of what `needs` can be computed from, for the vision tower of `base`; nothing is hooked before `install`.

    Raises MissingSignalError for a tower that cannot tell.
    """
    blocks: set[int] = set()
    outputs: set[int] = set()
    for name, kind, spec in _parse(needs):
        if kind == "clip_image":
            continue
        layers = _feature_layers(base, None) if kind == "encoder_features" else None
        if kind == "encoder_features" and layers is None:
            continue  # the tower's last output is in the result of the call
        try:
            count = len(tower_blocks(tower_of(base)))
        except MissingSignalError as error:
            raise MissingSignalError(f"{_name(base)} cannot give {name!r}: {error}") from None
        if layers is not None:
            outputs |= {b for b in (_block_of_layer(layer, count) for layer in layers) if b >= 0}
        else:
            blocks.add(_block(base, spec, count))
    return AttentionProbe(tower_of(base), blocks, outputs)


def _name(base: nn.Module) -> str:
    config: Any = base.config
    return str(config.model_type)


@torch.no_grad()
def compute_signals(  # of one call: its four parts as the hook has them, and what reads them
    base: nn.Module,
    modality: str,
    kwargs: Inputs,
    output: object,
    probe: AttentionProbe | None,
    needs: Sequence[str],
    scorer: object = None,
    encoder: EncoderStage | None = None,
) -> SignalSet:
    """The signals `needs` of one get_image_features or get_video_features call that `probe` listened to.

    The first four are that call, as its hook hands it on. scorer: a PatchScorer, for `clip_image`. encoder: of a tower
    that is reduced inside; signals of a block with fewer rows are what that block computed, each group's value at the
    places of its members, 0 for dropped tokens.
    """
    parsed = _parse(needs)
    if not parsed:
        return SignalSet()
    call = EncoderCall(base, modality, kwargs, output)
    reader = _Reader(call, probe, scorer, encoder)
    result = SignalSet()
    for name, kind, spec in parsed:
        try:
            result.values[name], result.sources[name] = reader.read(kind, spec)
        except UnknownGeometryError as error:
            why = f"its patches cannot be matched with its tokens ({error})"
            raise MissingSignalError(f"{_name(base)} cannot give {name!r}: {why}. {FEATURES_ALONE}") from None
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            if call.config.model_type in FAMILIES:  # ours to mend
                raise
            why = f"its vision tower computes in a way that is not known here ({type(error).__name__}: {error})"
            raise MissingSignalError(f"{_name(base)} cannot give {name!r}: {why}. {FEATURES_ALONE}") from error
    return result


class _Reader:
    """Reads the signals of one call; projections of a block are put in order once."""

    def __init__(
        self,
        call: EncoderCall,
        probe: AttentionProbe | None,
        scorer: object,
        encoder: EncoderStage | None,
    ) -> None:
        self.call, self.scorer, self.encoder = call, scorer, encoder
        self.family = family_of(call.base, call.kwargs)
        self._probe = probe
        self._seen: dict[int, Projections] = {}

    @property
    def probe(self) -> AttentionProbe:
        if self._probe is None:
            raise MissingSignalError(
                "no probe listened to the vision tower; make one with required_blocks(base, needs)."
            )
        return self._probe

    def read(self, kind: str, spec: str | None) -> tuple[Tensor, str]:
        """Values of all rows and how they were obtained."""
        if kind == "encoder_features":
            return self.features()
        if kind == "clip_image":
            return self.clip()
        count = len(tower_blocks(self.probe.tower))
        block = _block(self.call.base, spec, count, self.call.kwargs)
        if block not in self._seen:
            self._seen[block] = self.probe.projections(block)
        seen = self._seen[block]
        if self.encoder is None:
            prefix = self.prefix(seen.q.shape[2])
            values, source = self.score(kind, seen, prefix > 0, block)
        else:
            values, source = self.reduced(kind, seen, block, self.encoder)
            prefix = self.prefix(values.shape[1])
        return self.rows(values[:, prefix:]), source

    def reduced(self, kind: str, seen: Projections, block: int, encoder: EncoderStage) -> tuple[Tensor, str]:
        """(B, N, ...) values of a block whose rows the encoder stage may have reduced, for all original tokens."""
        sizes_inside = encoder.channels > 0 and encoder.places(block) is not None
        if sizes_inside and kind in ("cls_logits", "cls_attention_1head"):
            raise MissingSignalError(
                f"{kind!r} of block {block} has no meaning behind {encoder.method.info.name!r}: this tower carries "
                "the sizes of merged tokens inside queries and keys, so logits and heads taken as one are not the "
                "model's own. Take a method that reads attention (cls_attention, received_attention) or features, or "
                "switch the size weighting off (proportional=False)."
            )
        values, source = self.score(kind, seen, encoder.tower.cls, block)
        if kind == "keys" and sizes_inside:
            half = encoder.channels // 2  # at the end of either half of a head, as rotary embedding pairs them
            values = values.unflatten(-1, (2, -1))[..., :-half].flatten(-2)
        packed = seen.segments is not None
        flat = values.flatten(2) if values.dim() > 2 else values[..., None]
        wide_rows = encoder.widen(block, flat[0] if packed else flat)
        full = wide_rows[None] if packed else wide_rows
        return full.reshape(*full.shape[:2], *values.shape[2:]), source

    def frame_sizes(self, block: int) -> Tensor | None:
        """(K,) queries of the frame of each row of a packed block, where windows are parts of it; else None."""
        frame = self.family.frame_sizes(self.call)
        places = None if self.encoder is None or frame is None else self.encoder.places(block)
        if frame is None or places is None:
            return frame
        # Frames are runs of their size: number[i] is the frame of token i at the entrance.
        number = ((1 / frame.double()).cumsum(0) - 0.5 / frame.double()).floor().long()
        frame_of_row = number.to(places.device)[places]
        return torch.bincount(frame_of_row)[frame_of_row].to(frame)

    def score(self, kind: str, seen: Projections, cls: bool, block: int) -> tuple[Tensor, str]:
        """(B, N, ...) values of a block's tokens, special ones included."""
        frame = self.frame_sizes(block) if seen.segments is not None else None
        values, what = block_values(kind, seen, cls, None if frame is None else frame.to(seen.q.device))
        source = f"{what} of block {block}"
        instead = kind in CLS_KINDS and not cls
        return values, f"{source}, the tower has no [CLS]" if instead else source

    def prefix(self, tokens: int) -> int:
        """Special tokens before the patches of each unit."""
        patches = self.family.patches(self.call)
        if patches is None:
            return 0
        if tokens < patches:
            raise UnknownGeometryError(f"{tokens} tokens for {patches} patches")
        return tokens - patches

    def rows(self, values: Tensor) -> Tensor:
        """Values of patches (B, N, ...), special tokens cut, as values of the rows."""
        return arrange(self.call, values.flatten(0, 1))

    def features(self) -> tuple[Tensor, str]:
        """The hidden state that goes into the projector."""
        layers = self.family.feature_layers(self.call)
        if layers is None:
            hidden, source = self.call.output.last_hidden_state, "the tower's last output"
        else:
            hidden = torch.cat([self.hidden(layer) for layer in layers], -1)
            source = "hidden state " + ", ".join(map(str, layers))
        if hidden.dim() == 4:  # a convolutional tower's map
            hidden = hidden.flatten(2).transpose(1, 2)
        hidden = wide(hidden.detach())
        hidden = hidden if hidden.dim() == 3 else hidden[None]
        patches = self.family.patches(self.call)
        if patches is not None and hidden.shape[1] >= patches:
            return self.rows(hidden[:, hidden.shape[1] - patches :]), source
        if hidden.shape[0] * hidden.shape[1] == self.call.total:  # the tower merged its patches by itself
            return hidden.flatten(0, 1), source
        return self.rows(hidden), source

    def hidden(self, layer: int) -> Tensor:
        """Hidden state `layer` of the tower, as the call kept it or the probe saw it."""
        kept = getattr(self.call.output, "hidden_states", None)
        if kept is not None and -len(kept) <= layer < len(kept) and isinstance(kept[layer], Tensor):
            return kept[layer]
        block = _block_of_layer(layer, len(tower_blocks(self.probe.tower)))
        seen = self.probe.output(block)  # (B, K, C)
        if self.encoder is None:
            return seen
        packed = self.encoder.tower.packed
        return self.encoder.output(block, seen[0])[None] if packed else self.encoder.output(block, seen)

    def clip(self) -> tuple[Tensor, str]:
        """Patch embeddings of a scorer, lined up with the rows."""
        if not isinstance(self.scorer, PatchScorer):
            raise MissingSignalError(
                "'clip_image' holds patch embeddings of a CLIP model, which this call has not: pass a scorer with "
                "embed_image, apply(..., scorer=...), or take a method that needs none."
            )
        units = self.family.units(self.call)
        embedded = self.scorer.embed_image(units)  # (U, N, E)
        name, patches = type(self.scorer).__name__, self.family.patches(self.call)
        if embedded.dim() != 3 or embedded.shape[0] != units.shape[0]:
            raise MissingSignalError(
                f"{name}.embed_image gave {tuple(embedded.shape)} for {units.shape[0]} pictures; expected (pictures, "
                "patches, E)."
            )
        source = f"patch embeddings of {name}"
        if patches is not None and embedded.shape[1] != patches:
            embedded = _resize(embedded, patches)
            source += ", resized to the tower's grid"
        return self.rows(wide(embedded)), source


def _resize(values: Tensor, patches: int) -> Tensor:
    """Square grids of values (U, N, E), bilinearly as grids of `patches`."""
    old, new = math.isqrt(values.shape[1]), math.isqrt(patches)
    if old * old != values.shape[1] or new * new != patches:
        raise UnknownGeometryError(f"{values.shape[1]} patch embeddings for {patches} patches")
    x = wide(values).transpose(1, 2).unflatten(2, (old, old))
    return F.interpolate(x, (new, new), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
