"""Smaller pictures before the processor runs: a resolution for each by its size and content, and `resize`, the rival
of pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from tokprune.budget import check_budget, check_ratio, kept, share_between
from tokprune.errors import OptionError
from tokprune.methods.connector.wrappers.adaptive_budget import distinct_tokens
from tokprune.types import Processor

Count = Callable[[Image.Image], int]
"""How many visual tokens a model's processor makes of a picture."""
RESIZE = "resize"
"""What commands call the smaller picture, where they name methods."""
LEAST = 16  # pixels of a side: below, processors no longer know which axis holds the channels
PATCH, VIEW = 16, 512  # pixels of a patch, and of the longer side of a picture, where its content is measured
STEPS = 12  # sizes that are tried


def token_counter(processor: Processor) -> Count:
    """How many visual tokens `processor` makes of a picture, newline tokens included: it is run on one of that size."""
    mark, number = (getattr(processor, name, None) for name in ("image_token", "image_token_id"))
    if mark is None or number is None:
        raise OptionError(
            f"{type(processor).__name__} does not say what stands for a picture in a prompt (image_token, "
            "image_token_id). Give the model's whole processor, AutoProcessor.from_pretrained(...), or a function from "
            "a picture to its number of tokens: count=..."
        )
    seen: dict[tuple[int, int], int] = {}

    def count(image: Image.Image) -> int:
        if image.size not in seen:
            seen[image.size] = int((torch.as_tensor(ids_of(image)) == number).sum())
        if not seen[image.size]:
            raise OptionError(
                f"{type(processor).__name__} puts no token {mark!r} (image_token_id {number}) into a prompt with a "
                "picture, so its tokens cannot be counted. Give a function from a picture to its number: count=..."
            )
        return seen[image.size]

    def ids_of(image: Image.Image) -> object:
        blank = Image.new("RGB", image.size)
        marks = [str(m) for m in (mark, getattr(processor, "boi_token", None)) if m is not None]
        for text in marks:  # some put the tokens in place of a mark of their own, and refuse the other
            try:
                return processor(images=[blank], text=[text], return_tensors="pt")["input_ids"]
            except ValueError as error:
                refusal = error
        raise OptionError(
            f"{type(processor).__name__} takes no picture with {' or '.join(marks)} in its place ({refusal}). Give a "
            "function from a picture to its number of tokens: count=..."
        )

    return count


def resize(image: Image.Image, processor: Processor, ratio: float, count: Count | None = None) -> Image.Image:
    """The picture made smaller until it gives the nearest to the share `ratio` of its tokens that sizes can give.

    The honest rival of every method: no pruning, the tower gets faster, too. count: in place of running `processor`.
    Raises OptionError for processors that make a fixed number of tokens.
    """
    count = token_counter(processor) if count is None else count
    full, ratio = count(image), check_ratio(ratio)
    return image if ratio == 1 else scaled_to(image, count, kept(full, ratio), nearest=True)


def scale_inputs(
    images: Sequence[Image.Image],
    processor: Processor,
    budget: int,
    *,
    density: float = 0.5,
    least: float = 0.25,
    count: Count | None = None,
) -> list[Image.Image]:
    """Dynamic input scaling: the pictures of a prompt, scaled down so that together they give at most `budget` visual
    tokens, plain and small ones more than busy and large ones.

    After AdaptVision: Dynamic Input Scaling in MLLMs for Versatile Scene Understanding (arXiv 2408.16986). Its premise
    is that the tokens a picture needs depend on its resolution and on its content; the paper trains a model that cuts
    pictures into as many tiles as their size and aspect ratio ask for. The rule here is ours, and needs no training:
    picture i weighs N_i^(1 - density) * distinct_i^density, N_i its tokens at its own size, distinct_i the effective
    number of different patches on it, as `adaptive_budget` counts tokens behind the encoder. Each gets `least` of its
    share by N_i alone, the rest goes by weight, none above N_i: nothing is ever scaled up. What a picture cannot use,
    since sizes come in steps, goes to the next one.

    budget: visual tokens of all pictures, newline tokens included. count: in place of running `processor`. The aspect
    ratio stays. Pictures whose share is all they have are returned as they are.
    """
    budget = check_budget(budget)
    for name, value in (("density", density), ("least", least)):
        if not 0 <= value <= 1:
            raise OptionError(f"{name}={value!r} is not between 0 and 1.")
    count = token_counter(processor) if count is None else count
    sizes = [count(image) for image in images]
    if sum(sizes) <= budget:
        return list(images)
    if budget < len(images):
        raise OptionError(f"budget={budget} does not leave a token for each of {len(images)} pictures.")
    weights = [n ** (1 - density) * distinct_patches(image) ** density for n, image in zip(sizes, images, strict=True)]
    fair = share_between(budget, sizes, [1] * len(sizes), sizes)
    base = [max(1, math.floor(least * n)) for n in fair]
    shares = share_between(budget, weights, base, sizes)
    out, spare = [], 0
    for image, size, wanted in zip(images, sizes, shares, strict=True):
        wanted = min(size, wanted + spare)
        out.append(image if wanted == size else scaled_to(image, count, wanted))
        spare += shares[len(out) - 1] - count(out[-1])
    return out


def distinct_patches(image: Image.Image) -> float:
    """Effective number of different patches on a picture, from 1 (plain) on: the participation ratio of their spectrum,
    measured from their mean, on a view of at most 512 pixels.
    """
    view = image.convert("RGB")
    view.thumbnail((VIEW, VIEW))
    pixels = torch.from_numpy(np.asarray(view, dtype=np.float32) / 255)  # (H, W, 3)
    rows, cols = (max(1, side // PATCH) for side in pixels.shape[:2])
    high, wide = pixels.shape[0] // rows, pixels.shape[1] // cols
    cut = pixels[: rows * high, : cols * wide].reshape(rows, high, cols, wide, 3).transpose(1, 2)
    patches = cut.reshape(rows * cols, -1)
    return float(distinct_tokens(patches, patches.mean(0)))


def scaled_to(image: Image.Image, count: Count, wanted: int, nearest: bool = False) -> Image.Image:
    """The picture scaled down, to the size that gives most of `wanted` visual tokens and not more of them; nearest: to
    the one that comes nearest to them.

    Raises OptionError where no size gives so few, as with processors of a fixed number of tokens.
    """
    low, high = 1 / 64, 1.0
    factor = min(max(math.sqrt(wanted / max(count(image), 1)), low), high)
    found = [image]
    for _ in range(STEPS):
        trial = scaled_picture(image, factor)
        found.append(trial)
        got = count(trial)
        if got == wanted:
            break
        low, high = (low, factor) if got > wanted else (factor, high)
        factor = math.sqrt(low * high)
    if min(map(count, found)) >= count(image) > wanted:
        raise OptionError(
            f"this processor makes {count(image)} visual tokens of a picture of any size, so a smaller one does not "
            f"give {wanted}. Take method='pool' for fewer tokens of the same picture, or any method that drops tokens."
        )
    fits = found if nearest else [trial for trial in found if count(trial) <= wanted]
    if not fits:
        least = min(map(count, found))
        raise OptionError(f"no size of this picture gives {wanted} visual tokens; the smallest gives {least}.")
    return min(fits, key=lambda trial: (abs(count(trial) - wanted), -trial.width))


def scaled_picture(image: Image.Image, factor: float) -> Image.Image:
    """The picture with both sides times `factor`, at least LEAST pixels each unless they were fewer."""
    size = (_side(image.width, factor), _side(image.height, factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _side(pixels: int, factor: float) -> int:
    return max(min(LEAST, pixels), round(pixels * factor))
