"""The splice for towers that run all images as one sequence of (tokens, channels) with segment borders (Qwen-VL)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokprune.errors import UnsupportedModelError
from tokprune.methods.encoder_base import BlockView, Cut, Reduction
from tokprune.runtime.encoder.engine import Splice
from tokprune.runtime.encoder.run import EncoderTrace, Run, State
from tokprune.runtime.encoder.tower import Heads

PAD = 8  # channels added to each head for the size bias: flash kernels want multiples of eight


@dataclass
class PackedRun(Run):
    """segment: per border tensor of the model, (U,) segment of each unit. kinds[i]: border tensor of block i.

    position: cos and sin of all tokens at the entrance. order: (U,) raster number of each unit of the sequence; None:
    raster order. cells: height and width of each frame in units. lengths[i]: units of each frame that enter block i,
    known to the host so that a reduction need not ask the device.
    """

    segment: dict[int, Tensor] = field(default_factory=dict)
    borders: dict[int, Tensor] = field(default_factory=dict)
    kinds: dict[int, int] = field(default_factory=dict)
    position: tuple[Tensor, Tensor] | None = None
    order: Tensor | None = None
    cells: list[tuple[int, int]] = field(default_factory=list)
    lengths: dict[int, list[int]] = field(default_factory=dict)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of both halves. x: (..., S, hd), cos, sin: (..., S, hd)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def still(table: Tensor, value: float) -> Tensor:
    """cos (1) or sin (0) for the added channels, at the end of either half. table: (S, hd)."""
    return torch.nn.functional.pad(table.unflatten(-1, (2, -1)), (0, PAD // 2), value=value).flatten(-2)


class PackedSplice(Splice):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: frames of all images behind one another, window by window where there are
    windows.

    The rows of the states are units of `fold` tokens, which the model's merger joins. Frames of equal size are matched
    together, never across frames, and survivors keep their order, so that frames and windows stay contiguous.
    """

    def start(self, x: Tensor, kwargs: Mapping[str, Any]) -> PackedRun:
        fold, tokens = self.tower.fold, x.shape[0]
        if tokens % fold or kwargs.get("position_embeddings") is None or kwargs.get("cu_seqlens") is None:
            raise UnsupportedModelError(f"the blocks of {self.tower.family} were called without borders or positions.")
        run = PackedRun(tokens // fold, tokens, 1)
        run.position = kwargs["position_embeddings"]
        frames = self.threads.now.frames
        if frames is None:
            raise UnsupportedModelError(f"the blocks of {self.tower.family} were called without the tower around them.")
        run.cells, run.order = frames
        run.lengths[0] = [height * width for height, width in run.cells]
        return run

    def _install(self) -> None:
        """Also watch the tower's entrance: there, and only there, the sizes of images and frames are known."""
        super()._install()
        self.on.before(self.tower.root, "_grids", with_kwargs=True)
        if self.method.size_bias:
            for i, parts in enumerate(self.tower.blocks):
                self.on.after(parts.seen["qkv"], "_add_channel", i)
                self.on.before(parts.attention.proj, "_strip_channel", i)

    def _grids(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._foreign:
            return
        grid = args[1] if len(args) > 1 else kwargs["grid_thw"]
        order = None if self.tower.grids is None else self.tower.grids(grid, kwargs)
        side = math.isqrt(self.tower.fold)
        cells = [(height // side, width // side) for count, height, width in grid.tolist() for _ in range(count)]
        self.threads.now.frames = (cells, order)

    def _add_channel(self, index: int, module: Any, args: Any, output: Tensor) -> Any:
        """The logarithm of each key's size as one more channel of q (1) and k; attention itself stays as it is,
        flash included.
        """
        run = self._run(index)
        size = None if run is None else run.states[index].size
        if size is None:
            return None
        parts = self.tower.blocks[index]
        heads = output.view(
            output.shape[0], 3, parts.attention.num_heads, 2, -1
        )  # halves, as the rotary embedding pairs them
        more = heads.new_zeros(*heads.shape[:-1], PAD // 2)
        more[:, 0, :, 0, 0] = 1
        more[:, 1, :, 0, 0] = (size.log() / parts.scale).repeat_interleave(self.tower.fold, 0).to(output.dtype)
        return torch.cat([heads, more], -1).flatten(1)

    def _strip_channel(self, index: int, module: Any, args: Any) -> Any:
        run = self._run(index)
        if run is None or run.states[index].size is None:
            return None
        heads = args[0].view(args[0].shape[0], self.tower.blocks[index].attention.num_heads, 2, -1)
        return (heads[..., : -(PAD // 2)].flatten(1), *args[1:])

    def block_arguments(self, run: Any, index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """Borders and positions of the rows that are left."""
        state = run.states[index]
        borders = kwargs["cu_seqlens"]
        key = next((k for k, known in run.borders.items() if known is borders), -1)
        if key < 0:
            key = len(run.borders)
            run.borders[key] = borders
            x = args[0] if args else kwargs["hidden_states"]
            units = (borders[1:] - borders[:-1]).to(x.device, torch.long) // self.tower.fold
            run.segment[key] = torch.repeat_interleave(torch.arange(len(units), device=units.device), units)
        run.kinds[index] = key
        run.lengths.setdefault(index, run.lengths.get(index - 1, []))
        if state.rep is None:
            return None
        counts = torch.bincount(run.segment[key][state.rep])
        counts = counts[counts > 0] * self.tower.fold
        new = dict(kwargs)
        new["cu_seqlens"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(borders)
        if kwargs.get("max_seqlen") is not None:
            new["max_seqlen"] = int(counts.max())
        cos, sin = (p[self.tokens(state.rep)] for p in run.position)
        if self.method.size_bias:
            cos, sin = still(cos, 1.0), still(sin, 0.0)
        new["position_embeddings"] = (cos, sin)
        return args, new

    @property
    def channels(self) -> int:  # type: ignore[override]
        return PAD if self.method.size_bias else 0

    def places(self, index: int) -> Tensor | None:
        rep = self._seen().states[index].rep
        return None if rep is None else self.tokens(rep)

    def restored(self, run: Any, index: int) -> None:
        super().restored(run, index)
        run.lengths[index] = run.lengths[0]

    def tokens(self, units: Tensor) -> Tensor:
        """Token rows of these units."""
        fold = self.tower.fold
        return (units[:, None] * fold + torch.arange(fold, device=units.device)).flatten()

    def attend(self, run: Run, index: int, args: Any, kwargs: dict[str, Any]) -> Any:
        return None  # the size bias travels as a channel of q and k

    def shrink(self, run: Any, index: int, x: Tensor) -> Tensor | None:
        state, units = run.states[index], x.shape[0] // self.tower.fold
        place = torch.arange(units, device=x.device) if state.rep is None else state.rep
        size = x.new_ones(units, 1, dtype=torch.float32) if state.size is None else state.size
        rows = x.view(units, -1)
        started, counts = run.lengths[0], run.lengths[index]
        first = list(itertools.accumulate(counts, initial=0))
        groups: dict[tuple[int, int], list[int]] = {}
        for f, pair in enumerate(zip(started, counts, strict=True)):
            if pair[1] > 0:
                groups.setdefault(pair, []).append(f)
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        left = list(counts)
        changed = False
        before = run.inputs.get(index)
        entering = None if before is None else before.view(units, -1)
        again = bool(run.cuts)
        for number, ((start, count), members) in enumerate(groups.items()):
            at = torch.tensor([first[f] for f in members], device=x.device)[:, None]
            at = at + torch.arange(count, device=x.device)  # (F, n) rows of each frame
            view = self.view(run, index, rows[at], size[at], at, place[at], start)
            view.entering = None if entering is None else entering[at]
            view.cut = run.cuts[number][1] if again else None
            out = self.method.reduce(view)
            if self.method.restores and not again:
                all_of_it = Reduction.kept(view, torch.arange(count, device=x.device).expand_as(at))
                run.cuts.append((at, Cut(view.x, all_of_it if out is None else out)))
            if out is None:
                same = torch.arange(count, device=x.device).expand_as(at)
                parts.append((at, rows[at], same, same, size[at]))
                continue
            changed = True
            parts.append((at, out.x, out.rep, out.assign, out.size))
            width = out.rep.shape[1]
            kept = (out.rep >= 0).sum(1).tolist() if self.method.info.adaptive else [width] * len(members)
            for f, n in zip(members, kept, strict=True):
                left[f] = n
        if not changed:
            return None
        run.lengths[index + 1] = left
        return self.gather(run, index, state, parts, units)

    def gather(self, run: Run, index: int, state: State, parts: Any, units: int) -> Tensor:
        """Put the frames' rows behind one another again, in the order of their places."""
        rows, reps, sizes = [], [], []
        assign = torch.full((units,), -1, dtype=torch.long, device=parts[0][0].device)
        offset = 0
        for at, x, rep, local, size in parts:
            if not self.method.info.adaptive:  # no padding: nothing to ask the device
                number = torch.arange(rep.numel(), device=rep.device).view_as(rep) + offset
                offset += rep.numel()
                assign[at.flatten()] = torch.where(local >= 0, number.gather(1, local.clamp(min=0)), -1).flatten()
                rows.append(x.flatten(0, 1))
                reps.append(at.gather(1, rep).flatten())
                sizes.append(size.flatten(0, 1))
                continue
            real = rep >= 0
            number = torch.where(real, real.flatten().cumsum(0).view_as(rep) - 1 + offset, -1)  # before sorting
            offset += int(real.sum())
            row = torch.where(local >= 0, number.gather(1, local.clamp(min=0)), -1)
            assign[at.flatten()] = row.flatten()
            rows.append(x[real])
            reps.append(at.gather(1, rep.clamp(min=0))[real])
            sizes.append(size[real])
        rep, x, size = torch.cat(reps), torch.cat(rows), torch.cat(sizes)
        order = torch.sort(rep, stable=True).indices
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        assign = torch.where(assign >= 0, back[assign.clamp(min=0)], -1)
        run.states[index + 1] = state.then(rep[order], assign, size[order], False, self.method.restores)
        return x[order].view(-1, x.shape[1] // self.tower.fold)

    def view(self, run: Any, index: int, x: Tensor, size: Tensor, at: Tensor, place: Tensor, start: int) -> BlockView:
        """What the method sees of frames of one size. x: (F, n, C of a unit), at: (F, n) rows now, place: (F, n)
        rows at the entrance.
        """
        tower, fold = self.tower, self.tower.fold
        offsets = torch.arange(fold, device=x.device)
        token = (at[..., None] * fold + offsets).flatten(1)  # (F, S)
        origin = (place[..., None] * fold + offsets).flatten(1)

        def heads() -> Heads:
            q, k, v = tower.blocks[index].heads(run.seen[index])
            return q[token].transpose(1, 2), k[token].transpose(1, 2), v[token].transpose(1, 2)

        def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = (p[origin][:, None].to(q.dtype) for p in run.position)
            return rotated(q, cos, sin), rotated(k, cos, sin)

        segment = run.segment[run.kinds[index]][place].repeat_interleave(fold, 1)
        bias = x.new_zeros(segment.shape[0], 1, 1, segment.shape[1], dtype=torch.float32)
        if self.method.size_bias:
            bias = size.repeat_interleave(fold, 1)[:, None, None, :, 0].log()
        bias = bias.masked_fill((segment[:, :, None] != segment[:, None, :])[:, None], -torch.inf)
        return BlockView(
            x=x,
            index=index,
            depth=tower.depth,
            prefix=0,
            start=start,
            qkv=heads,
            scale=tower.blocks[index].scale,
            target=self.target(start),
            size=size,
            fold=fold,
            blocks=len(tower.blocks),
            rotate=rotate,
            bias=bias,
        )

    def widen(self, run: Run, state: State, x: Tensor, rebuild: bool = True) -> Tensor:
        if state.assign is None:
            return x
        rows = x.reshape(-1, x.shape[1] * self.tower.fold)
        if state.detour and rebuild:
            full = rows.new_empty(run.rows, rows.shape[1])
            for at, cut in run.cuts:
                if at is None:
                    continue
                now = rows[
                    state.assign[at.gather(1, cut.reduction.rep.clamp(min=0))].clamp(min=0)
                ]  # (F, K, C) in the cut's order
                full[at.flatten()] = self.method.rebuild(cut, now).flatten(0, 1)
            return full.view(-1, x.shape[1])
        wide = rows[state.assign.clamp(min=0)].masked_fill((state.assign < 0)[:, None], 0)
        return wide.view(-1, x.shape[1])

    def record(self, run: Any, state: State) -> EncoderTrace:
        """In raster order, frame after frame, whatever windows the tower makes."""
        units = run.rows
        counts = tuple(n // self.tower.fold for n in run.counts)
        if state.assign is None or state.rep is None or state.size is None or state.detour:
            everything = torch.arange(units)
            there = torch.ones(units, dtype=torch.bool)
            return EncoderTrace(everything, there, there.float(), self.tower.fold, 0, counts, tuple(run.cells))
        survivor = torch.zeros(units, dtype=torch.bool, device=state.rep.device)
        survivor[state.rep] = True
        assign = state.assign
        if run.order is not None:
            order = run.order.to(assign.device)
            assign, survivor = (
                torch.empty_like(assign).scatter_(0, order, assign),
                survivor.new_empty(units).scatter_(0, order, survivor),
            )
        return EncoderTrace(assign, survivor, state.size[:, 0], self.tower.fold, 0, counts, tuple(run.cells))
