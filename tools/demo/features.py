"""Stage "cache": the frozen tower's patch features of the scenes, so that the LLM trains without running the tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .data import Split, open_split
from .loop import load
from .networks import new_clip
from .recipe import Recipe
from .workers import Worker

_BATCH = 32


def cache_features(worker: Worker, out: Path, split: Split, recipe: Recipe) -> None:
    """Write `<split>_features.npy` (S, N, D) float16: what the tower's last layer but one says of each patch."""
    scenes = open_split(out, split)
    count = min(len(scenes), recipe.cached_scenes)
    tower = new_clip(recipe).vision_model
    weights = load(out / "clip.pt")
    prefix = "clip.vision_model."
    tower.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    tower.encoder.layers = tower.encoder.layers[:-1]
    tower.to(worker.device, torch.bfloat16).eval()
    path = out / f"{split}_features.npy"
    patches = tower.embeddings.num_patches
    if worker.is_first:
        shape = (count, patches, recipe.vision_width)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    worker.barrier()
    features = np.load(path, mmap_mode="r+")
    with torch.no_grad():
        for start in range(worker.rank * _BATCH, count, worker.count * _BATCH):
            chunk = range(start, min(start + _BATCH, count))
            pixels = scenes.pixels(chunk, worker.device).bfloat16()
            hidden = tower(pixel_values=pixels).last_hidden_state[:, 1:]
            features[start : start + len(chunk)] = hidden.half().cpu().numpy()
    features.flush()
    worker.barrier()


def read_features(out: Path, split: Split) -> np.ndarray:
    """The array that `cache_features` made, memory-mapped."""
    return np.load(out / f"{split}_features.npy", mmap_mode="r")


def take(features: np.ndarray, indices: np.ndarray | range, device: torch.device) -> torch.Tensor:
    """Rows as bfloat16, (B, N, D)."""
    return torch.from_numpy(np.stack([features[i] for i in indices])).to(device, torch.bfloat16)
