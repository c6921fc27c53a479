"""The splice for towers that run all images as one sequence of (tokens, channels) with segment borders (Qwen-VL)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokprune.adapters.tower_parts import Heads
from tokprune.adapters.types import ModelCall, Positional, Replaced
from tokprune.errors import UnsupportedModelError
from tokprune.methods.encoder_base import BlockView, Cut, Reduction
from tokprune.runtime.encoder.engine import Splice
from tokprune.runtime.encoder.pixels import Grid, of_rows
from tokprune.runtime.encoder.run import EncoderTrace, Run, State

PAD = 8  # channels added to each head for the size bias: flash kernels want multiples of eight


@dataclass(eq=False, kw_only=True)
class PackedRun(Run):
    """One call of a packed tower."""

    position: tuple[Tensor, Tensor]
    """Cosine and sine of all tokens at the entrance, (S, d) each."""
    order: Tensor | None
    """(U,) raster number of each unit of the sequence; None: raster order."""
    cells: list[tuple[int, int]]
    """Height and width of each frame in units."""
    lengths: dict[int, list[int]]
    """Units of each frame that enter each block, known to the host so that a reduction need not ask the device."""
    whole: list[int]
    """Units of each frame at the tower's entrance."""
    borders: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Borders that the model gave its blocks, and what they say: (U,) segment of each unit."""
    segment: dict[int, Tensor] = field(default_factory=dict)
    """The segments of each block."""
    cuts: list[tuple[Tensor, Cut | None]] = field(default_factory=list)
    """Per size of frames, where a method that restores the full sequence left it: the (F, n) places of the frames'
    units, and what stayed of them; None: everything."""


def pad_rotary(table: Tensor, value: float) -> Tensor:
    """Cosine (value 1) or sine (0) with the added channels, at the end of either half. table: (S, d)."""
    return torch.nn.functional.pad(table.unflatten(-1, (2, -1)), (0, PAD // 2), value=value).flatten(-2)


class PackedSplice(Splice[PackedRun]):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: frames of all images in one sequence, window by window where there are windows.

    The rows of the states are units of `fold` tokens, which the model's merger joins. Frames of equal size are matched
    together, never across frames, and survivors keep their order, so that frames and windows stay contiguous.
    """

    def start(self, x: Tensor, kwargs: ModelCall) -> PackedRun:
        fold, tokens = self.fold, x.shape[0]
        if tokens % fold or kwargs.get("position_embeddings") is None or kwargs.get("cu_seqlens") is None:
            raise UnsupportedModelError(f"the blocks of {self.tower.family} were called without borders or positions.")
        frames = self.threads.now.frames
        if frames is None:
            raise UnsupportedModelError(f"the blocks of {self.tower.family} were called without the tower around them.")
        cells, order = frames
        whole = [tokens] if self.method.single_patches else [height * width for height, width in cells]
        position, lengths = kwargs["position_embeddings"], {0: whole}
        return PackedRun(
            tokens // fold, tokens, 1, position=position, order=order, cells=cells, lengths=lengths, whole=whole
        )

    def put_on(self) -> None:
        """Also watch the tower's entrance: there, and only there, the sizes of images and frames are known."""
        super().put_on()
        self.on.before(self.tower.root, "_grids", with_kwargs=True)
        if self.method.size_bias:
            for i, parts in enumerate(self.tower.blocks):
                self.on.after(parts.reader.watched()["qkv"], "_add_channel", i)
                self.on.before(parts.attention.proj, "_strip_channel", i)

    def _grids(self, module: nn.Module, args: Positional, kwargs: ModelCall) -> None:
        if self._foreign:
            return
        grid = args[1] if len(args) > 1 else kwargs["grid_thw"]
        order = None if self.tower.grids is None else self.tower.grids(grid, kwargs)
        side = math.isqrt(self.tower.fold)
        cells = [(height // side, width // side) for count, height, width in grid.tolist() for _ in range(count)]
        self.threads.now.frames = (cells, order)
        if self.pixels is not None:
            self.threads.now.clips = [(t, height // side, width // side) for t, height, width in grid.tolist()]
            named = (kwargs[name] for name in ("hidden_states", "pixel_values") if name in kwargs)
            self.threads.now.pixels = args[0] if args else next(named, None)

    def _add_channel(self, index: int, module: nn.Module, args: Positional, output: Tensor) -> Tensor | None:
        """The logarithm of each key's size as one more channel of q (1) and k; attention itself stays as it is."""
        run = self._run(index)
        state = None if run is None else run.states[index]
        if state is None:
            return None
        parts = self.tower.blocks[index]
        shape = (3, parts.attention.num_heads, 2, -1)  # two halves, as the rotary embedding pairs them
        heads = output.unflatten(1, shape)  # (S, 3, H, 2, d / 2)
        more = heads.new_zeros(*heads.shape[:-1], PAD // 2)
        more[:, 0, :, 0, 0] = 1
        more[:, 1, :, 0, 0] = (state.size.log() / parts.scale).repeat_interleave(self.fold, 0).to(output.dtype)
        return torch.cat([heads, more], -1).flatten(1)

    def _strip_channel(self, index: int, module: nn.Module, args: Positional) -> Positional | None:
        run = self._run(index)
        if run is None or run.states[index] is None:
            return None
        heads = args[0].unflatten(1, (self.tower.blocks[index].attention.num_heads, 2, -1))  # (S, H, 2, d / 2)
        return (heads[..., : -(PAD // 2)].flatten(1), *args[1:])

    def block_arguments(self, run: PackedRun, index: int, args: Positional, kwargs: ModelCall) -> Replaced:
        """Borders and positions of the rows that are left."""
        state = run.states[index]
        borders = kwargs["cu_seqlens"]
        segment = next((known for given, known in run.borders if given is borders), None)
        if segment is None:
            x = args[0] if args else kwargs["hidden_states"]
            units = (borders[1:] - borders[:-1]).to(x.device, torch.long) // self.fold
            segment = torch.repeat_interleave(torch.arange(len(units), device=units.device), units)
            run.borders.append((borders, segment))
        run.segment[index] = segment
        run.lengths.setdefault(index, run.lengths.get(index - 1, []))
        if state is None:
            return None
        counts = torch.bincount(segment[state.rep])
        counts = counts[counts > 0] * self.fold
        new = dict(kwargs)
        new["cu_seqlens"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(borders)
        if kwargs.get("max_seqlen") is not None:
            new["max_seqlen"] = int(counts.max())
        cos, sin = (p[self.tokens(state.rep)] for p in run.position)
        if self.method.size_bias:
            cos, sin = pad_rotary(cos, 1.0), pad_rotary(sin, 0.0)
        new["position_embeddings"] = (cos, sin)
        return args, new

    @property
    def channels(self) -> int:
        return PAD if self.method.size_bias else 0

    def places(self, index: int) -> Tensor | None:
        state = self._seen().states[index]
        return None if state is None else self.tokens(state.rep)

    def restored(self, run: PackedRun, index: int) -> None:
        super().restored(run, index)
        run.lengths[index] = run.whole

    def tokens(self, units: Tensor) -> Tensor:
        """Token rows of these units."""
        fold = self.fold
        return (units[:, None] * fold + torch.arange(fold, device=units.device)).flatten()

    def clips(self, run: PackedRun) -> list[Grid]:
        """Pictures and clips in units: as the model's own call tells them, for the tower may be shown single frames
        (GLM-4V); else as the tower's.
        """
        _, call = self.threads.now.call or ("", {})
        given = next((v for k, v in call.items() if k.endswith("_grid_thw") and isinstance(v, Tensor)), None)
        side = math.isqrt(self.tower.fold)
        clips = [] if given is None else [(t, h // side, w // side) for t, h, w in given.tolist()]
        return clips if [(h, w) for t, h, w in clips for _ in range(t)] == run.cells else self.threads.now.clips

    def drop(self, run: PackedRun, x: Tensor) -> bool:
        now, tower, clips = self.threads.now, self.tower, self.clips(run)
        pixels, now.pixels = now.pixels, None
        sizes = [t * h * w for t, h, w in clips]
        channels, frames = tower.row
        if self.pixels is None or pixels is None or pixels.dim() != 2 or pixels.shape[0] != run.tokens:
            raise UnsupportedModelError(
                f"{tower.family} was called without a row of pixels for each patch; a pixels method reads them."
            )
        choice = self.pixels.decide(of_rows(pixels, channels, frames, tower.fold).split(sizes), clips)
        run.worth, kept = choice.worth, choice.kept  # in raster order, frame after frame
        left = [int(n) for n in torch.stack([part.sum() for part in kept.split(run.whole)]).tolist()]
        if left == run.whole:
            return False
        place = torch.arange(run.rows, device=x.device) if run.order is None else run.order.to(x.device)  # (U,)
        at = torch.empty_like(place).scatter_(0, place, torch.arange(run.rows, device=x.device))  # of each raster unit
        kept, source = kept[place], choice.source[place]
        row = kept.cumsum(0) - 1
        assign = torch.where(source >= 0, row[at[source.clamp(min=0)]], -1)
        rep = kept.nonzero()[:, 0]
        run.lengths[0] = left
        run.states[0] = State(x.new_ones(len(rep), 1, dtype=torch.float32), assign, rep)
        return True

    def take(self, run: PackedRun, x: Tensor) -> Tensor:
        state = run.states[0]
        return x if state is None else x.view(run.rows, -1)[state.rep].view(-1, x.shape[1])

    def attend(self, run: PackedRun, index: int, args: Positional, kwargs: ModelCall) -> Replaced:
        return None  # the size bias travels as a channel of q and k

    def shrink(self, run: PackedRun, index: int, x: Tensor) -> Tensor | None:
        state, units = run.states[index], x.shape[0] // self.fold
        place = torch.arange(units, device=x.device) if state is None else state.rep  # (U,)
        size = x.new_ones(units, 1, dtype=torch.float32) if state is None else state.size
        rows = x.view(units, -1)  # (U, C of a unit)
        cuts, left = run.cuts, list(run.lengths[index])
        if cuts and self.method.info.adaptive:  # frames of one size may differ by now: their cuts would be mixed up
            raise UnsupportedModelError(
                f"{self.method.info.name} can leave the sequence of a {self.tower.family} tower once, at one block."
            )
        parts: list[tuple[Tensor, Reduction]] = []
        new: list[tuple[Tensor, Cut | None]] = []
        for number, (start, frames, at) in enumerate(self.equal_frames(run, index, x.device)):
            view = self.view(run, index, rows[at], size[at], at, place[at], start)
            if index in run.inputs:
                view.entering = run.inputs[index].view(units, -1)[at]
            view.cut = cuts[number][1] if cuts else None
            reduction = self.method.reduce(view)
            new.append((at, None if reduction is None else Cut(view.x, reduction)))
            if reduction is None:
                reduction = Reduction.kept(view, torch.arange(at.shape[1], device=x.device).expand_as(at))
            else:
                width = reduction.rep.shape[1]
                counts = (reduction.rep >= 0).sum(1).tolist() if self.method.info.adaptive else [width] * len(frames)
                for frame, count in zip(frames, counts, strict=True):
                    left[frame] = count
            parts.append((at, reduction))
        if all(cut is None for _, cut in new):
            return None
        if self.method.restores:
            run.cuts = cuts or new
        run.lengths[index + 1] = left
        return self.gather(run, index, parts, units)

    def equal_frames(self, run: PackedRun, index: int, device: torch.device) -> Iterator[tuple[int, list[int], Tensor]]:
        """Frames of one size at the entrance of the tower and of one size now: that first size, their numbers, and
        their rows in front of block `index`, (F, n).
        """
        counts = run.lengths[index]
        first = list(itertools.accumulate(counts, initial=0))
        groups: dict[tuple[int, int], list[int]] = {}
        for frame, sizes in enumerate(zip(run.whole, counts, strict=True)):
            if sizes[1] > 0:
                groups.setdefault(sizes, []).append(frame)
        for (start, count), frames in groups.items():
            begin = torch.tensor([first[frame] for frame in frames], device=device)[:, None]
            yield start, frames, begin + torch.arange(count, device=device)

    def gather(self, run: PackedRun, index: int, parts: list[tuple[Tensor, Reduction]], units: int) -> Tensor:
        """Put the frames' rows behind one another again, in the order of their places. parts: rows (F, n) that were
        reduced together, and to what.
        """
        made: list[list[Tensor]] = []  # rows, places, sizes of each part
        offset = 0
        assign = torch.full((units,), -1, dtype=torch.long, device=parts[0][0].device)
        for at, out in parts:
            number = torch.arange(out.rep.numel(), device=at.device).view_as(out.rep) + offset  # (F, K) before sorting
            real = out.rep >= 0 if self.method.info.adaptive else None  # no padding: nothing to ask the device
            if real is not None:
                number = torch.where(real, real.flatten().cumsum(0).view_as(number) - 1 + offset, -1)
            offset += out.rep.numel() if real is None else int(real.sum())
            row = torch.where(out.assign >= 0, number.gather(1, out.assign.clamp(min=0)), -1)  # (F, n)
            assign[at.flatten()] = row.flatten()
            place = at.gather(1, out.rep.clamp(min=0))
            made.append([new.flatten(0, 1) if real is None else new[real] for new in (out.x, place, out.size)])
        x, rep, size = (torch.cat(pieces) for pieces in zip(*made, strict=True))
        order = torch.sort(rep, stable=True).indices
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        assign = torch.where(assign >= 0, back[assign.clamp(min=0)], -1)
        run.states[index + 1] = State(size[order], assign, rep[order]).after(run.states[index])
        return x[order].view(-1, x.shape[1] // self.fold)

    def view(
        self, run: PackedRun, index: int, x: Tensor, size: Tensor, at: Tensor, place: Tensor, start: int
    ) -> BlockView:
        """What the method sees of frames of one size.

        x: (F, n, C of a unit). at, place: (F, n) rows now and at the entrance. start: units of a frame at the entrance.
        """
        tower, fold = self.tower, self.fold
        offsets = torch.arange(fold, device=x.device)
        token = (at[..., None] * fold + offsets).flatten(1)  # (F, S)
        origin = (place[..., None] * fold + offsets).flatten(1)
        reader = tower.blocks[index].reader

        def heads() -> Heads:
            q, k, v = (x[0].transpose(0, 1)[token].transpose(1, 2) for x in reader.read(run.seen[index]))
            return q, k, v

        def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            positions = [p[origin] for p in run.position]  # (F, S, d)
            return reader.turn(q, positions), reader.turn(k, positions)

        bias: Tensor | None = None
        if not self.method.single_patches:  # else the square of all pictures' patches
            segment = run.segment[index][place].repeat_interleave(fold, 1)
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

    def widen(self, run: PackedRun, state: State | None, x: Tensor, rebuild: bool = True) -> Tensor:
        if state is None:
            return x
        rows = x.reshape(-1, x.shape[1] * self.fold)
        if run.cuts and rebuild:
            full = rows.new_empty(run.rows, rows.shape[1])
            for at, cut in run.cuts:
                place = at if cut is None else at.gather(1, cut.reduction.rep.clamp(min=0))
                now = rows[state.assign[place].clamp(min=0)]  # (F, K, C) in the cut's order
                full[at.flatten()] = (now if cut is None else self.method.rebuild(cut, now)).flatten(0, 1)
            return full.view(-1, x.shape[1])
        wide = rows[state.assign.clamp(min=0)].masked_fill((state.assign < 0)[:, None], 0)
        return wide.view(-1, x.shape[1])

    def record(self, run: PackedRun, state: State | None) -> EncoderTrace:
        """In raster order, frame after frame, whatever windows the tower makes."""
        fold, cells = self.tower.fold, tuple(run.cells)
        units, counts = run.tokens // fold, tuple(-(-n // fold) for n in run.counts)
        if state is None or self.method.restores:
            everything, size = torch.arange(units), torch.ones(units, dtype=torch.float32)
            return EncoderTrace(everything, size.bool(), size, fold, 0, counts, cells, run.worth)
        survivor = torch.zeros(units, dtype=torch.bool, device=state.rep.device)
        survivor[state.rep] = True
        assign = state.assign
        if run.order is not None:
            order = run.order.to(assign.device)
            assign = torch.empty_like(assign).scatter_(0, order, assign)
            survivor = torch.empty_like(survivor).scatter_(0, order, survivor)
        return EncoderTrace(assign, survivor, state.size[:, 0], fold, 0, counts, cells, run.worth)
