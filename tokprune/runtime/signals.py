"""Signals: what the vision tower tells about each visual token, computed when a method needs it, in the rows' order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.adapters.families import FAMILIES, EncoderCall, UnknownGeometryError, arrange, family_of
from tokprune.adapters.towers import FEATURES_ALONE, tower_blocks
from tokprune.errors import MissingSignalError
from tokprune.ops.numeric import full_precision, wide
from tokprune.runtime.probe import AttentionProbe, Projections
from tokprune.runtime.signal_blocks import CLS_KINDS, block_of_layer, model_type, parse_needs, signal_block

if TYPE_CHECKING:
    from tokprune.runtime.encoder.stage import EncoderStage


ROWS: dict[str, tuple[dict[str, bool], str]] = {
    "cls_attention": ({}, "attention"),
    "received_attention": ({}, "attention"),
    "cls_logits": ({"logits": True}, "logits"),
    "cls_attention_1head": ({"one_head": True}, "attention, heads taken as one,"),
    "value_attention": ({"values": True}, "value similarities"),
}
"""Signals that are rows of a block's attention: how `Projections` is asked for them, and what they are in words."""


def block_values(kind: str, seen: Projections, cls: bool, frame: Tensor | None = None) -> tuple[Tensor, str]:
    """Signal `kind` of all tokens of one block, special ones included, and what it is in words. -> (B, N, ...).

    cls: the first token is [CLS]. frame: (N,) queries of the frame of each row, as of `Projections.received`.
    """
    if kind == "keys":
        return wide(seen.k).transpose(1, 2), "keys"
    if kind == "value_norm":
        return mean_value_norm(seen.v), "L1 norm of the head-mean values"
    how, what = ROWS[kind]
    if kind in CLS_KINDS and cls:
        return seen.cls_row(**how), f"[CLS] row of {what}"
    return seen.received(**how, frame=frame), f"received {what}"


def mean_value_norm(values: Tensor) -> Tensor:
    """L1 norm of each token's value vector after its heads were averaged. (..., H, S, d) -> (..., S) in float32.

    Averaged first, so heads that disagree cancel; the sum of the heads' norms ranks tokens differently.
    """
    return wide(values).mean(-3).abs().sum(-1)


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


@contextlib.contextmanager
def _explained(call: EncoderCall, name: str) -> Iterator[None]:
    """Say in words why signal `name` cannot be given."""
    try:
        yield
    except UnknownGeometryError as error:
        why = f"its patches cannot be matched with its tokens ({error})"
        raise MissingSignalError(f"{model_type(call.base)} cannot give {name!r}: {why}. {FEATURES_ALONE}") from None
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        if call.config.model_type in FAMILIES:  # ours to mend
            raise
        why = f"its vision tower computes in a way that is not known here ({type(error).__name__}: {error})"
        raise MissingSignalError(f"{model_type(call.base)} cannot give {name!r}: {why}. {FEATURES_ALONE}") from error


class BegunSignals:
    """Signals of one encoder call that are finished when the host knows the sizes of its pictures: `bounds` come along.

    Until then it holds scores of patches where these are made, else queries, keys and values of the blocks in question,
    as the tower made them. Signals of a block whose rows the encoder stage reduced are what that block computed, each
    group's value at the places of its members, 0 for dropped tokens.
    """

    @torch.no_grad()
    def __init__(
        self,
        call: EncoderCall,
        probe: AttentionProbe,
        needs: Sequence[str],
        scorer: object = None,
        encoder: EncoderStage | None = None,
    ) -> None:
        """probe: has listened to the call. scorer: a PatchScorer, for `clip_image`. encoder: of a tower that is reduced
        inside."""
        self._reader = _Reader(call, probe, scorer, encoder)
        self._rest: dict[str, Rest] = {}
        for name, kind, spec in parse_needs(needs):
            with _explained(call, name):
                self._rest[name] = self._reader.begin(kind, spec)
        self.bounds: list[Tensor] = list(self._reader.bounds.values())

    @torch.no_grad()
    def finish(self, bounds: Sequence[Tensor]) -> SignalSet:
        """All of them. bounds: `self.bounds` on the host; sizes among the call's arguments should be there, too."""
        self._reader.known = dict(zip(self._reader.bounds, bounds, strict=True))
        result = SignalSet()
        for name, rest in self._rest.items():
            with _explained(self._reader.call, name):
                result.values[name], result.sources[name] = rest()
        return result


Rest = Callable[[], tuple[Tensor, str]]
"""Makes the values of all rows, and says how they were obtained."""


class _Reader:
    """Reads the signals of one call; projections of a block are put in order once."""

    def __init__(self, call: EncoderCall, probe: AttentionProbe, scorer: object, encoder: EncoderStage | None) -> None:
        self.call, self.probe, self.scorer, self.encoder = call, probe, scorer, encoder
        self.family = family_of(call.base, call.kwargs)
        self.bounds: dict[int, Tensor] = {}
        """Where segments of attention end, by the tensor's id: blocks share them."""
        self.known: dict[int, Tensor] = {}
        """The same on the host."""

    def begin(self, kind: str, spec: str | None) -> Rest:
        """What is left to do for a signal; holds on to what that needs of the tower."""
        if kind == "clip_image":
            return self.clip
        if kind == "encoder_features":
            return partial(self.features, *self.hidden_states())
        count = len(tower_blocks(self.probe.tower))
        block = signal_block(self.call.base, spec, count, self.call.kwargs)
        seen = self.probe.projections(block, cut=False)
        if seen.bounds is not None:
            self.bounds[id(seen.bounds)] = seen.bounds
            return partial(self.cut, kind, seen, block)
        values, source = self.values(kind, seen, block)
        return lambda: (self.rows(values), source)

    def cut(self, kind: str, seen: Projections, block: int) -> tuple[Tensor, str]:
        """A signal of a block whose attention was confined to segments."""
        values, source = self.values(kind, seen.cut(self.known[id(seen.bounds)]), block)
        return self.rows(values), source

    def values(self, kind: str, seen: Projections, block: int) -> tuple[Tensor, str]:
        """(B, N, ...) values of a block's patches, special tokens cut, and how they were obtained."""
        if self.encoder is not None:
            values, source = self.reduced(kind, seen, block, self.encoder)
            return values[:, self.prefix(values.shape[1]) :], source
        prefix = self.prefix(seen.q.shape[2])
        values, source = self.score(kind, seen, prefix > 0, block)
        return values[:, prefix:], source

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
        with full_precision(seen.q.device):
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

    def hidden_states(self) -> tuple[Tensor, str]:
        """What goes into the projector, and which hidden states these are."""
        layers = self.family.feature_layers(self.call)
        if layers is None:
            return self.call.output.last_hidden_state, "the tower's last output"
        states = [self.hidden(layer) for layer in layers]
        hidden = states[0] if len(states) == 1 else torch.cat(states, -1)
        return hidden, "hidden state " + ", ".join(map(str, layers))

    def features(self, hidden: Tensor, source: str) -> tuple[Tensor, str]:
        """The hidden state that goes into the projector, by rows."""
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
        block = block_of_layer(layer, len(tower_blocks(self.probe.tower)))
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
