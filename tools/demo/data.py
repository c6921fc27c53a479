"""Training scenes: rendered once into memory-mapped arrays, with what lies under each patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokprune.demo.scenes import (
    CHARACTERS,
    COLOR_NAMES,
    MAX_OBJECTS,
    QUADRANTS,
    SHAPES,
    SIZE,
    VALIDATION_SEED,
    SceneObject,
    make_scene,
)

from .recipe import Recipe
from .workers import Worker

Split = Literal["train", "validation"]
IMAGE_MEAN, IMAGE_STD = 0.5, 0.25
_FIRST_SEED: dict[Split, int] = {"train": 0, "validation": VALIDATION_SEED}


@dataclass(frozen=True)
class PatchLabels:
    """What lies under each patch; class 0 is "nothing"."""

    color: Tensor  # (B, N) 0..8
    shape: Tensor  # (B, N) 0..7
    character: Tensor  # (B, N) 0..16, only on the patches right under the character
    owner: Tensor  # (B, N) index of the object, -1 on the background
    position: Tensor  # (B, N, 2) x and y of the owner's centre (the patch's own on the background), unit variance
    quadrant: Tensor  # (B, N) quarter of the picture of that point


@dataclass(frozen=True)
class SceneSet:
    """The scenes of a split, in the order of their seeds."""

    objects: list[tuple[SceneObject, ...]]
    images: np.ndarray  # (S, H, W, 3) uint8
    labels: np.ndarray  # (S, 4, N) int8: color, shape, character, owner
    centres: np.ndarray  # (S, MAX_OBJECTS, 2) float32 pixels

    def __len__(self) -> int:
        return len(self.objects)

    def pixels(self, indices: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
        """Normalised pictures, (B, 3, H, W)."""
        pictures = torch.from_numpy(np.stack([self.images[i] for i in indices])).to(device)
        return (pictures.permute(0, 3, 1, 2).float() / 255 - IMAGE_MEAN) / IMAGE_STD

    def patch_labels(self, indices: Sequence[int] | np.ndarray, device: torch.device) -> PatchLabels:
        """The targets of the dense losses."""
        rows = np.asarray(indices)
        labels = torch.from_numpy(self.labels[rows].astype(np.int64))  # (B, 4, N)
        owner = labels[:, 3]
        side = round(owner.shape[1] ** 0.5)
        own = (torch.arange(side) + 0.5) * (SIZE / side)
        own = torch.stack(torch.meshgrid(own, own, indexing="xy"), -1).view(1, -1, 2)  # (1, N, 2) x, y
        centres = torch.from_numpy(self.centres[rows])  # (B, MAX_OBJECTS, 2)
        owned = centres.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 2))
        point = torch.where(owner[..., None] >= 0, owned, own)  # (B, N, 2)
        quadrant = 2 * (point[..., 1] > SIZE / 2).long() + (point[..., 0] > SIZE / 2).long()
        position = (point - SIZE / 2) / (SIZE / 12**0.5)  # the spread of a uniform distribution
        color, shape, character = labels[:, 0], labels[:, 1], labels[:, 2]
        targets = (color, shape, character, owner, position, quadrant)
        return PatchLabels(*(target.to(device) for target in targets))

    def attributes(self, indices: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
        """Colour, shape, character and quadrant of every object, (B, MAX_OBJECTS, 4); negative where there is none."""
        table = np.full((len(indices), MAX_OBJECTS, 4), -9, np.int64)
        for row, index in enumerate(indices):
            for column, obj in enumerate(self.objects[index]):
                table[row, column] = attribute_numbers(obj)
        return torch.from_numpy(table).to(device)


def attribute_numbers(obj: SceneObject) -> tuple[int, int, int, int]:
    """Colour, shape, character and quadrant as numbers; the character is -8 when there is none."""
    character = CHARACTERS.index(obj.character) if obj.character else -8
    return COLOR_NAMES.index(obj.color), SHAPES.index(obj.shape), character, QUADRANTS.index(obj.quadrant)


def augment(pixels: Tensor) -> Tensor:
    """Small changes of contrast, brightness, tint and grain, (B, 3, H, W)."""
    shape, device = (len(pixels), 1, 1, 1), pixels.device
    contrast, brightness = 0.08 * torch.randn(shape, device=device), 0.12 * torch.randn(shape, device=device)
    tint = 0.05 * torch.randn(len(pixels), 3, 1, 1, device=device)
    return pixels * (1 + contrast) + brightness + tint + 0.08 * torch.randn_like(pixels)


def render_split(worker: Worker, out: Path, split: Split, recipe: Recipe) -> None:
    """Draw this worker's share of a split into the arrays in `out`."""
    count = recipe.train_scenes if split == "train" else recipe.validation_scenes
    patches = (SIZE // recipe.patch) ** 2
    shapes = {
        "images": ((count, SIZE, SIZE, 3), np.uint8),
        "labels": ((count, 4, patches), np.int8),
        "centres": ((count, MAX_OBJECTS, 2), np.float32),
    }
    paths = {name: out / f"{split}_{name}.npy" for name in shapes}
    if worker.is_first:
        for name, (shape, dtype) in shapes.items():
            np.lib.format.open_memmap(paths[name], mode="w+", dtype=dtype, shape=shape)
    worker.barrier()
    arrays = {name: np.load(path, mmap_mode="r+") for name, path in paths.items()}
    for index in range(worker.rank, count, worker.count):
        scene = make_scene(_FIRST_SEED[split] + index)
        arrays["images"][index] = np.asarray(scene.image)
        arrays["labels"][index] = _label_patches(scene.objects, recipe.patch)
        arrays["centres"][index, : len(scene.objects)] = [(o.x, o.y) for o in scene.objects]
    for array in arrays.values():
        array.flush()
    worker.barrier()


def open_split(out: Path, split: Split) -> SceneSet:
    """The arrays that `render_split` made; the objects are sampled again, which is cheaper than storing them."""
    arrays = [np.load(out / f"{split}_{name}.npy", mmap_mode="r") for name in ("images", "labels", "centres")]
    objects = [make_scene(_FIRST_SEED[split] + index).objects for index in range(len(arrays[0]))]
    return SceneSet(objects, *arrays)


def _label_patches(objects: Sequence[SceneObject], patch: int) -> np.ndarray:
    """Color, shape, character and owner of each patch by its centre, (4, N)."""
    side = SIZE // patch
    centre = (np.arange(side) + 0.5) * patch
    x, y = np.meshgrid(centre, centre)
    labels = np.zeros((4, side, side), np.int8)
    labels[3] = -1
    for index, obj in enumerate(objects):
        color, shape, character, _ = attribute_numbers(obj)
        inside = np.hypot(x - obj.x, y - obj.y) < 0.95 * obj.radius + 1
        labels[0, inside], labels[1, inside], labels[3, inside] = 1 + color, 1 + shape, index
        if obj.character:
            labels[2, (np.abs(x - obj.x) < 6.2) & (np.abs(y - obj.y) < 7.2)] = 1 + character
    return labels.reshape(4, -1)
