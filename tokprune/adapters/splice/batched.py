"""The splice for towers whose sequences are (images, tokens, channels)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokprune.adapters.splice.engine import Splice
from tokprune.adapters.splice.run import EncoderTrace, Run, State
from tokprune.adapters.splice.tower import Heads
from tokprune.errors import UnsupportedModelError
from tokprune.methods.encoder_base import BlockView


class BatchedSplice(Splice):
    """timm, open_clip, CLIP, SigLIP, InternVL: all images of a batch have the same number of tokens.

    With fold > 1 the rows of the states are units of the connector, without the prefix, and after the first reduction
    the sequence is prefix, then unit after unit.
    """

    def start(self, x: Tensor, kwargs: Mapping[str, Any]) -> Run:
        tokens, prefix, fold = x.shape[1], self.tower.prefix, self.tower.fold
        if fold > 1 and (tokens - prefix) % fold:
            raise UnsupportedModelError(
                f"{tokens - prefix} patches are no whole units of {fold} in {self.tower.family}."
            )
        rows = tokens if fold == 1 else (tokens - prefix) // fold
        return Run(rows, tokens, x.shape[0])

    def order(self, run: Run, device: torch.device) -> Tensor:
        """(N0,) tokens in unit order, the prefix first."""
        prefix = self.tower.prefix
        if self.tower.unit_order is None:
            raise UnsupportedModelError(f"{self.tower.family} has no unit order.")
        patches = self.tower.unit_order(run.tokens - prefix).to(device) + prefix
        return torch.cat([torch.arange(prefix, device=device), patches])

    def shrink(self, run: Run, index: int, x: Tensor) -> Tensor | None:
        tower, state = self.tower, run.states[index]
        fold, prefix = tower.fold, tower.prefix
        order = self.order(run, x.device) if fold > 1 and state.assign is None else None
        head = x[:, :0]
        rows = x
        if fold > 1:
            x = x if order is None else x[:, order]
            head, rows = x[:, :prefix], x[:, prefix:].unflatten(1, (-1, fold)).flatten(2)

        def heads() -> Heads:
            q, k, v = tower.blocks[index].heads(run.seen[index])
            return (q, k, v) if order is None else (q[:, :, order], k[:, :, order], v[:, :, order])

        start = run.rows - prefix if fold == 1 else run.rows
        view = BlockView(
            x=rows,
            index=index,
            depth=tower.depth,
            prefix=prefix if fold == 1 else 0,
            start=start,
            qkv=heads,
            scale=tower.blocks[index].scale,
            target=self.target(start),
            size=state.size,
            fold=fold,
            hidden_prefix=prefix,
            cls=tower.cls,
            bias=self.bias(run, index),
            blocks=len(tower.blocks),
        )
        out = self.method.reduce(view)
        if out is None:
            return None
        ragged = state.ragged or self.method.info.adaptive
        run.states[index + 1] = state.then(out.rep, out.assign, out.size, ragged)
        if fold == 1:
            return out.x
        return torch.cat([head, out.x.unflatten(2, (fold, -1)).flatten(1, 2)], 1)

    def bias(self, run: Run, index: int) -> Tensor | None:
        """(B, 1, 1, N) what block `index` adds to its logits: the logarithm of each key's size, -inf for padding."""
        state = run.states[index]
        if state.size is None or not (self.method.size_bias or state.ragged):
            return None
        size = state.size[..., 0]
        if not self.method.size_bias:
            size = (size > 0).to(size.dtype)
        if self.tower.fold > 1:
            size = size.repeat_interleave(self.tower.fold, dim=1)
            size = torch.cat([size.new_ones(size.shape[0], self.tower.prefix), size], 1)
        return size.log()[:, None, None, :]

    def attend(self, run: Run, index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        if run.states[index].assign is None:
            return None
        bias, mask = self.bias(run, index), kwargs.get(self.tower.mask)
        if (
            mask is not None and not run.unmasked
        ):  # a mask that hides nothing is dropped; reduced rows could not follow another
            visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            if not bool(visible.all()):
                raise UnsupportedModelError(
                    f"{self.tower.family}: the batch pads images to one length with an attention mask, which an encoder-stage method cannot "
                    "follow; run images of equal size together, or one by one."
                )
            run.unmasked = True
        if bias is None:
            return None if mask is None else (args, {**kwargs, self.tower.mask: None})
        x = args[0] if args else kwargs["hidden_states"]
        bias = bias.to(x.dtype)
        if self.tower.padding:
            return args, {**kwargs, "key_padding_mask": bias[:, 0, 0]}
        return args, {**kwargs, self.tower.mask: bias}

    def widen(self, run: Run, state: State, x: Tensor) -> Tensor:
        if state.assign is None:
            return x
        fold, prefix = self.tower.fold, self.tower.prefix
        rows = x if fold == 1 else x[:, prefix:].unflatten(1, (-1, fold)).flatten(2)
        wide = rows.gather(1, state.assign.clamp(min=0)[..., None].expand(-1, -1, rows.shape[2]))
        wide = wide.masked_fill((state.assign < 0)[..., None], 0)
        if fold == 1:
            return wide
        wide = torch.cat([x[:, :prefix], wide.unflatten(2, (fold, -1)).flatten(1, 2)], 1)
        return wide[:, self.order(run, x.device).argsort()]

    def record(self, run: Run, state: State) -> EncoderTrace:
        places = run.rows - (self.tower.prefix if self.tower.fold == 1 else 0)
        side = math.isqrt(places)  # grids that are not square come out as one line
        cells = ((side, side) if side * side == places else (1, places),) * run.batch
        prefix = self.tower.prefix if self.tower.fold == 1 else 0
        if state.assign is None or state.rep is None or state.size is None:
            assign = torch.arange(run.rows - prefix).expand(run.batch, -1)
            there = torch.ones_like(assign, dtype=torch.bool)
            return EncoderTrace(assign, there, there.float(), self.tower.fold, prefix, tuple(run.counts), cells)
        real = state.rep >= 0
        survivor = torch.zeros_like(state.assign)
        survivor = survivor.scatter_reduce(1, state.rep.clamp(min=0), real.long(), "amax").bool()
        assign = torch.where(state.assign >= 0, state.assign - prefix, -1)[:, prefix:]
        size = state.size[:, prefix:, 0]
        return EncoderTrace(assign, survivor[:, prefix:], size, self.tower.fold, prefix, tuple(run.counts), cells)
