"""The numbers of the training recipe: sizes, steps, learning rates, seeds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageRecipe:
    """One optimisation stage: AdamW with a cosine schedule, Muon for the 2-D matrices of transformer blocks."""

    steps: int
    batch: int  # images per worker and step
    lr: float
    muon_lr: float
    warmup: int
    betas: tuple[float, float] = (0.9, 0.97)
    log_every: int = 25
    save_every: int = 200


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run besides the code and the number of workers."""

    seed: int = 0
    train_scenes: int = 24_000
    validation_scenes: int = 512
    cached_scenes: int = 16_000  # training scenes whose features the stages after "clip" use
    patch: int = 8
    vision_width: int = 128
    vision_layers: int = 5
    vision_mlp: int = 512
    text_width: int = 96
    text_layers: int = 2
    projection: int = 64
    llm_width: int = 128
    llm_layers: int = 4
    llm_mlp: int = 352
    heads: int = 4
    dense: StageRecipe = field(
        default_factory=lambda: StageRecipe(2000, 16, 1e-3, 0.01, 40, betas=(0.9, 0.95), log_every=50)
    )
    clip: StageRecipe = field(default_factory=lambda: StageRecipe(350, 48, 1.2e-3, 0.01, 40, save_every=50))
    align: StageRecipe = field(default_factory=lambda: StageRecipe(300, 24, 2e-3, 0.01, 20))
    qa: StageRecipe = field(default_factory=lambda: StageRecipe(1000, 12, 1.5e-3, 0.02, 100, save_every=100))
    phrases: int = 160  # phrases per worker and step of the clip stage
    questions: int = 16  # questions per image and step of the qa stage
    evaluation_questions: int = 700


def miniature() -> Recipe:
    """A run of seconds that learns nothing but goes through every stage; for tests."""

    def stage(lr: float) -> StageRecipe:
        return StageRecipe(4, 4, lr, 0.01, 2, log_every=1, save_every=2)

    return Recipe(
        train_scenes=16,
        validation_scenes=8,
        cached_scenes=12,
        vision_width=32,
        vision_layers=2,
        vision_mlp=32,
        text_width=32,
        text_layers=1,
        projection=16,
        llm_width=32,
        llm_layers=2,
        llm_mlp=32,
        heads=2,
        dense=stage(1e-3),
        clip=stage(1e-3),
        align=stage(1e-3),
        qa=stage(1e-3),
        phrases=8,
        questions=3,
        evaluation_questions=7,
    )
