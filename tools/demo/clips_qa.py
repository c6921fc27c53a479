"""Stages "answer" and "refine" of the clip model: projector and Llama learn clips from the frozen tower's features; all
tokens, always.

Besides the answers, the tokens on objects learn to remember (colour and shape of the scene before, how many scenes and
how many objects like this so far): questions about order and counts are then a look-up. Those heads are not part of the
model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokprune import demo
from tokprune.demo.clips_questions import CLIP_QUESTION_TYPES, MOMENT_TYPES, ClipQuestion, ClipQuestionType, ask_clip
from tokprune.demo.scenes import COLOR_NAMES, SHAPES, SceneObject
from tools.demo.vocabulary import CLIP_WORD_IDS

from .clips_data import ComposedClip, TakeSet, open_takes
from .clips_network import ClipModel, start_from
from .clips_recipe import ClipRecipe, Turn
from .loop import Metrics, load, mean_metrics, run_stage
from .networks import use_plain_attention
from .optimizer import MixedOptimizer
from .qa import _PROJECTOR_SPEED, PackedAnswerer, qa_loss
from .workers import Worker

_LENGTH = 12  # of the longest question with "assistant:" and its answer
_MOST = 8  # scenes that are numbered; later ones of long clips are not
# What a token on an object must remember, and how many values it has; 0 of the first two is "no scene before".
_MEMORY = {
    "before_color": 1 + len(COLOR_NAMES),
    "before_shape": 1 + len(SHAPES),
    "scene": _MOST,
    "like_color": _MOST,
    "like_shape": _MOST,
}


class ClipAnswerer(PackedAnswerer):
    """The clip model without its tower, and heads that read what its first layers remember."""

    def __init__(self, model: ClipModel, memory_layer: int) -> None:
        super().__init__(model, CLIP_WORD_IDS, _LENGTH)
        width = self.llama.config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.memory = nn.ModuleDict({name: nn.Linear(width, values) for name, values in _MEMORY.items()})
        self.seen: Tensor | None = None
        model.model.language_model.layers[memory_layer].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.seen = output if isinstance(output, Tensor) else output[0]

    def remembered(self, token_scenes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits of each memory at the M tokens on objects in the last forward pass, and where they are (B, N)."""
        where = token_scenes >= 0
        start = len(self.prefix)
        if self.seen is None:
            raise RuntimeError("remembered() needs a forward pass first")
        hidden = self.norm(self.seen[:, start : start + token_scenes.shape[1]][where])
        return {name: head(hidden).float() for name, head in self.memory.items()}, where


def sample_clip_questions(objects: Sequence[SceneObject], turn: Turn, rng: random.Random) -> list[ClipQuestion]:
    """Questions about one clip, types in random order, skipping what has no unique answer."""
    weighted: list[ClipQuestionType] = [*MOMENT_TYPES]
    if len(objects) <= _MOST:
        over_time: dict[ClipQuestionType, int] = {"order": turn.order, "count": turn.count}
        weighted += [kind for kind, times in over_time.items() for _ in range(times)]
    asked: list[ClipQuestion] = []
    while len(asked) < turn.questions:
        for kind in rng.sample(weighted, len(weighted)):
            question = ask_clip(objects, kind, rng)
            if question is not None and len(asked) < turn.questions:
                asked.append(question)
    return asked


def memories(objects: Sequence[SceneObject]) -> list[list[int]]:
    """For each scene the values of `_MEMORY`; -100 where there is none to learn."""
    rows = []
    for place, obj in enumerate(objects):
        before = objects[place - 1] if place else None
        past = objects[:place]
        row = [
            1 + COLOR_NAMES.index(before.color) if before else 0,
            1 + SHAPES.index(before.shape) if before else 0,
            place,
            sum(o.color == obj.color for o in past),
            sum(o.shape == obj.shape for o in past),
        ]
        rows.append([value if value < size else -100 for value, size in zip(row, _MEMORY.values(), strict=True)])
    return rows


def clip_loss(
    model: ClipAnswerer,
    takes: TakeSet,
    clips: Sequence[ComposedClip],
    questions: Sequence[Sequence[ClipQuestion]],
    memory_weight: float,
    device: torch.device,
) -> tuple[Tensor, Metrics]:
    """The loss of the answers and of what tokens on objects remember."""
    loss, metrics = qa_loss(model, takes.take_features(clips, device), questions)
    token_scenes = takes.token_scenes(clips).to(device)
    logits, where = model.remembered(token_scenes)
    tables = [torch.tensor(memories(takes.objects(clip)), device=device) for clip in clips]
    rows = torch.cat([table[scenes[on]] for table, scenes, on in zip(tables, token_scenes, where, strict=True)])
    for place, (name, values) in enumerate(logits.items()):
        target = rows[:, place]
        known = target >= 0
        loss = loss + memory_weight * F.cross_entropy(values, target, ignore_index=-100)
        metrics[f"memory_{name}"] = float((values.argmax(-1) == target)[known].float().mean())
    return loss, metrics


def _speed(name: str, turn: Turn, new_layers: int) -> float:
    """Factor on Muon's learning rate, 0 for AdamW: what the image model already knows changes slowly.

    At full speed it had forgotten how to read after 100 steps (one run).
    """
    if name.startswith("projector."):
        return turn.old_speed * _PROJECTOR_SPEED
    if name.startswith("memory."):
        return 1.0
    layer = name.removeprefix("llama.layers.").split(".")[0]
    if not layer.isdigit():
        return 0.0
    return turn.new_speed if int(layer) < new_layers else turn.old_speed


def train_clips(worker: Worker, out: Path, recipe: ClipRecipe, name: Literal["answer", "refine"]) -> None:
    """Run one turn; the result is `<name>.pt` with `projector.*`, `llama.*` and the heads. "refine" goes on from
    "answer"."""
    torch.manual_seed(recipe.seed)
    train, validation = open_takes(out, "train"), open_takes(out, "validation")
    generator = torch.Generator().manual_seed(recipe.seed)
    clip_model = start_from(demo.load()[0], recipe.new_layers, generator)
    aligned = {k.removeprefix("projector."): v for k, v in load(out / "align.pt").items() if "projector." in k}
    clip_model.model.multi_modal_projector.load_state_dict(aligned)
    use_plain_attention(clip_model)
    model = ClipAnswerer(clip_model, recipe.new_layers - 1).to(worker.device)
    if name == "refine":
        model.load_state_dict(load(out / "answer.pt"))
    turn = recipe.answer if name == "answer" else recipe.refine
    stage = turn.stage
    parameters = dict(model.named_parameters())
    muon = {
        key: speed for key, p in parameters.items() if p.ndim == 2 and (speed := _speed(key, turn, recipe.new_layers))
    }
    optimizer = MixedOptimizer(parameters, muon, stage.lr, stage.muon_lr, stage.betas, worker)
    model.bfloat16()
    lengths, weights = zip(*recipe.frames, strict=True)

    def compute(step: int, rng: random.Random) -> tuple[Tensor, Metrics]:
        # The same length for all workers, so that none waits; as many frames whatever the length.
        frames = random.Random(f"{name} frames {recipe.seed} {step}").choices(lengths, weights)[0]
        clips = [train.compose(frames, rng) for _ in range(max(1, stage.batch * 8 // frames))]
        questions = [sample_clip_questions(train.objects(clip), turn, rng) for clip in clips]
        loss, metrics = clip_loss(model, train, clips, questions, turn.memory_weight, worker.device)
        if frames != 8:  # the log shows eight frames, which the results are about, and the rest apart
            rest = [v for k, v in metrics.items() if k in CLIP_QUESTION_TYPES]
            metrics = {f"frames_{frames}": sum(rest) / len(rest)}
        return loss, metrics

    def validate() -> Metrics:
        rng = random.Random(f"validation {recipe.seed}")
        clips = [validation.compose(8, rng) for _ in range(recipe.validation_clips)]
        asked = [sample_clip_questions(validation.objects(clip), turn, rng) for clip in clips]
        return mean_metrics(
            clip_loss(model, validation, clips[i : i + 8], asked[i : i + 8], turn.memory_weight, worker.device)[1]
            for i in range(0, len(clips), 8)
        )

    run_stage(name, out, stage, optimizer, compute, validate, worker, recipe.seed)
