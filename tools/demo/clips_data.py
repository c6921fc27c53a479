"""Takes for the clip model: drawn, through H.264 and back, and through the image model's tower once.

Training composes its clips from these, so their number is unlimited although the tower sees each take only twice.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tokprune import demo
from tokprune.demo.clips import FPS, Take, encode, frames_per_scene, make_take, plan_objects
from tokprune.demo.scenes import COLOR_NAMES, SHAPES, SIZE, VALIDATION_SEED, SceneObject

from .clips_recipe import ClipRecipe
from .data import IMAGE_MEAN, IMAGE_STD, Split
from .workers import Worker

POOL = 2  # of LLaVA-NeXT-Video: the mean of 2 x 2 patches
SHARES = (0.2, 0.8)  # the two moments of a take that are kept
_FIRST_SEED: dict[Split, int] = {"train": 0, "validation": VALIDATION_SEED}
_GROUP = 64  # takes that share a file
_KINDS = [(color, shape) for color in COLOR_NAMES for shape in SHAPES]


def take_of(split: Split, index: int) -> Take:
    """The take with this number: all kinds of objects in turn."""
    return make_take(_FIRST_SEED[split] + index, *_KINDS[index % len(_KINDS)])


def through_h264(frames: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The frames as a decoder gives them back, (T, H, W, 3)."""
    import av

    file = io.BytesIO()
    encode(frames, file, FPS)
    file.seek(0)
    container: Any = av.open(file)
    try:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    finally:
        container.close()


def pool(features: Tensor) -> Tensor:
    """(B, N, D) patch features to the (B, N / 4, D) that LLaVA-NeXT-Video projects."""
    side = round(features.shape[1] ** 0.5)
    square = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.avg_pool2d(square, POOL).flatten(2).mT


def feature_tower(device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The image model's tower without its last layer, whose input is what the projector reads."""
    tower = demo.load()[0].model.vision_tower
    tower.encoder.layers = tower.encoder.layers[:-1]
    return tower.to(device, dtype).eval()


@torch.no_grad()
def features_of(tower: torch.nn.Module, frames: NDArray[np.uint8]) -> Tensor:
    """(T, H, W, 3) frames to pooled features (T, N / 4, D), as the clip model computes them."""
    parameter = next(tower.parameters())
    pixels = torch.from_numpy(frames).to(parameter.device).permute(0, 3, 1, 2).float() / 255
    hidden = tower(pixel_values=((pixels - IMAGE_MEAN) / IMAGE_STD).to(parameter.dtype)).last_hidden_state
    return pool(hidden[:, 1:])


def tokens_on(obj: SceneObject, side: int, radius: float | None = None) -> NDArray[np.bool_]:
    """Which of a frame's side x side tokens lie on the object (or within `radius` px of its centre); at least one."""
    width = SIZE / side
    centre = (np.arange(side) + 0.5) * width
    distance = np.hypot(centre[None, :] - obj.x, centre[:, None] - obj.y).ravel()
    return distance <= max(0.8 * obj.radius if radius is None else radius, float(distance.min()))


def cache_takes(worker: Worker, out: Path, split: Split, recipe: ClipRecipe) -> None:
    """Write this worker's share of `<split>_takes.npy` (S, 2, N / 4, D) float16."""
    count = recipe.train_takes if split == "train" else recipe.validation_takes
    tower = feature_tower(worker.device, torch.bfloat16)
    path = out / f"{split}_takes.npy"
    if worker.is_first:
        tokens = (SIZE // 8 // POOL) ** 2
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(count, len(SHARES), tokens, 128))
    worker.barrier()
    features = np.load(path, mmap_mode="r+")
    for start in range(worker.rank * _GROUP, count, worker.count * _GROUP):
        numbers = range(start, min(start + _GROUP, count))
        frames = through_h264(np.concatenate([take_of(split, i).draw(SHARES) for i in numbers]))
        chunks = [features_of(tower, chunk) for chunk in np.array_split(frames, 4)]
        features[start : start + len(numbers)] = (
            torch.cat(chunks).half().cpu().numpy().reshape(len(numbers), *features.shape[1:])
        )
    features.flush()
    worker.barrier()


@dataclass(frozen=True)
class ComposedClip:
    """A clip made of cached takes: which take and which of its moments each frame shows, and which scene it belongs
    to."""

    takes: tuple[int, ...]  # of each scene
    frames: tuple[tuple[int, int, int], ...]  # scene, take, moment


@dataclass(frozen=True)
class TakeSet:
    """The cached takes of a split."""

    split: Split
    features: NDArray[np.float16]  # (S, 2, N, D)

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def takes(self) -> list[Take]:
        """Sampled again, which is cheaper than storing them."""
        return [take_of(self.split, index) for index in range(len(self))]

    @cached_property
    def on_object(self) -> NDArray[np.bool_]:
        """Which tokens lie on the object, (S, 2, N)."""
        side = round(self.features.shape[2] ** 0.5)
        return np.stack([[tokens_on(take.at(share), side) for share in SHARES] for take in self.takes])

    def compose(self, frames: int, rng: random.Random) -> ComposedClip:
        """A clip of so many evenly spread frames; of the long kind from more than 16."""
        long = frames > 16
        scenes = rng.randint(frames // 2, frames) if long else rng.randint(3, min(8, frames))
        takes = tuple(self._pick(kind, rng) for kind in plan_objects(scenes, rng, distinct=long))
        shown = frames_per_scene(scenes, frames, rng)
        order = []
        for scene, (take, count) in enumerate(zip(takes, shown, strict=True)):
            moments = sorted(rng.randrange(len(SHARES)) for _ in range(count))
            order += [(scene, take, moment) for moment in moments]
        return ComposedClip(takes, tuple(order))

    def _pick(self, kind: tuple[str, str], rng: random.Random) -> int:
        first, per_kind = _KINDS.index(kind), len(_KINDS)
        return first + per_kind * rng.randrange((len(self) - first - 1) // per_kind + 1)

    def objects(self, clip: ComposedClip) -> list[SceneObject]:
        """The object of each scene."""
        return [self.takes[take].start for take in clip.takes]

    def take_features(self, clips: Sequence[ComposedClip], device: torch.device) -> Tensor:
        """Features of the clips' frames in turn, (B, T * N, D) bfloat16."""
        rows = np.stack([np.concatenate([self.features[t, m] for _, t, m in clip.frames]) for clip in clips])
        return torch.from_numpy(rows).to(device, torch.bfloat16)

    def token_scenes(self, clips: Sequence[ComposedClip]) -> Tensor:
        """Scene of each token that lies on an object, -1 elsewhere, (B, T * N)."""
        rows = [
            np.concatenate([np.where(self.on_object[t, m], scene, -1) for scene, t, m in clip.frames]) for clip in clips
        ]
        return torch.from_numpy(np.stack(rows))


def open_takes(out: Path, split: Split) -> TakeSet:
    """The takes that `cache_takes` wrote."""
    return TakeSet(split, np.load(out / f"{split}_takes.npy", mmap_mode="r"))
