"""Stage "align": the projector learns to put each patch near the embeddings of the words for it; no LLM yet.

Without this stage the LLM spends most of its training on naming anything in the picture, before it uses the question.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokprune.demo.scenes import CHARACTERS, COLOR_NAMES, QUADRANTS, SHAPES
from tools.demo.vocabulary import WORD_IDS, WORDS

from .data import PatchLabels, open_split
from .features import read_features, take
from .loop import Metrics, batch_indices, mean_metrics, run_stage
from .networks import new_llava
from .optimizer import MixedOptimizer
from .recipe import Recipe
from .workers import Worker

_SCALE = 20.0  # of cosines: a patch with four words has at most 0.5 with each
_NORM = 2.0  # wanted length of a projected patch, for words of length 1
_NORM_WEIGHT = 0.1
_NOTHING_WEIGHT = 0.2
_GROUPS: dict[str, tuple[str, ...]] = {
    "color": COLOR_NAMES,
    "shape": SHAPES,
    "character": tuple(character.lower() for character in CHARACTERS),
}


class Alignment(nn.Module):
    """Projector, word embeddings, and for each group of words the logit of "none of them"."""

    def __init__(self, projector: nn.Module, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.projector = projector
        self.words = nn.Parameter(_spread_rows(len(WORDS), width, generator))
        self.nothing = nn.Parameter(torch.full((len(_GROUPS),), _SCALE / 4))

    def forward(self, features: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(B, N, D) features to logits by group with "nothing" first, the quadrant's logits, and the lengths (B, N).

        The Llama's first step is to normalise, so what must be near the words is the direction.
        """
        projected = self.projector(features).float()
        named = F.normalize(projected, dim=-1) @ F.normalize(self.words.float(), dim=-1).T * _SCALE  # (B, N, V)
        logits = {}
        for place, (group, words) in enumerate(_GROUPS.items()):
            nothing = self.nothing[place].float().expand(*named.shape[:2], 1)
            logits[group] = torch.cat([nothing, named[..., [WORD_IDS[word] for word in words]]], -1)
        return logits, named[..., [WORD_IDS[word] for word in QUADRANTS]], projected.norm(dim=-1)


def _spread_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit rows (count, width), orthogonal where there is room: no two words look alike, as input or as output."""
    rows = torch.randn(count, width, generator=generator)
    return torch.linalg.qr(rows.T)[0].T.contiguous() if count <= width else F.normalize(rows, dim=-1)


def align_loss(model: Alignment, features: Tensor, labels: PatchLabels) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the words under each patch; the quadrant only where there is an object."""
    logits, quadrant_logits, lengths = model(features)
    on_object = labels.owner >= 0
    total = F.cross_entropy(quadrant_logits[on_object], labels.quadrant[on_object])
    total = total + _NORM_WEIGHT * (lengths / _NORM).log().square().mean()
    metrics = {"length": float(lengths.detach().mean())}
    metrics |= {"quadrant": float((quadrant_logits.argmax(-1) == labels.quadrant)[on_object].float().mean())}
    for group, group_logits in logits.items():
        target = getattr(labels, group)
        weight = torch.ones(group_logits.shape[-1], device=target.device)
        weight[0] = _NOTHING_WEIGHT
        total = total + F.cross_entropy(group_logits.flatten(0, 1), target.flatten(), weight)
        metrics[group] = float((group_logits.argmax(-1) == target)[target > 0].float().mean())
    return total, metrics


def train_align(worker: Worker, out: Path, recipe: Recipe) -> None:
    """Run the stage; the result is `align.pt` with `projector.*` and `words`."""
    torch.manual_seed(recipe.seed + 2)
    train, validation = open_split(out, "train"), open_split(out, "validation")
    cached, cached_validation = read_features(out, "train"), read_features(out, "validation")
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    projector = new_llava(recipe).model.multi_modal_projector
    model = Alignment(projector, recipe.llm_width, generator).to(worker.device)
    parameters = dict(model.named_parameters())
    muon = {name: 1.0 for name, p in parameters.items() if name.startswith("projector.") and p.ndim == 2}
    stage = recipe.align
    optimizer = MixedOptimizer(parameters, muon, stage.lr, stage.muon_lr, stage.betas, worker)
    model.bfloat16()

    def compute(step: int, rng: random.Random) -> tuple[Tensor, Metrics]:
        indices = batch_indices(step, stage.batch, len(cached), recipe.seed + 2, worker)
        labels = train.patch_labels(indices, worker.device)
        return align_loss(model, take(cached, indices, worker.device), labels)

    def validate() -> Metrics:
        chunks = (range(i, min(i + 64, len(cached_validation))) for i in range(0, len(cached_validation), 64))
        return mean_metrics(
            align_loss(
                model, take(cached_validation, chunk, worker.device), validation.patch_labels(chunk, worker.device)
            )[1]
            for chunk in chunks
        )

    run_stage("align", out, stage, optimizer, compute, validate, worker, recipe.seed + 2)
