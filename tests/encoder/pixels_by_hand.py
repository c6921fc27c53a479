"""The pixels stage by hand: the model's own blocks on the patches that a loop over units keeps, picture by picture.

Nothing of the pruning code is used. Hooks on the unpruned model read the pixels that enter its tower, decide with
`tests.methods.pixels.loops`, and put what the blocks give for the kept patches alone in the place of their output;
zeros stand for the dropped ones, which nobody reads. The model's own connector does the rest.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.adapters.reference import Prompt, newlines, observe, run
from tokprune.adapters.towers import projectors_of, tower_of
from tokprune.testing import TinyVLM

Decide = Callable[[Tensor], Tensor]
"""(t, h, w, P) pixels of the units of one picture or clip -> (t, h, w) bool: kept."""


def blocks_of(tower: Any) -> list[nn.Module]:
    inner = getattr(tower, "vision_model", tower)
    encoder = getattr(inner, "encoder", None)
    layers = getattr(encoder, "layers", getattr(encoder, "layer", None))
    return list(tower.blocks if hasattr(tower, "blocks") else layers)


@dataclass
class Hand:
    """Hooks that run a tower by hand. side: patches along a unit. unit: (P,) one row of numbers per unit."""

    tiny: TinyVLM
    decide: Decide
    side: int = 1
    alone: bool = False
    """All rows of a packed call's grid are frames of one clip (GLM-4V shows its tower frame by frame)."""
    kept: list[Tensor] = field(default_factory=list)
    """(units,) of each picture of the tower's last call, in raster order."""
    shown: Tensor | None = None
    """(pictures, units) whether the LLM is shown them: the padding of a tile is not, and stands for nothing."""

    def __post_init__(self) -> None:
        self.tower = tower_of(self.tiny.model.base_model)
        self.packed = hasattr(self.tower, "blocks")
        self.projector = projectors_of(self.tiny.model.base_model, self.tower)[0]
        self.side = int(getattr(self.tower, "spatial_merge_size", self.side))

    # -- packed towers ---------------------------------------------------------------------------------------------

    def enter_packed(self, tower: Any, args: Any, kwargs: Any) -> None:
        pixels = args[0] if args else kwargs["hidden_states"]
        grid = args[1] if len(args) > 1 else kwargs["grid_thw"]
        fold, start, self.kept = self.side**2, 0, []
        rows = grid.tolist()
        if self.alone:
            rows = [[len(rows), *rows[0][1:]]]
        for t, h, w in rows:
            n = t * h * w // fold
            units = pixels[start * fold : (start + n) * fold].reshape(t, h // self.side, w // self.side, -1)
            self.kept.append(self.decide(units).flatten())
            start += n
        kept = torch.cat(self.kept)
        if hasattr(tower, "window_size"):
            from transformers.vision_utils import get_vision_window_index

            order = get_vision_window_index(
                grid, spatial_merge_size=self.side, window_size=tower.window_size, patch_size=tower.patch_size
            )[0]
            kept = kept[order]
        self.sequence = kept
        self.mask = kept.repeat_interleave(fold)

    def packed_block(self, block: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        borders, (cos, sin) = kwargs["cu_seqlens"].tolist(), kwargs["position_embeddings"]
        out = torch.zeros_like(x)
        for start, stop in itertools.pairwise(borders):
            at = torch.arange(start, stop)[self.mask[start:stop]]
            if len(at):
                more = {"max_seqlen": len(at)} if kwargs.get("max_seqlen") is not None else {}
                cu = torch.tensor([0, len(at)], dtype=kwargs["cu_seqlens"].dtype)
                given = {**kwargs, **more, "cu_seqlens": cu, "position_embeddings": (cos[at], sin[at])}
                given.pop("hidden_states", None)
                out[at] = block.forward(x[at], **given)
        return out

    # -- towers with a batch of equal pictures -----------------------------------------------------------------------

    def enter_batch(self, convolution: Any, args: Any) -> None:
        pixels, size = args[0].float(), convolution.kernel_size[0] * self.side
        h, w = pixels.shape[2] // size, pixels.shape[3] // size
        self.kept, masks = [], []
        shown = torch.ones(len(pixels), h, w, dtype=torch.bool) if self.shown is None else self.shown.view(-1, h, w)
        for picture, seen in zip(pixels, shown, strict=True):
            rows = [
                [picture[:, r * size : (r + 1) * size, c * size : (c + 1) * size] for c in range(w)] for r in range(h)
            ]
            units = torch.stack([torch.stack([u.flatten() for u in row]) for row in rows])
            units[~seen] = 1e4  # like no pixel
            kept = self.decide(units[None])[0]
            self.kept.append(kept.flatten())
            masks.append(kept.repeat_interleave(self.side, 0).repeat_interleave(self.side, 1).flatten())
        self.mask = torch.stack(masks)
        self.sequence = torch.stack(self.kept)

    def batch_block(self, block: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        out, prefix = torch.zeros_like(x), x.shape[1] - self.mask.shape[1]
        given = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "attention_mask")}
        for i, kept in enumerate(self.mask):
            at = torch.cat([torch.arange(prefix), prefix + kept.nonzero()[:, 0]])
            made = block.forward(x[i : i + 1, at], *args[1:2] and (None,), **given)
            out[i, at] = (made[0] if isinstance(made, tuple) else made)[0]
        return out

    # -- the hooks -----------------------------------------------------------------------------------------------------

    def block(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        made = self.packed_block(module, x, kwargs) if self.packed else self.batch_block(module, x, args, kwargs)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    def indicate(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output) + self.sequence.view(*output.shape[:-1], 1).to(output.dtype)

    def find_shown(self, inputs: Any) -> Tensor:
        """Number what the projector gives, and look which numbers come to the LLM."""
        shape: list[int] = []

        def number(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            shape[:] = output.shape[:-1]
            numbers = torch.arange(1, output[..., 0].numel() + 1, dtype=output.dtype)
            return torch.zeros_like(output) + numbers.view(*output.shape[:-1], 1)

        handle = self.projector.register_forward_hook(number)
        try:
            marks = observe(self.tiny, inputs, "forward")
        finally:
            handle.remove()
        told = marks.embeds[..., 0][marks.visual & ~newlines(self.tiny, marks)]
        shown = torch.zeros(shape).flatten()
        shown[told.round().long() - 1] = 1
        return shown.view(shape[0], -1) > 0

    @contextlib.contextmanager
    def on(self, indicator: bool = False) -> Iterator[None]:
        handles = [b.register_forward_hook(self.block, with_kwargs=True, prepend=True) for b in blocks_of(self.tower)]
        if self.packed:
            handles.append(self.tower.register_forward_pre_hook(self.enter_packed, with_kwargs=True))
        else:
            first = next(m for m in self.tower.modules() if isinstance(m, nn.Conv2d))
            handles.append(first.register_forward_pre_hook(self.enter_batch))
        if indicator:
            handles.append(self.projector.register_forward_hook(self.indicate))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def prompt(self, inputs: Any) -> tuple[Prompt, Tensor]:
        """What the language model is given for a prompt, and (B, L) its columns that stay; newline rows all stay."""
        unpruned = run(self.tiny, inputs)
        if not self.packed:
            self.shown = self.find_shown(inputs)
        with self.on():
            case = Prompt(
                self.tiny, inputs, observe(self.tiny, inputs, "forward"), observe(self.tiny, inputs), unpruned
            )
        with self.on(indicator=True):
            marks = observe(self.tiny, inputs, "forward")
        lines = newlines(self.tiny, marks)
        return case, marks.real & (~marks.visual | lines | (marks.embeds[..., 0].abs() > 1e-6))
