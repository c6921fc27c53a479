"""GlobalCom2 as its authors run it on one tiled image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokprune.methods.connector.globalcom2 import crop_scales


def unpadded(canvas: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a canvas that show the picture, not the padding around it. size: (width, height) of the
    picture."""
    height, width = canvas
    if size[0] / size[1] > width / height:
        pad = (height - int(size[1] * (width / size[0]))) // 2
        return slice(pad, height - pad), slice(0, width)
    pad = (width - int(size[0] * (height / size[1]))) // 2
    return slice(0, height), slice(pad, width - pad)


def globalcom2_published(
    thumbnail: Tensor,
    crops: Tensor,
    features: Tensor,
    tiles: tuple[int, int],
    size: tuple[int, int],
    newline: Tensor,
    ratio: float = 0.25,
    temperature: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the published code keeps of one tiled image on square grids.

    thumbnail: (N,) and crops: (T, N) scores. features: (T, N, D) of the crops. tiles: (down, across). size: (width,
    height) of the picture. newline: (D,). Returns the scales (T,), the thumbnail's kept tokens, best first, and the
    crops' tokens in raster order of the canvas with a newline after every canvas row, padded ones too, rounded to
    float16. In a padded crop that order numbers the unpadded tokens alone, so they lie further up and left than in the
    picture (a defect of the code).
    Counts follow from values: the host waits for them.
    """
    down, across = tiles
    count, n, _ = features.shape
    side = round(n**0.5)
    scales = crop_scales(thumbnail.double().view(side, side), tiles, ratio, temperature)
    kept = torch.sort(thumbnail, descending=True, stable=True).indices[: int(n * ratio)]
    box = unpadded((down * side, across * side), size)
    shown = torch.zeros(down * side, across * side, dtype=torch.bool, device=crops.device)
    shown[box] = True
    seen = torch.zeros_like(shown, dtype=thumbnail.dtype)
    # Bilinear, to the size of the picture on the canvas: the thumbnail has no padding.
    picture = (box[0].stop - box[0].start, box[1].stop - box[1].start)
    seen[box] = F.interpolate(thumbnail.view(1, 1, side, side), size=picture, mode="bilinear")[0, 0]

    def cut(canvas: Tensor) -> Tensor:  # (down * side, across * side) -> (T, N)
        return canvas.view(down, side, across, side).transpose(1, 2).reshape(count, n)

    def lay(x: Tensor) -> Tensor:  # (T, N, ...) -> (down * side, across * side, ...)
        return x.view(down, across, side, side, -1).transpose(1, 2).reshape(down * side, across * side, -1)

    visible = cut(shown)
    score = F.normalize(crops.masked_fill(~visible, 0), dim=-1) + F.normalize(cut(seen), dim=-1)
    mask = torch.zeros_like(visible)
    ranked = torch.sort(score.masked_fill(~visible, -torch.inf), dim=-1, descending=True, stable=True).indices
    for t, (scale, present) in enumerate(zip(scales.tolist(), visible.sum(-1).tolist(), strict=True)):
        mask[t, ranked[t, : int(present * scale)]] = True
    # The code lays a crop's tokens out as if its unpadded tokens began at its first place.
    order = torch.sort(visible.to(torch.int8), dim=-1, descending=True, stable=True).indices
    stays = F.pad(lay(mask.gather(1, order))[..., 0], (0, 1), value=True)
    source = order + n * torch.arange(count, device=order.device)[:, None]
    source = F.pad(lay(source)[..., 0], (0, 1), value=-1)[stays]  # of the kept ones, -1 for a newline
    out = features.flatten(0, 1)[source.clamp(min=0)]
    out = torch.where(source[:, None] < 0, newline.to(out), out)
    return scales.to(thumbnail.dtype), kept, out.half().to(features.dtype)
