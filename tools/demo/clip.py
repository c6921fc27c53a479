"""Stage "clip": the whole tower with a small text tower, so that [CLS] means something and patches answer to
phrases."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from tokprune.demo.scenes import CHARACTERS, COLOR_NAMES, QUADRANTS, SHAPES, SceneObject
from tools.demo.vocabulary import BOS, EOS, PAD, WORD_IDS, encode

from .data import SceneSet, attribute_numbers, augment, open_split
from .dense import dense_loss
from .loop import Metrics, batch_indices, load, mean_metrics, run_stage
from .networks import DenseHeads, new_clip
from .optimizer import MixedOptimizer
from .recipe import Recipe
from .workers import Worker

# Which of (colour, shape, character, quadrant) a phrase names, and how often.
_USES = (
    ((1, 1, 0, 0), 6), ((1, 0, 0, 0), 3), ((0, 1, 0, 0), 3), ((0, 0, 1, 0), 5), ((1, 1, 1, 0), 1),
    ((1, 1, 0, 1), 2), ((1, 0, 0, 1), 1), ((0, 1, 0, 1), 1), ((1, 0, 1, 0), 2), ((0, 0, 1, 1), 1),
)  # fmt: skip
_ATTRIBUTE_SIZES = (len(COLOR_NAMES), len(SHAPES), len(CHARACTERS), len(QUADRANTS))
_MAX_WORDS = 61  # with <s> and </s> within the text tower's 64 positions
_CAPTION_SCALE = 20.0
_SIGMOID_WEIGHT = 8.0

Attributes = tuple[int, int, int, int]  # colour, shape, character, quadrant; -1 where a phrase does not say


def phrase_text(attributes: Attributes, rng: random.Random) -> str:
    """Words for a set of attributes: a noun phrase, or a question of the kind the LLM is asked."""
    color = COLOR_NAMES[attributes[0]] if attributes[0] >= 0 else ""
    shape = SHAPES[attributes[1]] if attributes[1] >= 0 else ""
    character = CHARACTERS[attributes[2]].lower() if attributes[2] >= 0 else ""
    noun = f"{color} {shape or 'object'}".strip()
    if attributes[3] >= 0:
        return f"a {noun}{f' with {character}' if character else ''} in the {QUADRANTS[attributes[3]]}"
    if character and not color and not shape:
        options: tuple[str, ...] = (
            f"the letter {character}",
            f"the number {character}",
            f"what color is the object with {character} ?",
            f"what shape is the object with {character} ?",
            f"object with {character}",
        )
    elif character:
        options = (f"a {noun} with {character}",)
    elif color and shape:
        options = (f"a {noun}", f"is there a {noun} ?", f"where is the {noun} ?", noun)
    else:
        question = f"what shape is the {noun} ?" if color else f"what color is the {noun} ?"
        plural = f"{color} objects" if color else f"{shape} shapes"
        options = (
            f"a {noun}",
            question,
            f"which character is on the {noun} ?",
            f"how many {plural} are there ?",
            color or shape,
        )
    return rng.choice(options)


def sample_phrases(scenes: Sequence[Sequence[SceneObject]], count: int, rng: random.Random) -> tuple[Tensor, list[str]]:
    """Phrases about objects of these scenes; a quarter has one attribute changed, which makes hard negatives.

    Returns:
        The attributes (count, 4), -1 where unsaid, and the words.
    """
    masks, weights = zip(*_USES, strict=True)
    table: list[Attributes] = []
    while len(table) < count:
        numbers = attribute_numbers(rng.choice(rng.choice(scenes)))
        mask = rng.choices(masks, weights)[0]
        if mask[2] and numbers[2] < 0:
            continue
        chosen = [number if used else -1 for number, used in zip(numbers, mask, strict=True)]
        if rng.random() < 0.25:
            changed = rng.choice([i for i, used in enumerate(mask) if used])
            chosen[changed] = rng.randrange(_ATTRIBUTE_SIZES[changed])
        table.append((chosen[0], chosen[1], chosen[2], chosen[3]))
    return torch.tensor(table), [phrase_text(attributes, rng) for attributes in table]


def caption(objects: Sequence[SceneObject], rng: random.Random) -> str:
    """All objects of a scene in random order, some with their quadrant."""
    parts = []
    for obj in rng.sample(objects, len(objects)):
        part = f"{obj.color} {obj.shape}"
        part += f" with {obj.character.lower()}" if obj.character else ""
        part += f" in the {obj.quadrant}" if rng.random() < 0.3 else ""
        parts.append(part)
    return " , ".join(parts)


class ContrastiveTower(nn.Module):
    """CLIP, the dense heads, and the scales and offsets of the two sigmoid losses."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.clip: CLIPModel = new_clip(recipe)
        self.heads = DenseHeads(recipe.vision_width)
        self.scales = nn.Parameter(torch.full((2,), math.log(10.0)))  # [CLS], patches
        self.offsets = nn.Parameter(torch.full((2,), -3.0))

    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) to the features the LLM will see (B, N, D), and normalised [CLS] (B, E) and patches (B, N,
        E)."""
        tower, project = self.clip.vision_model, self.clip.visual_projection
        output = tower(pixel_values=pixels, output_hidden_states=True)
        patches = project(tower.post_layernorm(output.last_hidden_state[:, 1:]))
        cls = project(output.pooler_output)
        features = output.hidden_states[-2][:, 1:]
        return features, F.normalize(cls.float(), dim=-1), F.normalize(patches.float(), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised text embeddings (T, E)."""
        rows = [[WORD_IDS[BOS], *encode(text)[:_MAX_WORDS], WORD_IDS[EOS]] for text in texts]
        device = self.scales.device
        ids = torch.full((len(rows), max(map(len, rows))), WORD_IDS[PAD])
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        mask = (ids != WORD_IDS[PAD]).long()
        output = self.clip.text_model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return F.normalize(self.clip.text_projection(output.pooler_output).float(), dim=-1)


def clip_loss(
    model: ContrastiveTower,
    pixels: Tensor,
    scenes: SceneSet,
    indices: Sequence[int] | np.ndarray,
    phrases: int,
    rng: random.Random,
) -> tuple[Tensor, Metrics]:
    """Sigmoid losses of [CLS] and of patches against phrases, captions against pictures, and the dense losses."""
    device = pixels.device
    objects = [scenes.objects[i] for i in indices]
    attributes, texts = sample_phrases(objects, phrases, rng)
    features, cls, patches = model.embed_images(pixels.bfloat16())
    labels = scenes.patch_labels(indices, device)
    total, metrics = dense_loss(model.heads(features), labels)
    phrase = model.embed_texts(texts)  # (M, E); apart from the captions, which need far more padding
    described = model.embed_texts([caption(o, rng) for o in objects])  # (B, E)

    wanted = attributes.to(device)[None, None]  # (1, 1, M, 4)
    present = scenes.attributes(indices, device)[:, :, None]  # (B, O, 1, 4)
    matches = ((wanted == -1) | (wanted == present)).all(-1)  # (B, O, M); places without an object hold -9
    in_scene = matches.any(1).float()  # (B, M)
    scales = model.scales.float().exp()
    cls_logits = cls @ phrase.T * scales[0] + model.offsets[0].float()
    cls_loss = F.binary_cross_entropy_with_logits(cls_logits, in_scene)

    on_patch = torch.cat([matches, torch.zeros_like(matches[:, :1])], 1).float()  # last row: background
    owner = labels.owner.masked_fill(labels.owner < 0, matches.shape[1])
    on_patch = on_patch.gather(1, owner[..., None].expand(-1, -1, phrases))  # (B, N, M)
    patch_logits = patches @ phrase.T * scales[1] + model.offsets[1].float()
    positive = torch.tensor(4.0, device=device)
    patch_loss = F.binary_cross_entropy_with_logits(patch_logits, on_patch, pos_weight=positive)

    similarity = cls @ described.T * _CAPTION_SCALE
    diagonal = torch.arange(len(objects), device=device)
    caption_loss = (F.cross_entropy(similarity, diagonal) + F.cross_entropy(similarity.T, diagonal)) / 2
    total = total + _SIGMOID_WEIGHT * (cls_loss + patch_loss) + 0.5 * caption_loss
    metrics |= {
        "cls_loss": float(cls_loss.detach()),
        "patch_loss": float(patch_loss.detach()),
        "phrase_recall": float((cls_logits > 0)[in_scene > 0].float().mean()),
        "phrase_specificity": float((cls_logits < 0)[in_scene == 0].float().mean()),
        "patch_recall": float((patch_logits > 0)[on_patch > 0].float().mean()),
        "caption_top1": float((similarity.argmax(1) == diagonal).float().mean()),
    }
    return total, metrics


def train_clip(worker: Worker, out: Path, recipe: Recipe) -> None:
    """Run the stage; the result is `clip.pt` with `clip.*` and `heads.*`."""
    torch.manual_seed(recipe.seed + 1)
    train, validation = open_split(out, "train"), open_split(out, "validation")
    model = ContrastiveTower(recipe).to(worker.device)
    dense = load(out / "dense.pt")
    renamed = {name.replace("tower.", "clip.vision_model.", 1): value for name, value in dense.items()}
    if unexpected := model.load_state_dict(renamed, strict=False).unexpected_keys:
        raise ValueError(f"dense.pt does not belong to this recipe: {unexpected}")
    parameters = {name: p for name, p in model.named_parameters() if name != "clip.logit_scale"}
    muon = {name: 1.0 for name, p in parameters.items() if ".layers." in name and p.ndim == 2}
    stage = recipe.clip
    optimizer = MixedOptimizer(parameters, muon, stage.lr, stage.muon_lr, stage.betas, worker)
    model.bfloat16()

    def compute(step: int, rng: random.Random) -> tuple[Tensor, Metrics]:
        indices = batch_indices(step, stage.batch, len(train), recipe.seed + 1, worker)
        pixels = augment(train.pixels(indices, worker.device))
        return clip_loss(model, pixels, train, indices, recipe.phrases, rng)

    def validate() -> Metrics:
        chunks = (range(i, min(i + 64, len(validation))) for i in range(0, len(validation), 64))
        return mean_metrics(
            clip_loss(
                model,
                validation.pixels(chunk, worker.device),
                validation,
                chunk,
                recipe.phrases,
                random.Random(f"validation {chunk.start}"),
            )[1]
            for chunk in chunks
        )

    run_stage("clip", out, stage, optimizer, compute, validate, worker, recipe.seed + 1)
