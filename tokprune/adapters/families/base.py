"""What the runtime asks of a family of models: where visual tokens lie in the prompt, the picture and the vision
tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor, nn

from tokprune.adapters.families.tiny import TinyParts
from tokprune.errors import OptionError
from tokprune.tokens import Layout

F = TypeVar("F", bound="Family")


SHRUNK = "tokprune_shrunk"
"""Name under which a call carries what `Family.looks_at` gave."""


class UnknownGeometryError(Exception):
    """A family cannot tell where the tokens of this call lie; the caller falls back to one line and notes the
    reason."""


@dataclass(frozen=True)
class StreamLayout:
    """Where the rows of one stream lie: an image with all its tiles, or a video.

    rows: (N,) offset of each candidate token within the stream's consecutive run of flattened encoder rows; candidates
    are ordered so that `layout.group` ascends, so rows need not ascend. total: rows of the run, separators included.
    layout: of the N candidates. separators: (S,) offsets of the rows that are never candidates (newline embeddings);
    one is kept iff a candidate of its line is kept: separator_line (S,), line (N,). note: what is not known for sure.
    """

    rows: Tensor
    total: int
    layout: Layout
    separators: Tensor
    separator_line: Tensor
    line: Tensor
    note: str = ""


@dataclass(frozen=True)
class PlaceholderRun:
    """A contiguous run of placeholder tokens of one modality in the prompt.

    length: tokens. sample: row of the batch. before: ids of the other tokens since the run before it in the same sample
    (or since the prompt's start), the last `GAP` of them at most; tags and line breaks there tell tiles from images.
    """

    length: int
    sample: int = 0
    before: tuple[int, ...] = ()


GAP = 32


def placeholder_runs(input_ids: Tensor, mask: Tensor) -> list[PlaceholderRun]:
    """The runs of placeholders of one modality, in (batch, position) order.

    input_ids: (B, L). mask: (B, L) bool, true at the placeholders of that modality. One transfer to the host.
    """
    runs = []
    for sample, (ids, flags) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
        edges = [i for i in range(1, len(flags)) if flags[i] != flags[i - 1]]
        end = 0
        for start, stop in zip([0, *edges], [*edges, len(flags)], strict=True):
            if stop > start and flags[start]:
                runs.append(PlaceholderRun(stop - start, sample, tuple(ids[max(end, start - GAP) : start])))
                end = stop
    return runs


@dataclass(frozen=True)
class EncoderCall:
    """One call of get_image_features or get_video_features, and what is known about the prompt it belongs to."""

    base: nn.Module
    modality: str
    kwargs: Mapping[str, Any]
    output: Any
    runs: tuple[PlaceholderRun, ...] | None = None
    decode: Callable[[list[int]], str] | None = None

    @property
    def config(self) -> Any:
        """The multimodal model's configuration."""
        return self.base.config

    @property
    def vision_config(self) -> Any:
        """The vision tower's configuration (the whole one where a model has no part of its own for it)."""
        return getattr(self.config, "vision_config", self.config)

    def option(self, name: str) -> Any:
        """A value of the call, or the configuration's where the call leaves it open."""
        value = self.kwargs.get(name)
        return getattr(self.config, name, None) if value is None else value

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each item of the encoder output (an image, a tile, a video: as the model counts)."""
        pooled = self.output.pooler_output
        if isinstance(pooled, Tensor):
            items = 1 if pooled.dim() < 3 else pooled.shape[0]
            return [pooled.numel() // pooled.shape[-1] // max(items, 1)] * items
        return [item.numel() // item.shape[-1] for item in pooled]

    @property
    def total(self) -> int:
        """Rows of the flattened encoder output."""
        return sum(self.lengths)

    @property
    def pixels(self) -> Tensor | None:
        """The pixel values given to the encoder."""
        names = ("pixel_values_videos", "pixel_values") if self.modality == "video" else ("pixel_values",)
        return next((self.kwargs[name] for name in names if isinstance(self.kwargs.get(name), Tensor)), None)

    def rows_of(self, name: str) -> list[list[int]]:
        """A size or grid argument of the call as lists of ints, one per image or video."""
        value = self.kwargs.get(name)
        if value is None:
            raise UnknownGeometryError(f"the call has no {name}")
        return [[int(x) for x in row] for row in (value.tolist() if isinstance(value, Tensor) else value)]


class Family:
    """What is particular to the models of one family: placeholders, geometry, vision tower, prompts, and a tiny model
    for tests.

    One file a family: a class under `@register_family`. Subclasses override `streams` and `arrange`, and the rest where
    their models differ.
    """

    # -- prompt and placeholders ---------------------------------------------------------------------------------------

    first_position: int = 0
    """The position id of the first token of a prompt."""
    shares_placeholder: bool = False
    """Whether clips are written with the placeholder of pictures, so that a call holds one or the other."""
    adds_to_placeholder: bool = False
    """Whether visual features are added onto the embedding of their placeholder instead of replacing it."""
    both_ways: bool = False
    """Whether the tokens of pictures, as mm_token_type_ids mark them, attend to later ones of their kind, too."""
    clips_in_one_tensor: bool = False
    """Whether all clips of a call lie in one tensor, so that they must have the same number of frames."""
    mixes_modalities: bool = True
    """Whether pictures and clips may stand in one call."""
    times_frames: bool = False
    """Whether frames that are given as pictures stand behind words that say their time."""
    frames_by_words: bool = False
    """Whether only the words of the prompt tell video frames from pictures."""
    tower_of_timm: bool = False
    """Whether the vision tower is a model of timm, which must be installed."""
    reads_runs: bool = False
    """Whether `streams` needs the prompt's placeholder runs to tell which tiles belong together."""

    def placeholders(self, config: Any, call: Mapping[str, Any], columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """(B, L) bool per modality: the columns that its features fill, from those that hold its placeholder id."""
        return columns

    cuts_pictures: bool = False
    """Whether the tower may see a picture in several pieces."""

    def candidates(self, call: EncoderCall) -> Tensor | None:
        """(P,) bool: the tower's patches that become tokens of the LLM, known before the tower runs; None: all."""
        return None

    # -- encoder call --------------------------------------------------------------------------------------------------

    def encoder(self, base: Any, modality: str) -> tuple[str, str] | None:
        """(method of the base model, its argument for the pixels where that has another name) that encodes a modality,
        or None."""
        return (f"get_{modality}_features", "") if hasattr(base, f"get_{modality}_features") else None

    features_field: str = "pooler_output"
    """Where in an encoder output the rows are that fill placeholders."""

    def expose(self, output: Any) -> None:
        """Let `pooler_output` of an encoder output hold the rows that fill placeholders, whatever the model calls
        them."""
        if self.features_field != "pooler_output":
            output.pooler_output = getattr(output, self.features_field)

    def restore(self, output: Any) -> None:
        """Put the rows back under the model's own name."""
        if self.features_field != "pooler_output":
            output[self.features_field] = output.pooler_output

    def prepare_encoded(self, call: dict[str, Any], encoded: dict[str, Any]) -> dict[str, Tensor]:
        """Make features line up with placeholders before planning; (R,) bool masks of the rows that stay, where some do
        not."""
        return {}

    def feature_layers(self, call: EncoderCall) -> list[int] | None:
        """Indices of the hidden states that the model selects, as written in its config; None: the tower's last
        output."""
        layers = call.option("vision_feature_layer")
        if layers is None:
            return None
        return [layers] if isinstance(layers, int) else list(layers)

    # -- geometry ------------------------------------------------------------------------------------------------------

    def streams(self, call: EncoderCall) -> list[StreamLayout]:
        """One layout per image or video, in the order of the flattened rows."""
        raise UnknownGeometryError("unlisted family")

    def arrange(self, call: EncoderCall, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values of the tower's patches (P, C), special tokens cut, as values of the rows (R, C); separators get
        `fill`.

        Where a row is made of several patches it gets their mean, or the interpolation that the model itself uses.
        """
        if values.shape[0] != call.total:
            raise UnknownGeometryError(f"{values.shape[0]} patches do not make {call.total} rows")
        return values

    def patches(self, call: EncoderCall) -> int | None:
        """Patches per unit of a tower that works on a batch of equal units; None for packed towers without special
        tokens."""
        return None

    def frame_sizes(self, call: EncoderCall) -> Tensor | None:
        """(P,) patches of the frame that each patch belongs to, where attention may be confined to windows; else
        None."""
        return None

    def looks_at(self, call: EncoderCall) -> Tensor | None:
        """(U, 3, s, s) the pictures that the tower saw, shrunk, where `streams` tells tiles apart by what they show;
        the runtime hands them back on the host as the argument `SHRUNK` of the call."""
        return None

    def units(self, call: EncoderCall) -> Tensor:
        """The pictures that the tower saw, (U, 3, H, W), in its order."""
        raise UnknownGeometryError("its tower does not take a batch of pictures")

    def joined_side(self, base: Any, config: Any) -> int:
        """Side of the square of patches that the connector joins to one token, for towers that see a batch of equal
        pictures."""
        return 1

    # -- tests ---------------------------------------------------------------------------------------------------------

    tiny_types: tuple[str, ...] = ()
    """Model types of which `tiny` builds a model, the first of the family unless it says so; the test matrix proves
    each of them equal to a brute-force reference."""

    def tiny(self, model_type: str) -> TinyParts:
        """A small random-weight model of `model_type` with its real processor, built offline."""
        raise UnknownGeometryError(f"no tiny model of {model_type} is known")


_FAMILIES: dict[str, Family] = {}


def register_family(*model_types: str) -> Callable[[type[F]], type[F]]:
    """Class decorator: models whose config has one of these `model_type`s belong to the family."""

    def register(cls: type[F]) -> type[F]:
        if "tiny" in vars(cls) and "tiny_types" not in vars(cls):
            cls.tiny_types = model_types[:1]
        instance = cls()
        for name in model_types:
            if name in _FAMILIES:
                raise OptionError(f"model type {name!r} belongs to {type(_FAMILIES[name]).__name__} already.")
        _FAMILIES.update(dict.fromkeys(model_types, instance))
        return cls

    return register
