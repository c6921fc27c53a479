"""DynamicViT: small trained predictors decide at a few depths which patches go on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tokprune.budget import geometric_counts
from tokprune.errors import OptionError
from tokprune.methods.base import top
from tokprune.methods.encoder_base import BlockView, EncoderMethod, Place, Reduction, at_depths
from tokprune.methods.options import Block, option
from tokprune.registry import Checked, register_method

UNTRAINED = (
    "dynamicvit needs predictors that were trained with the model: random ones keep random patches. Train them "
    "(Predictor, gumbel_keep, "
    "masked_softmax and keep_loss of tokprune.methods.encoder.dynamicvit; docs/encoder.md shows the loop), write "
    "them with "
    "save_predictors(predictors, 'predictors.safetensors') and give weights='predictors.safetensors'. Without "
    "training take tome, pitome or evit."
)


class Predictor(nn.Module):
    """Worth of keeping each patch, from the patch and from what is kept so far (section 3.2 of the paper).

    width: channels of a patch, an even number of at least 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        half, quarter = width // 2, width // 4
        self.leave = nn.Sequential(
            nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logarithms of the chances to keep (0) and to drop (1). x: (B, n, C), kept: (B, n) 1 for patches that are
        still there -> (B, n, 2).
        """
        local, whole = self.enter(x).chunk(2, -1)
        weight = x.new_ones(x.shape[:2]) if kept is None else kept.to(x.dtype)
        total = weight.sum(1, keepdim=True).clamp_min(1)
        whole = (weight[:, None] @ whole / total[..., None]).expand_as(local)
        out: Tensor = self.leave(torch.cat([local, whole], -1)).log_softmax(-1)
        return out


def gumbel_keep(logits: Tensor, kept: Tensor, temperature: float = 1.0) -> Tensor:
    """Decisions for training: 0 or 1 going forward, soft going back; what is gone stays gone.

    logits: (B, n, 2) of a Predictor. kept: (B, n) the decisions before. -> (B, n).
    """
    return nn.functional.gumbel_softmax(logits, tau=temperature, hard=True)[..., 0] * kept


def masked_softmax(logits: Tensor, kept: Tensor, eps: float = 1e-6) -> Tensor:
    """Attention in training, where dropped tokens keep their place but nobody sees them, they themselves excepted.

    logits: (B, H, N, N). kept: (B, N) 0 or 1, with gradient; 1 for [CLS]. -> (B, H, N, N), rows sum to 1.
    """
    n = kept.shape[1]
    eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
    seen = kept[:, None, None, :].to(logits.dtype)
    seen = seen + (1 - seen) * eye  # (B, 1, N, N)
    weight = (logits - logits.amax(-1, keepdim=True).detach()).exp() * seen
    return (weight + eps / n) / (weight.sum(-1, keepdim=True) + eps)


def keep_loss(decisions: Sequence[Tensor], keep: float) -> Tensor:
    """Squared distance of the kept shares from keep, keep², ..., mean over stages and batch (section 3.3).

    decisions: (B, n) of each stage, as gumbel_keep gives them. The paper weighs it by 2 beside the task's loss.
    """
    gaps = [(d.mean(1) - keep ** (i + 1)).square().mean() for i, d in enumerate(decisions)]
    return torch.stack(gaps).mean()


def save_predictors(predictors: Sequence[Predictor], path: str | Path) -> None:
    """Write the predictors of all stages to one safetensors file."""
    from safetensors.torch import save_file

    save_file(nn.ModuleList(predictors).state_dict(), str(path))


@lru_cache(maxsize=8)
def load_predictors(path: str) -> tuple[Predictor, ...]:
    """The predictors that `save_predictors` wrote, on the CPU, in evaluation mode."""
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        stages = 1 + max(int(name.split(".")[0]) for name in state)
        built = nn.ModuleList(Predictor(state[f"{i}.enter.0.weight"].shape[0]) for i in range(stages))
        built.load_state_dict(state)
    except Exception as error:  # a broken or foreign file fails in many ways
        raise OptionError(f"weights={path!r} holds no predictors of save_predictors: {error}") from error
    return tuple(p.eval().requires_grad_(False) for p in built)  # type: ignore[misc]


@register_method(
    "dynamicvit",
    paper="DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    year=2021,
    url="https://arxiv.org/abs/2106.02034",
    complexity="O(NC²)",
    memory="O(NC)",
    checked=Checked(
        "raoyongming/DynamicViT",
        differs="the predictors' form and the kept counts follow it; its weights were not at hand",
    ),
)
@dataclass(frozen=True)
class DynamicViT(EncoderMethod):
    """DynamicViT (NeurIPS 2021): before a few blocks, a trained predictor keeps the best patches.

    weights: file of trained predictors, one per stage (save_predictors); without it the method refuses to run, since
    untrained predictors choose at random. keep: share that each stage leaves, of what the stage before left; `ratio` or
    `budget` sets the count at the end. blocks: before which to prune, 0-based or fractions of the depth; 3, 6 and 9 of
    12 in the paper. Kept patches stay in raster order, which changes nothing but their order.
    """

    weights: str = option("", example="predictors.pt")
    keep: float = option(0.7, above=0, high=1)
    blocks: tuple[Block, ...] = option((0.25, 0.5, 0.75), filled=True)
    place: ClassVar[Place] = "end"

    def __post_init__(self) -> None:
        if isinstance(self.weights, os.PathLike):
            object.__setattr__(self, "weights", os.fspath(self.weights))
        super().__post_init__()

    def check(self, depth: int, target: bool) -> None:
        if not self.weights:
            raise OptionError(UNTRAINED)
        stages = at_depths(self.blocks, depth)
        if 0 in stages:
            raise OptionError("dynamicvit cannot prune before block 0; its first stage is before block 1 or later.")
        found = len(load_predictors(self.weights))
        if found != len(stages):
            raise OptionError(
                f"weights={self.weights!r} holds {found} predictors for {len(stages)} stages at {stages}."
            )

    def active(self, index: int, depth: int) -> bool:
        return index + 1 in at_depths(self.blocks, depth)

    def reduce(self, block: BlockView) -> Reduction | None:
        blocks, n, prefix = at_depths(self.blocks, block.depth), block.patches, block.prefix
        stage = blocks.index(block.index + 1)
        keep = max(1, int(block.start * self.keep ** (stage + 1)))
        if block.target is not None:
            keep = geometric_counts(block.start, block.target, len(blocks))[stage]
        if keep >= n:
            return None
        predictor, x = load_predictors(self.weights)[stage], block.x[:, prefix:]
        width = predictor.enter[0].normalized_shape[0]  # type: ignore[index, union-attr]
        if width != x.shape[2]:
            raise OptionError(f"the predictors are for {width} channels, this tower has {x.shape[2]} here.")
        if next(predictor.parameters()).device != x.device:  # cached on the CPU, moved where it is used
            predictor = predictor.to(x.device)
        return Reduction.kept_patches(block, top(predictor(x.float())[..., 0], keep))
