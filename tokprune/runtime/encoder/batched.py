"""The splice for towers whose sequences are (images, tokens, channels)."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor

from tokprune.adapters.families import EncoderCall, family_of
from tokprune.adapters.tower_parts import Heads
from tokprune.adapters.types import ModelCall, Positional, Replaced
from tokprune.errors import OptionError, UnsupportedModelError
from tokprune.methods.encoder_base import BlockView, Cut, Entrance
from tokprune.ops.topk import rows_at
from tokprune.runtime.encoder.engine import Splice
from tokprune.runtime.encoder.pixels import of_pictures
from tokprune.runtime.encoder.run import EncoderTrace, Run, State

OTHER_KERNEL = (
    "attention {!r} of this vision tower takes no bias per key, which {!r} needs; load the model with "
    'attn_implementation="sdpa" or "eager" (for the tower alone: {{"vision_config": "sdpa"}}).'
)


def rows_or_zeros(rows: Tensor, place: Tensor) -> Tensor:
    """The rows at these places, zeros at -1. rows: (B, N, C), place: (B, K) -> (B, K, C)."""
    return rows_at(rows, place.clamp(min=0)).masked_fill((place < 0)[..., None], 0)


class BatchedSplice(Splice[Run]):
    """timm, open_clip, CLIP, SigLIP, InternVL: all images of a batch have the same number of tokens.

    With fold > 1 the rows of the states are units of the connector, without the prefix, and after the first reduction
    the sequence is prefix, then unit after unit.
    """

    names: tuple[str, ...] = ()
    """What the attention calls its arguments."""

    def check(self) -> None:
        super().check()
        self._check_kernel()
        self.names = tuple(inspect.signature(type(self.tower.blocks[0].attention).forward).parameters)[1:]

    def _check_kernel(self) -> None:
        """Refuse attention kernels that do not take the masks of reduced rows."""
        kernel = str(getattr(getattr(self.tower.root, "config", None), "_attn_implementation", "sdpa"))
        masks = self.method.size_bias or self.method.info.adaptive or self.pixels is not None
        if "flex" in kernel or ("flash" in kernel and masks):
            raise UnsupportedModelError(OTHER_KERNEL.format(kernel, self.label))

    def start(self, x: Tensor, kwargs: ModelCall) -> Run:
        self._check_kernel()  # it may have been exchanged since apply
        if kwargs.get("cu_seqlens") is not None:
            raise UnsupportedModelError(
                f"{self.tower.family} was given pictures of several sizes in one sequence; an encoder-stage method "
                "needs a batch of equal pictures here."
            )
        tokens, prefix, fold = x.shape[1], self.tower.prefix, self.fold
        if fold > 1 and (tokens - prefix) % fold:
            raise UnsupportedModelError(
                f"{tokens - prefix} patches are no whole units of {fold} in {self.tower.family}."
            )
        rows = tokens if fold == 1 else (tokens - prefix) // fold
        return Run(rows, tokens, x.shape[0])

    def block_arguments(self, run: Run, index: int, args: Positional, kwargs: ModelCall) -> Replaced:
        """The rotary tables of the rows that are left, where the blocks take some."""
        given = kwargs.get(self.tower.rope) if self.tower.rope else None
        if given is None:
            return None
        tables, state = (given,) if isinstance(given, Tensor) else tuple(given), run.states[index]
        if any(table.dim() != 2 for table in tables):
            raise UnsupportedModelError(
                f"{self.tower.family} gave a rotary table of shape {tuple(tables[0].shape)} (patch dropout in "
                "training?); an encoder-stage method can follow one table for all images, (patches, channels)."
            )
        if state is not None:
            place = (state.rep[:, self.tower.prefix :] - self.tower.prefix).clamp(min=0)
            tables = tuple(table[place][:, None] for table in tables)  # (B, 1, K, D): a merged row keeps its place's
        run.ropes[index] = tables[0] if isinstance(given, Tensor) else tables
        return None if state is None else (args, {**kwargs, self.tower.rope: run.ropes[index]})

    def order(self, run: Run, device: torch.device) -> Tensor:
        """(N0,) tokens in unit order, the prefix first."""
        prefix = self.tower.prefix
        if self.tower.unit_order is None:
            raise UnsupportedModelError(f"{self.tower.family} has no unit order.")
        patches = self.tower.unit_order(run.tokens - prefix).to(device) + prefix
        return torch.cat([torch.arange(prefix, device=device), patches])

    def rows(self, x: Tensor, order: Tensor | None) -> Tensor:
        """Rows of the states: tokens, or units without the prefix. order: of tokens that lie in raster order."""
        if self.fold == 1:
            return x
        x = x if order is None else x[:, order]
        return x[:, self.tower.prefix :].unflatten(1, (-1, self.fold)).flatten(2)

    def unrolled(self, rows: Tensor, x: Tensor) -> Tensor:
        """The tokens of these rows, behind the prefix of `x` where they are units."""
        if self.fold == 1:
            return rows
        return torch.cat([x[:, : self.tower.prefix], rows.unflatten(2, (self.fold, -1)).flatten(1, 2)], 1)

    def entrance(self) -> Entrance | None:
        """The picture of this run and what larger patches of it would be."""
        now = self.threads.now
        pixels, now.pixels = now.pixels, None
        if pixels is None or self.tower.patch is None or self.tower.embed is None:
            return None
        embed, side = self.tower.embed, self.tower.patch.kernel_size[0]
        mean, std = self.normalisation or (None, None)
        known = getattr(self.method, "mean", None), getattr(self.method, "std", None)
        mean, std = known[0] or mean, known[1] or std
        if mean is None or std is None:
            raise OptionError(
                f"{self.method.info.name!r} measures the picture's grey levels, and this model does not say how its "
                "pixels were normalised: give apply its processor, or write mean=(...), std=(...) (image_mean and "
                "image_std of the image processor)."
            )
        shift, factor = (torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (mean, std))
        height, width = pixels.shape[2] // side, pixels.shape[3] // side

        def coarse(level: int) -> Tensor:
            step = 2**level
            whole = pixels[:, :, : height // step * step * side, : width // step * step * side]
            small = torch.nn.functional.interpolate(whole.float(), scale_factor=1 / step, mode="bilinear")
            out: Tensor = embed(small.to(pixels.dtype), (height, width), step)
            now.pixels = None  # the small picture went through the patch embedding, too
            return out

        return Entrance((pixels.float() * factor + shift) * 255, (height, width), coarse)

    def shrink(self, run: Run, index: int, x: Tensor) -> Tensor | None:
        tower, state = self.tower, run.states[index]
        fold, prefix = self.fold, tower.prefix
        order = self.order(run, x.device) if fold > 1 and state is None else None
        rows, reader = self.rows(x, order), tower.blocks[index].reader
        rope, before = run.ropes.pop(index, None), run.inputs.get(index)

        def heads() -> Heads:
            q, k, v = reader.read(run.seen[index])
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # grouped heads
            return (q, k, v) if order is None else (q[:, :, order], k[:, :, order], v[:, :, order])

        def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return reader.turn(q, rope), reader.turn(k, rope)

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
            size=None if state is None else state.size,
            fold=fold,
            hidden_prefix=prefix,
            cls=tower.cls,
            bias=self.whole_bias(run, index),
            blocks=len(tower.blocks),
            rotate=None if rope is None else rotate,
            entering=None if before is None else self.rows(before, order),
            cut=run.cut,
            entrance=self.entrance() if index < 0 else None,
        )
        out = self.method.reduce(view)
        if out is None:
            return None
        self.check_mask(run, run.mask)  # hidden tokens would be chosen, and merge, like the others
        if self.method.restores and run.cut is None:
            run.cut = Cut(rows, out)
        run.states[index + 1] = State(out.size, out.assign, out.rep, self.method.info.adaptive).after(state)
        return self.unrolled(out.x, x)

    def drop(self, run: Run, x: Tensor) -> bool:
        now, tower, fold = self.threads.now, self.tower, self.fold
        pixels, now.pixels = now.pixels, None
        if self.pixels is None or pixels is None or tower.patch is None:
            raise UnsupportedModelError(f"{tower.family} was called without pixels, which a pixels method reads.")
        units, (height, width) = of_pictures(pixels, int(tower.patch.kernel_size[0]), fold)
        count, head = height * width, tower.prefix if fold == 1 else 0
        if units.shape[:2] != (run.batch, run.rows - head):
            raise UnsupportedModelError(
                f"{run.batch} x {run.rows - head} places of {tower.family} are not the {height} x {width} units of "
                f"{len(units)} pictures; a pixels method cannot tell which is which."
            )
        parts, candidates = self._streams(len(units), count)
        if candidates is not None:
            candidates = candidates.to(x.device)
        choice = self.pixels.decide(list(units), [(1, height, width)] * len(units), parts, candidates)
        kept, source = choice.kept.view(-1, count), choice.source.view(-1, count)
        run.worth = choice.worth.view(-1, count)
        fewest, most = torch.stack(kept.sum(1).aminmax()).tolist()
        if fewest == count:
            return False
        self.check_mask(run, run.mask)
        begin = torch.arange(len(kept), device=x.device)[:, None] * count
        front = torch.arange(head, device=x.device).expand(len(kept), -1)
        source = torch.cat([front, torch.where(source >= 0, source - begin + head, -1)], 1)
        kept = torch.nn.functional.pad(kept, (head, 0), value=True)
        place = torch.sort(kept.to(torch.int8), dim=1, descending=True, stable=True).indices[:, : most + head]
        real = kept.gather(1, place)
        assign = torch.where(source >= 0, (kept.cumsum(1) - 1).gather(1, source.clamp(min=0)), -1)
        run.states[0] = State(real.float()[..., None], assign, torch.where(real, place, -1), fewest < most)
        return True

    def _streams(self, pictures: int, count: int) -> tuple[bool, Tensor | None]:
        """Whether a stream of the LLM may be made of several of these pictures of `count` units, and which units it
        gets at all, (pictures * count,) bool; None: all.
        """
        name, call = self.threads.now.call or ("", {})
        if not self.tower.vlm:
            return False, None
        base = self.tower.owner.base_model
        family, modality = family_of(base, call), "video" if "video" in name else "image"
        seen = family.candidates(EncoderCall(base, modality, call, None)) if modality == "image" else None
        if seen is not None and len(seen) != pictures * count:
            seen = None
        return family.cuts_pictures or modality == "video", seen

    def take(self, run: Run, x: Tensor) -> Tensor:
        state = run.states[0]
        if state is None:
            return x
        rows = self.rows(x, self.order(run, x.device) if self.fold > 1 else None)
        return self.unrolled(rows_or_zeros(rows, state.rep), x)

    def bias(self, run: Run, index: int) -> Tensor | None:
        """(B, 1, 1, N) what block `index` adds to its logits: the logarithm of each key's size, -inf for padding."""
        state = run.states[index]
        if state is None or not (self.method.size_bias or state.ragged):
            return None
        size = state.size[..., 0]
        if not self.method.size_bias:
            size = (size > 0).to(size.dtype)
        if self.fold > 1:
            size = size.repeat_interleave(self.fold, dim=1)
            size = torch.cat([size.new_ones(size.shape[0], self.tower.prefix), size], 1)
        return size.log()[:, None, None, :]

    def check_mask(self, run: Run, mask: Tensor | None) -> None:
        """Refuse a mask that hides tokens: reduced rows could not follow it."""
        if mask is None or run.unmasked or self.tower.relative:  # there it is the table of relative positions
            return
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if not bool(visible.all()):
            raise UnsupportedModelError(
                f"{self.tower.family}: the batch pads images to one length with an attention mask, which an "
                "encoder-stage method cannot follow; run images of equal size together, or one by one."
            )
        run.unmasked = True

    def whole_bias(self, run: Run, index: int) -> Tensor | None:
        """`bias`, and what the table of relative positions (1, H, N, N) says of the rows that are left."""
        bias, state, table = self.bias(run, index), run.states[index], run.table
        if table is None:
            return bias
        if state is not None:
            if table.shape[-1] != run.tokens:
                raise UnsupportedModelError(
                    f"{self.tower.family} stretches its relative positions to {table.shape[-1]} tokens of "
                    f"{run.tokens}: call it without interpolate_pos_encoding, which a shorter sequence cannot follow."
                )
            place = state.rep.clamp(min=0)[:, None, :, None]
            place = place.expand(-1, table.shape[1], -1, table.shape[-1])  # (B, H, K, N)
            table = table.expand(len(place), -1, -1, -1).gather(2, place)
            table = table.gather(3, place[..., :1].transpose(2, 3).expand(-1, -1, place.shape[2], -1))  # (B, H, K, K)
        return table if bias is None else table + bias

    def attend(self, run: Run, index: int, args: Positional, kwargs: ModelCall) -> Replaced:
        if not self.tower.padding and len(args) > 1:
            args, kwargs = args[:1], {**dict(zip(self.names[1:], args[1:], strict=False)), **kwargs}
        mask = kwargs.get(self.tower.mask)
        run.table, run.mask = mask if self.tower.relative else None, mask
        if run.states[index] is None:
            return None
        self.check_mask(run, mask)
        bias = self.whole_bias(run, index)
        if bias is None:
            return None if mask is None else (args, {**kwargs, self.tower.mask: None})
        x = args[0] if args else kwargs["hidden_states"]
        bias = bias.to(x.dtype)
        if self.tower.padding:
            return args, {**kwargs, "key_padding_mask": bias[:, 0, 0]}
        return args, {**kwargs, self.tower.mask: bias}

    def widen(self, run: Run, state: State | None, x: Tensor, rebuild: bool = True) -> Tensor:
        if state is None:
            return x
        rows = self.rows(x, None)
        if run.cut is not None and rebuild:
            wide = self.method.rebuild(run.cut, rows)
        else:
            wide = rows_or_zeros(rows, state.assign)
        wide = self.unrolled(wide, x)
        return wide if self.fold == 1 else wide[:, self.order(run, x.device).argsort()]

    def record(self, run: Run, state: State | None) -> EncoderTrace:
        places = (run.tokens - self.tower.prefix) // self.tower.fold
        side = math.isqrt(self.tower.fold)
        height, width = (n // side for n in run.grid or (0, 0))
        if height * width != places:  # the tower does not show its pictures: square, or else one line
            height = width = math.isqrt(places)
            height, width = (height, width) if height * width == places else (1, places)
        cells = ((height, width),) * run.batch
        prefix = self.tower.prefix if self.tower.fold == 1 else 0
        if state is None or self.method.restores:
            assign = torch.arange(places).expand(run.batch, -1)
            survivor = torch.ones_like(assign, dtype=torch.bool)
            size = survivor.float()
        else:
            real = state.rep >= 0
            survivor = torch.zeros_like(state.assign)
            survivor = survivor.scatter_reduce(1, state.rep.clamp(min=0), real.long(), "amax").bool()[:, prefix:]
            assign = torch.where(state.assign >= 0, state.assign - prefix, -1)[:, prefix:]
            size = state.size[:, prefix:, 0]
        return EncoderTrace(assign, survivor, size, self.tower.fold, prefix, tuple(run.counts), cells, run.worth)
