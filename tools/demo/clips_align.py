"""Stage "align" of the clip model: the projector learns to name pooled tokens in the words the Llama already knows.

The image model's projector has seen patches, not means of four: through it a pooled token named its object's shape less
than half of the time, and the Llama did not recover from that in 200 steps (one run).
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokprune import demo
from tokprune.demo.scenes import CHARACTERS, COLOR_NAMES, SHAPES

from .align import Alignment
from .clips_data import SHARES, TakeSet, open_takes, tokens_on
from .clips_recipe import ClipRecipe
from .features import take
from .loop import Metrics, batch_indices, mean_metrics, run_stage
from .optimizer import MixedOptimizer
from .workers import Worker

_NOTHING_WEIGHT = 0.2
_NORM_WEIGHT = 0.1
_UNDER_CHARACTER = 11.0  # px from the object's centre to that of a token that holds a good part of the character


def token_labels(takes: TakeSet) -> Tensor:
    """Colour, shape and character of each token of each moment of each take, 0 where there is none, (3, S, 2, N)."""
    side = round(takes.features.shape[2] ** 0.5)
    labels = np.zeros((3, len(takes), len(SHARES), side * side), np.int64)
    for index, one in enumerate(takes.takes):
        for moment, share in enumerate(SHARES):
            obj = one.at(share)
            on = tokens_on(obj, side)
            labels[0, index, moment, on] = 1 + COLOR_NAMES.index(obj.color)
            labels[1, index, moment, on] = 1 + SHAPES.index(obj.shape)
            if obj.character:
                near = tokens_on(obj, side, _UNDER_CHARACTER)
                labels[2, index, moment, near] = 1 + CHARACTERS.index(obj.character)
    return torch.from_numpy(labels)


def naming_loss(model: Alignment, features: Tensor, labels: Tensor, length: float) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the words under each token; (B, N, D) features, (3, B, N) labels; length: wanted of a token."""
    logits, _, lengths = model(features)
    total = _NORM_WEIGHT * (lengths / length).log().square().mean()
    metrics = {"length": float(lengths.detach().mean())}
    for (group, group_logits), target in zip(logits.items(), labels, strict=True):
        weight = torch.ones(group_logits.shape[-1], device=target.device)
        weight[0] = _NOTHING_WEIGHT
        total = total + F.cross_entropy(group_logits.flatten(0, 1), target.flatten(), weight)
        metrics[group] = float((group_logits.argmax(-1) == target)[target > 0].float().mean())
    return total, metrics


@torch.no_grad()
def usual_length(projector: torch.nn.Module, features: Tensor) -> float:
    """Mean length of a projected token, which the Llama is used to."""
    return float(projector(features.float()).norm(dim=-1).mean())


def train_clip_align(worker: Worker, out: Path, recipe: ClipRecipe) -> None:
    """Run the stage; the result is `align.pt` with `projector.*`."""
    torch.manual_seed(recipe.seed + 1)
    train, validation = open_takes(out, "train"), open_takes(out, "validation")
    labels, validation_labels = token_labels(train).flatten(1, 2), token_labels(validation).flatten(1, 2)
    frames = train.features.reshape(-1, *train.features.shape[2:])
    validation_frames = validation.features.reshape(-1, *validation.features.shape[2:])
    image_model = demo.load()[0]
    projector, words = image_model.model.multi_modal_projector, image_model.model.language_model.embed_tokens.weight
    length = usual_length(projector, take(frames, range(64), torch.device("cpu")))
    model = Alignment(projector, words.shape[1], torch.Generator().manual_seed(recipe.seed)).to(worker.device)
    with torch.no_grad():
        model.words.copy_(words)
    model.words.requires_grad_(False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {name: 1.0 for name, p in parameters.items() if p.ndim == 2}
    stage = recipe.align
    optimizer = MixedOptimizer(parameters, muon, stage.lr, stage.muon_lr, stage.betas, worker)
    model.bfloat16()

    def compute(step: int, rng: random.Random) -> tuple[Tensor, Metrics]:
        indices = batch_indices(step, stage.batch, len(frames), recipe.seed + 1, worker)
        wanted = labels[:, torch.from_numpy(np.asarray(indices))].to(worker.device)
        return naming_loss(model, take(frames, indices, worker.device), wanted, length)

    def validate() -> Metrics:
        chunks = [range(i, min(i + 64, len(validation_frames))) for i in range(0, len(validation_frames), 64)]
        return mean_metrics(
            naming_loss(
                model,
                take(validation_frames, chunk, worker.device),
                validation_labels[:, chunk.start : chunk.stop].to(worker.device),
                length,
            )[1]
            for chunk in chunks
        )

    run_stage("align", out, stage, optimizer, compute, validate, worker, recipe.seed + 1)
