"""The pixels stage on one tower: a pixels method decides in front of the first block, from the pixels of a call."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokprune.adapters.tower_parts import Moments, Tower
from tokprune.adapters.types import ModelCall, Original, Positional
from tokprune.budget import ceil_of, keep_count
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.base import ConnectorMethod
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.methods.pixels_base import Choice, PixelMethod, PixelUnits
from tokprune.ops.topk import top
from tokprune.registry import MethodInfo
from tokprune.tokens import Selection, VisualTokens

WORTH = "pixel_worth"
"""The signal by which a pixels method ranks units; from that stage, not from a probe."""
UNSEEN = 1e3
"""Above any pixel: the padding of a tile, which is like itself alone."""
Grid = tuple[int, int, int]
"""Temporal patches, height and width of a picture or clip in units."""


@dataclass(frozen=True)
class NoReduction(EncoderMethod):
    """Stands where a pixels method works alone: nothing more is dropped between the blocks. Not registered."""

    info: ClassVar[MethodInfo] = MethodInfo("none", "nothing is reduced between the blocks")

    def active(self, index: int, depth: int) -> bool:
        return False


@dataclass(frozen=True)
class WorstPredicted(ConnectorMethod):
    """Of the units that were encoded those that a pixels method ranks first: tiles of a picture share one budget.

    Not registered: the pixels stage chooses with it, where the ratio or budget is its own. over_time: pictures stay
    whole.
    """

    info: ClassVar[MethodInfo] = MethodInfo("worst_predicted", "units that the pixels stage ranks first", adaptive=True)
    needs: ClassVar[tuple[str, ...]] = (WORTH,)
    over_time: bool = False

    def budgets(self, batch: Sequence[VisualTokens], keeps: Sequence[int]) -> list[int]:
        whole = [self.over_time and tokens.layout.kind != "video" for tokens in batch]
        return [len(t) if all_ else keep for t, keep, all_ in zip(batch, keeps, whole, strict=True)]

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return Selection(top(tokens.signal(WORTH), keep))


@dataclass(frozen=True)
class PixelDrop:
    """A pixels method with how much it is to keep, and by what the pixels were divided."""

    method: PixelMethod
    ratio: float | None = None
    budget: int | None = None
    std: tuple[float, ...] | None = None

    @property
    def exact(self) -> bool:
        """Whether a ratio or budget is its own; else the threshold decides."""
        return self.ratio is not None or self.budget is not None

    def check(self, tower: Tower, method: EncoderMethod) -> None:
        """Refuse what cannot be right. method: what reduces the tower between its blocks, behind this."""
        name, other = self.method.info.name, method.info.name
        if self.std is None and self.method.threshold > 0 and not self.exact:
            raise OptionError(
                f"{name!r} with a threshold above 0 measures differences of pixels, and this model does not say how "
                "they were normalised: give apply its processor, or write std=(...) (image_std of the image processor)."
            )
        if method.restores or method.place == "entrance" or method.single_patches:
            raise UnsupportedModelError(
                f"{other!r} needs the whole picture in front of the first block, and {name!r} "
                "drops a part of it; take one of them."
            )
        if tower.packed:
            return
        if not isinstance(method, NoReduction):
            raise UnsupportedModelError(
                f"{name!r} leaves another number of units in each picture, and {other!r} inside {tower.family} needs "
                "equal ones; both together run in packed towers (Qwen-VL, GLM-4V). Take one of them here."
            )
        if self.method.over_time:
            raise UnsupportedModelError(
                f"{name!r} compares the frames of a clip, and {tower.family} is shown single pictures; take a method "
                "that works inside a picture: pixelprune, blank."
            )
        patch = tower.patch
        if patch is None or patch.kernel_size != patch.stride or (tower.rope and tower.fold > 1):
            raise UnsupportedModelError(
                f"{name!r} needs patches that do not overlap and one convolution that embeds them, which "
                f"{tower.family} here does not have."
            )

    def keeps(self, units: Sequence[int], parts: bool) -> list[int] | None:
        """How many units each of several pictures keeps, of so many; None: the threshold decides.

        parts: a stream of the LLM may be made of several of these; what is too much then goes behind the tower.
        """
        if not self.exact:
            return None
        if parts and self.ratio is not None:
            return [max(1, ceil_of(n, self.ratio)) for n in units]
        return [max(1, keep_count(n, self.ratio, self.budget)) for n in units]

    @torch.compiler.disable
    @torch.no_grad()
    def decide(
        self, units: Sequence[Tensor], grids: Sequence[Grid], parts: bool = False, candidates: Tensor | None = None
    ) -> Choice:
        """Which units of all pictures of a call stay, those of equal size chosen together.

        units: (N, T, C, P) of each picture as they were normalised. candidates: (all N,) bool. Returns (all N,) each.
        """
        alike: dict[Grid, list[int]] = {}
        for number, grid in enumerate(grids):
            alike.setdefault(grid, []).append(number)
        sizes = [len(values) for values in units]
        *begin, total = itertools.accumulate(sizes, initial=0)
        device = units[0].device
        kept = torch.ones(total, dtype=torch.bool, device=device)
        source = torch.arange(total, device=device)
        worth = torch.full((total,), 1e6, dtype=torch.float32, device=device)
        for grid, members in alike.items():
            if self.method.over_time and grid[0] == 1:
                continue
            at = torch.tensor([begin[i] for i in members], device=device)[:, None]
            at = at + torch.arange(sizes[members[0]], device=device)  # (B, N)
            seen = None if candidates is None else candidates[at]
            n = at.shape[1]
            counts = [n] * len(at) if seen is None else seen.sum(1).tolist()
            keeps = self.keeps(counts, parts)
            if keeps is not None:  # where all that the LLM sees stays, the tower sees all
                keeps = [n if keep >= count else keep for keep, count in zip(keeps, counts, strict=True)]
            values = self.scaled(torch.stack([units[i] for i in members]))
            if seen is not None:  # what the LLM is not shown stands for nothing
                values = values.masked_fill(~seen[:, :, None, None, None], UNSEEN)
            one = self.method.choose(PixelUnits(values, grid), keeps, seen)
            kept[at], worth[at] = one.kept, one.worth.clamp(max=1e6)
            source[at] = torch.where(one.source >= 0, one.source + at[:, :1], -1)
        return Choice(kept, source, worth)

    def scaled(self, values: Tensor) -> Tensor:
        """(B, N, T, C, P) in float32, with 1 from black to white where it is known how they were normalised."""
        values = values.float()
        if self.std is None:
            return values
        if len(self.std) not in (1, values.shape[3]):
            raise OptionError(f"std={self.std} has {len(self.std)} numbers, and the pixels {values.shape[3]} channels.")
        return values * torch.tensor(self.std, dtype=values.dtype, device=values.device)[:, None]


def arguments_of(original: Original, args: Positional, kwargs: ModelCall) -> ModelCall:
    """The arguments of a call by name."""
    given = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    return given


def with_states(args: Positional, kwargs: ModelCall, x: Tensor) -> tuple[Positional, ModelCall]:
    """The arguments of a block with other hidden states."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, "x" if "x" in kwargs else "hidden_states": x}


def of_rows(pixels: Tensor, channels: int, frames: int, fold: int) -> Tensor:
    """Units of packed rows: (S, C * T * p * p), the `fold` patches of a unit in turn -> (S / fold, T, C, P)."""
    x = pixels.view(-1, fold, channels, frames, pixels.shape[1] // (channels * frames))
    return x.permute(0, 3, 2, 1, 4).flatten(3)


def of_pictures(pixels: Tensor, patch: int, fold: int) -> tuple[Tensor, tuple[int, int]]:
    """Units of pictures (B, C, H, W) in raster order -> (B, N, 1, C, P), and their height and width in units."""
    side = patch * math.isqrt(fold)
    h, w = pixels.shape[2] // side, pixels.shape[3] // side
    x = pixels[:, :, : h * side, : w * side].unflatten(3, (w, side)).unflatten(2, (h, side))  # (B, C, h, s, w, s)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)[:, :, None], (h, w)


def std_of(method: PixelMethod, normal: Moments | None) -> tuple[float, ...] | None:
    """By what each channel was divided: as the method says, or else the processor or the model."""
    return method.std if method.std is not None else None if normal is None else tuple(normal[1])
