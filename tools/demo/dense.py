"""Stage "dense": all but the tower's last layer learn to say, patch by patch, what is there and where it is."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import PatchLabels, augment, open_split
from .loop import Metrics, batch_indices, mean_metrics, run_stage
from .networks import DenseHeads, new_clip, start_locally, start_whitened
from .optimizer import MixedOptimizer
from .recipe import Recipe
from .workers import Worker

# Most patches are background: its classes weigh less.
_BACKGROUND_WEIGHT = {"color": 0.3, "shape": 0.3, "character": 0.15}
_POSITION_BACKGROUND_WEIGHT = 0.3


def dense_loss(outputs: dict[str, Tensor], labels: PatchLabels) -> tuple[Tensor, Metrics]:
    """Cross-entropy on attributes and quadrant, squared error on the owner's centre; accuracies on object patches."""
    total = torch.zeros((), device=labels.color.device)
    metrics: Metrics = {}
    for name, background in _BACKGROUND_WEIGHT.items():
        logits, target = outputs[name], getattr(labels, name)
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[0] = background
        total = total + F.cross_entropy(logits.flatten(0, 1), target.flatten(), weight)
        metrics[name] = float((logits.argmax(-1) == target)[target > 0].float().mean())
    on_object = labels.owner >= 0
    weight = torch.where(on_object, 1.0, _POSITION_BACKGROUND_WEIGHT)  # (B, N)
    weight = weight / weight.sum()
    squared = (outputs["position"] - labels.position).square().mean(-1)
    quadrant = F.cross_entropy(outputs["quadrant"].flatten(0, 1), labels.quadrant.flatten(), reduction="none")
    total = total + (squared * weight).sum() + 0.5 * (quadrant.view_as(weight) * weight).sum()
    metrics["position_error"] = float(squared.detach()[on_object].mean())
    metrics["quadrant"] = float((outputs["quadrant"].argmax(-1) == labels.quadrant)[on_object].float().mean())
    return total, metrics


def train_dense(worker: Worker, out: Path, recipe: Recipe) -> None:
    """Run the stage; the result is `dense.pt` with `tower.*` and `heads.*`."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    train, validation = open_split(out, "train"), open_split(out, "validation")
    tower = new_clip(recipe).vision_model
    start_locally(tower, generator)
    start_whitened(tower, train.pixels(range(min(400, len(train))), torch.device("cpu")), generator)
    tower.encoder.layers = tower.encoder.layers[:-1]  # the last layer serves only [CLS]: the next stage trains it
    modules = nn.ModuleDict({"tower": tower, "heads": DenseHeads(recipe.vision_width)}).to(worker.device)
    parameters = {name: p for name, p in modules.named_parameters() if "post_layernorm" not in name}
    muon = {name: 1.0 for name, p in parameters.items() if ".layers." in name and p.ndim == 2}
    stage = recipe.dense
    optimizer = MixedOptimizer(parameters, muon, stage.lr, stage.muon_lr, stage.betas, worker)
    modules.bfloat16()

    def losses(pixels: Tensor, labels: PatchLabels) -> tuple[Tensor, Metrics]:
        hidden = tower(pixel_values=pixels.bfloat16()).last_hidden_state
        return dense_loss(modules["heads"](hidden[:, 1:]), labels)

    def compute(step: int, rng: random.Random) -> tuple[Tensor, Metrics]:
        indices = batch_indices(step, stage.batch, len(train), recipe.seed, worker)
        pixels = augment(train.pixels(indices, worker.device))
        return losses(pixels, train.patch_labels(indices, worker.device))

    def validate() -> Metrics:
        chunks = (range(i, min(i + 32, len(validation))) for i in range(0, len(validation), 32))
        return mean_metrics(
            losses(validation.pixels(chunk, worker.device), validation.patch_labels(chunk, worker.device))[1]
            for chunk in chunks
        )

    run_stage("dense", out, stage, optimizer, compute, validate, worker, recipe.seed)
