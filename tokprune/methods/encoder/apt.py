"""APT: large patches where the picture is plain, small ones where it is busy, chosen before the first block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Place, Reduction
from tokprune.methods.options import option
from tokprune.ops.topk import rows_at
from tokprune.registry import Checked, register_method

GREY = (0.2989, 0.5870, 0.1140)
BINS = 512
STEPS = 22  # halvings of the search for a common threshold shift, to 0.00001 bit
TIE = 2e-5  # bits by which each further patch counts as busier, so that equal ones go one by one


def patch_entropy(picture: Tensor, side: int, level: int) -> Tensor:
    """Entropy of the grey levels in each patch of `side` * 2 ** `level` pixels, in bits.

    picture: (B, 3, H, W) levels from 0 to 255. The histogram has 512 bins from 0 to 255, as that of the published data
    loader, so that most whole levels have a bin of their own. Patches that the border cuts are left out. Returns (B, h,
    w).
    """
    # Normalised pixels come back a hair off their level; on its side of a bin's edge they must lie as the level does.
    level_of = picture.round()
    exact = torch.where((picture - level_of).abs() < 0.02, level_of / 255 * 255, picture)
    red, green, blue = (part * weight for part, weight in zip(exact.unbind(1), GREY, strict=True))
    grey = red + green + blue  # (B, H, W)
    edge = side * 2**level
    height, width = grey.shape[1] // edge, grey.shape[2] // edge
    bins = (grey * BINS / 255).long().clamp(0, BINS - 1)
    bins = bins[:, : height * edge, : width * edge].reshape(-1, height, edge, width, edge)
    bins = bins.transpose(2, 3).reshape(bins.shape[0], height * width, edge * edge)
    count = torch.zeros(*bins.shape[:2], BINS, dtype=grey.dtype, device=grey.device)
    share = count.scatter_add_(2, bins, torch.ones_like(bins, dtype=count.dtype)) / edge**2
    return -(share * (share + 1e-10).log2()).sum(-1).view(-1, height, width)


def patch_levels(entropies: Sequence[Tensor], thresholds: Tensor, grid: tuple[int, int]) -> Tensor:
    """Level of the patch that covers each cell of the base grid: 0 base size, 1 twice as large, and so on.

    entropies: of levels 1, 2, ..., (B, h, w) each. thresholds: (B, levels). The largest patch below its threshold wins,
    and covers all smaller ones in it. Returns (B, height, width).
    """
    batch = len(thresholds)
    out = torch.zeros(batch, *grid, dtype=torch.long, device=thresholds.device)
    for level, entropy in enumerate(entropies, 1):  # larger ones overwrite smaller ones
        step = 2**level
        plain = entropy < thresholds[:, level - 1, None, None]
        cells = plain.repeat_interleave(step, 1).repeat_interleave(step, 2)
        height, width = cells.shape[1:]
        out[:, :height, :width] = torch.where(cells, level, out[:, :height, :width])
    return out


def patch_count(levels: Tensor) -> Tensor:
    """Patches of each picture. levels: (B, height, width) -> (B,)."""
    return (0.25 ** levels.double()).sum((1, 2)).round().long()


def shifted_levels(entropies: Sequence[Tensor], thresholds: Tensor, grid: tuple[int, int], target: int) -> Tensor:
    """Levels under thresholds that are moved, per picture and by the same amount at all levels, until at most
    `target` patches are left.
    """
    batch = len(entropies[0])
    entropies = [e + TIE * torch.arange(e[0].numel(), dtype=e.dtype, device=e.device).view_as(e[0]) for e in entropies]
    low = thresholds.new_full((batch, 1), -20.0)  # no patch is below: all stay small
    high = thresholds.new_full((batch, 1), 20.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = patch_count(patch_levels(entropies, thresholds + middle, grid))[:, None] <= target
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return patch_levels(entropies, thresholds + high, grid)


def leaders(levels: Tensor) -> Tensor:
    """(B, n) number of the cell that stands for each cell's patch: the one left above its middle."""
    height, width = levels.shape[1:]
    step = 2 ** levels.flatten(1)
    cell = torch.arange(height * width, device=levels.device)
    row, col = cell // width, cell % width
    middle = (step - 1) // 2
    return (row // step * step + middle) * width + col // step * step + middle


@register_method(
    "apt",
    paper="Accelerating Vision Transformers with Adaptive Patch Sizes",
    year=2026,
    url="https://arxiv.org/abs/2510.18091",
    complexity="O(pixels)",
    memory="O(pixels)",
    merges=True,
    adaptive=True,
    checked=Checked(
        "delude729/apt",
        agrees="entropies and patch sizes (the data loader's histogram, bit for bit), what enters the first block "
        "before training",
        differs="the trained branch, which starts at zero, is not ours; the newest commit adds a divergence between "
        "neighbours to the "
        "entropy, which the paper does not have",
    ),
)
@dataclass(frozen=True)
class APT(EncoderMethod):
    """APT (ICLR 2026), its patch sizes without its training: where grey levels have little entropy, one patch stands
    for 2 x 2 or 4 x 4.

    thresholds: bits below which a patch is plain, for patches of twice the size, four times, ...; (5.5,) as published
    for two sizes, (6.0, 4.0) for three. `ratio` or `budget` moves them, per picture, until at most so many patches are
    left. embed: a large patch enters as "resize": the picture of that patch made small and embedded like any other,
    with the position embeddings resampled (the paper's model before its training, whose second branch starts at zero);
    or as "mean" of the embeddings it replaces. proportional: attention counts a large patch as often as it has small
    ones; the paper does not, its model learns that. The paper tunes the model for an epoch or more; without it expect a
    loss, which docs/encoder.md states. mean, std: how the pixels were normalised, unless the model or the processor
    says it. For towers with absolute positions and one token per patch at the connector; a batch is padded to its
    busiest picture.
    """

    thresholds: tuple[float, ...] = option((5.5,), filled=True)
    embed: Literal["resize", "mean"] = "resize"
    proportional: bool = True
    mean: tuple[float, ...] | None = option(None, filled=True, example=(0.5, 0.5, 0.5))
    std: tuple[float, ...] | None = option(None, above=0, filled=True, example=(0.5, 0.5, 0.5))
    place: ClassVar[Place] = "entrance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mean is None) != (self.std is None):
            raise OptionError("mean and std go together: mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5).")

    def reduce(self, block: BlockView) -> Reduction | None:
        entrance, n, prefix = block.entrance, block.patches, block.prefix
        if entrance is None or entrance.grid[0] * entrance.grid[1] != n:
            raise OptionError("apt needs the picture: call the model with pixels, not with embedded patches.")
        picture, grid = entrance.picture, entrance.grid
        side = picture.shape[2] // grid[0]
        entropies = [patch_entropy(picture, side, level) for level in range(1, len(self.thresholds) + 1)]
        wanted = torch.tensor(self.thresholds, dtype=picture.dtype, device=picture.device).expand(len(picture), -1)
        if block.target is None:
            levels = patch_levels(entropies, wanted, grid)
        else:
            fewest = int(patch_count(patch_levels(entropies, wanted + 100, grid))[0])
            if block.target < fewest:
                raise OptionError(
                    f"{block.target} of {n} patches cannot be reached: with {len(self.thresholds)} larger sizes at "
                    f"least {fewest} are left; give more thresholds, such as thresholds=(6.0, 4.0)."
                )
            levels = shifted_levels(entropies, wanted, grid, block.target)
        leader = leaders(levels)  # (B, n)
        alone = leader == torch.arange(n, device=leader.device)
        order = torch.sort(alone.to(torch.int8), dim=-1, descending=True, stable=True).indices
        fewest, width = torch.stack(alone.sum(1).aminmax()).tolist()
        if fewest == n:
            return None
        rows, real = order[:, :width], alone.gather(1, order[:, :width])
        assign = (alone.cumsum(1) - 1).gather(1, leader)
        level = levels.flatten(1)
        body = self.tokens(block, levels, assign, width, rows)
        size = torch.where(real, 4.0 ** level.gather(1, rows).to(picture.dtype), 0.0)
        head = torch.arange(prefix, device=rows.device).expand(len(rows), -1)
        return Reduction(
            torch.cat([block.x[:, :prefix], body * real[..., None].to(body.dtype)], 1),
            torch.cat([head, torch.where(real, rows + prefix, -1)], 1),
            torch.cat([head, assign + prefix], 1),
            torch.cat([torch.ones_like(head, dtype=size.dtype), size], 1)[..., None],
        )

    def tokens(self, block: BlockView, levels: Tensor, assign: Tensor, width: int, rows: Tensor) -> Tensor:
        """(B, width, C) what stands for each patch."""
        x = block.x[:, block.prefix :]
        index = assign[..., None].expand(-1, -1, x.shape[2])
        if self.embed == "mean" or block.entrance is None:
            total = x.new_zeros(len(x), width, x.shape[2], dtype=torch.float32).scatter_add_(1, index, x.float())
            count = total.new_zeros(len(x), width).scatter_add_(1, assign, torch.ones_like(assign, dtype=total.dtype))
            return (total / count.clamp_min(1)[..., None]).to(x.dtype)
        height, across = levels.shape[1:]
        x = x.view(len(x), height, across, -1)
        for level in range(1, len(self.thresholds) + 1):
            step = 2**level
            h, w = height // step, across // step
            if h == 0 or w == 0:
                continue
            coarse = block.entrance.coarse(level).view(len(x), h, w, -1).to(x.dtype)
            coarse = coarse.repeat_interleave(step, 1).repeat_interleave(step, 2)
            coarse = torch.nn.functional.pad(coarse, (0, 0, 0, across - w * step, 0, height - h * step))
            x = torch.where((levels == level)[..., None], coarse, x)
        x = x.flatten(1, 2)
        return rows_at(x, rows)
