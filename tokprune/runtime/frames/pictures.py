"""The pictures of a video's frames, taken back out of the pixels of an encoder call, for scorers that look at
frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokprune.adapters.families import EncoderCall, UnknownGeometryError, arrange, family_of
from tokprune.adapters.families.qwen_vl import Packed


@dataclass(frozen=True)
class Pictures:
    """The pictures of one encoder call, as the processor normalised them.

    batches: each (n, k, 3, H, W): n temporal patches of k pictures (Qwen: 2 frames to a patch; others 1); a video lies
    in one batch. Patches are numbered through all batches. owner: (R,) the patch that each flattened encoder row shows,
    -1 for separators.
    """

    batches: tuple[Tensor, ...]
    owner: Tensor

    def of(self, wanted: Tensor) -> Tensor:
        """The wanted patches (T,) of one video, in that order: (T, k, 3, H, W)."""
        start, first = 0, int(wanted.min())
        for batch in self.batches[:-1]:
            if first < start + batch.shape[0]:
                return batch[(wanted - start).to(batch.device)]
            start += batch.shape[0]
        return self.batches[-1][(wanted - start).to(self.batches[-1].device)]


def frame_pictures(call: EncoderCall) -> Pictures:
    """The pictures of a call. Raises UnknownGeometryError where the pixels cannot be put together again."""
    family = family_of(call.base, call.kwargs)
    if isinstance(family, Packed):
        return _packed(family, call)
    units = family.units(call)  # (U, 3, H, W)
    if units.dim() != 4 or units.shape[1] != 3:
        raise UnknownGeometryError(f"its pixels {tuple(units.shape)} are not pictures")
    patches = family.patches(call)
    number = torch.arange(units.shape[0], dtype=torch.float32)
    if patches is not None:  # what the model does with patches it does with their number
        owner = arrange(call, number.repeat_interleave(patches), fill=-1.0).round().long()
    elif call.total % units.shape[0] == 0:
        owner = number.long().repeat_interleave(call.total // units.shape[0])
    else:
        raise UnknownGeometryError(f"{call.total} tokens of {units.shape[0]} pictures")
    return Pictures((units[:, None],), owner)


def _packed(family: Packed, call: EncoderCall) -> Pictures:
    """Pixels that lie as rows of patches, block by block of those that merge: (t, h, w) of each video, in patches."""
    pixels = call.pixels
    if pixels is None or pixels.dim() != 2:
        raise UnknownGeometryError("its pixels are not rows of patches")
    config = call.vision_config
    side = int(config.patch_size)
    depth, rest = divmod(pixels.shape[1], 3 * side * side)
    if rest or not depth:
        raise UnknownGeometryError(f"{pixels.shape[1]} values do not make patches of {side} x {side}")
    batches, owners, row, count = [], [], 0, 0
    for (t, h, w), merge in zip(family.grids(call), family.merges(call), strict=True):
        n = t * h * w
        blocks = pixels[row : row + n].reshape(t, h // merge, w // merge, merge, merge, 3, depth, side, side)
        batches.append(blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t, depth, 3, h * side, w * side))
        owners.append(torch.arange(count, count + t).repeat_interleave(h * w // merge**2))
        row, count = row + n, count + t
    if row != pixels.shape[0]:
        raise UnknownGeometryError(f"{pixels.shape[0]} patches for grids of {row}")
    return Pictures(tuple(batches), torch.cat(owners))
