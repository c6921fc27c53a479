"""The numbers of the clip model's training: sizes, steps, learning rates, seeds."""

from __future__ import annotations

from dataclasses import dataclass, field

from .recipe import StageRecipe


@dataclass(frozen=True)
class Turn:
    """One turn of the learning rate over projector and Llama.

    old_speed: factor on Muon's rate for what comes from the image model; new_speed: for the new layers. questions: per
    clip and step. order, count: how often these types are asked for each time that another is. memory_weight: of the
    memory losses.
    """

    stage: StageRecipe
    old_speed: float
    new_speed: float
    questions: int
    order: int
    count: int
    memory_weight: float


@dataclass(frozen=True)
class ClipRecipe:
    """Everything that determines a run besides the code, the image model and the number of workers."""

    seed: int = 0
    train_takes: int = 8400
    validation_takes: int = 1120
    validation_clips: int = 96
    new_layers: int = 2  # put before the image model's, which they leave as they are when training starts
    align: StageRecipe = field(default_factory=lambda: StageRecipe(400, 48, 2e-3, 0.01, 20))
    answer: Turn = field(
        default_factory=lambda: Turn(StageRecipe(1500, 8, 5e-4, 0.012, 50, save_every=50), 0.3, 0.5, 12, 2, 2, 0.5)
    )
    refine: Turn = field(
        default_factory=lambda: Turn(StageRecipe(500, 8, 4e-4, 0.009, 20, save_every=50), 0.3, 0.5, 12, 3, 3, 0.5)
    )
    # Evenly spread frames a clip, and how often; a step keeps to one. Clips of more than 16 are of the long kind.
    frames: tuple[tuple[int, int], ...] = ((8, 16), (4, 1), (12, 1), (16, 1), (32, 1))
    evaluation_questions: int = 300
    evaluation_long_questions: int = 60


def miniature() -> ClipRecipe:
    """A run of seconds that learns nothing but goes through every stage; for tests."""
    turn = Turn(StageRecipe(2, 2, 1e-3, 0.01, 1, log_every=1, save_every=1), 0.3, 0.5, 3, 2, 2, 0.5)
    return ClipRecipe(
        train_takes=112,
        validation_takes=112,
        validation_clips=2,
        align=StageRecipe(2, 2, 1e-3, 0.01, 1, log_every=1, save_every=1),
        answer=turn,
        refine=turn,
        frames=((4, 1), (8, 1)),
        evaluation_questions=6,
        evaluation_long_questions=4,
    )
