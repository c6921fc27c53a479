"""What a sweep consists of: the cells (a task by a method at a keep ratio), the settings they share, and their keys."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokprune.budget import check_ratio
from tokprune.config import POSITIONS, PruneConfig, method_from_dict, method_to_dict
from tokprune.errors import OptionError, unknown
from tokprune.methods.base import Method
from tokprune.registry import method_class
from tokprune.scaling import RESIZE
from tokprune.types import Fields, JsonObject

BASELINE = "none"
OPTION = "option."


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. method: a name, or names of several stages joined by "+". ratio: keep ratio."""

    task: str
    method: str
    ratio: float

    @property
    def baseline(self) -> bool:
        """Whether this is the unpruned run of its task."""
        return self.method == BASELINE

    @property
    def methods(self) -> list[str]:
        """The names that `method` joins."""
        return self.method.split("+")

    @staticmethod
    def of(data: Fields) -> Cell:
        """The cell that a result, a failure or its times belong to."""
        return Cell(data["task"], data["method"], data["ratio"])

    def __str__(self) -> str:
        return f"{self.task}, {self.method}" + ("" if self.baseline else f" at {self.ratio:g}")


def check_counts(options: object, *names: str) -> None:
    """Refuse fields that are given and no whole numbers from 1 on."""
    for name in names:
        value = getattr(options, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise OptionError(f"{name}={value!r} is not a count; write a whole number from 1 on.")


@dataclass(frozen=True)
class SweepSettings:
    """What all cells of a sweep share and what may change an answer; two cells with different settings never mix.

    limit: questions per task, None for all. frames: video frames per question, None for the model's own number.
    prompts: whose wording of the questions, a model name of lmms-eval such as qwen3_vl; None for the tasks' default.
    model_args: further arguments of the lmms-eval model `tokprune`, such as {"processor.max_pixels": 602112};
    "option.hired.alpha" goes to the method of that name.
    """

    model: str
    limit: int | None = None
    batch_size: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0
    frames: int | None = None
    positions: str = "auto"
    prompts: str | None = None
    model_args: JsonObject = field(default_factory=dict)
    configs: dict[str, list[JsonObject]] = field(default_factory=dict)
    """Methods with all their options, as `tokprune.config.method_to_dict` writes them, by what a cell calls them."""
    prompt_budgets: dict[str, JsonObject] = field(default_factory=dict)
    """Fields of PruneConfig for the cells that prune to a prompt budget, whose ratio is 1 until it is measured."""

    def __post_init__(self) -> None:
        check_counts(self, "limit", "batch_size", "frames")
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)

    def to_dict(self) -> JsonObject:
        """Plain data; configs and prompt budgets only where there are any, so that older results keep their keys."""
        later = ("configs", "prompt_budgets")
        return {name: value for name, value in dataclasses.asdict(self).items() if value or name not in later}

    def options(self, method: str) -> JsonObject:
        """The options of model_args that belong to the methods that `method` names, as "<method>.<field>"."""
        names = method.split("+")
        fields = {k.removeprefix(OPTION): v for k, v in self.model_args.items() if k.startswith(OPTION)}
        return {k: v for k, v in fields.items() if k.partition(".")[0] in names}


@dataclass(frozen=True)
class Sample:
    """One question of a cell. task: the leaf task it belongs to. scores: metric -> number, those that are numbers.

    costs: what answering it took, in numbers that do not depend on the clock (tokens, FLOPs).
    """

    task: str
    doc_id: int
    answer: str
    target: str
    scores: dict[str, float]
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def id(self) -> tuple[str, int]:
        """What pairs the same question in two runs."""
        return self.task, self.doc_id


@dataclass(frozen=True)
class CellResult:
    """What a cell found.

    metrics: the task's aggregated numbers; main: the one to show. higher_is_better: of main. versions: of the tasks.
    costs: means that do not depend on the clock (visual tokens kept and total, FLOPs). timing: what does, such as
    ttft_ms and seconds: kept apart, so that results.json of a repeated run is the same file.
    """

    cell: Cell
    metrics: dict[str, float]
    main: str
    samples: tuple[Sample, ...]
    higher_is_better: bool = True
    costs: dict[str, float] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    versions: JsonObject = field(default_factory=dict)

    def to_dict(self) -> JsonObject:
        """Plain data without samples and timing."""
        return {
            **dataclasses.asdict(self.cell),
            "metrics": self.metrics,
            "main": self.main,
            "higher_is_better": self.higher_is_better,
            "costs": self.costs,
            "versions": self.versions,
            "questions": len(self.samples),
        }

    @staticmethod
    def from_dict(data: Fields, samples: Sequence[Fields], timing: Mapping[str, float] | None = None) -> CellResult:
        """The result that `to_dict` wrote, with its samples and times."""
        return CellResult(
            cell=Cell.of(data),
            metrics=dict(data["metrics"]),
            main=data["main"],
            samples=tuple(Sample(**s) for s in samples),
            higher_is_better=data["higher_is_better"],
            costs=dict(data["costs"]),
            timing=dict(timing or {}),
            versions=dict(data["versions"]),
        )


def plan(tasks: Sequence[str], methods: Sequence[str], ratios: Sequence[float]) -> tuple[Cell, ...]:
    """The cells of a sweep, task by task: the baseline `none` once at ratio 1, the others at each ratio, falling.

    Raises OptionError for an empty list, an unknown method or a ratio that is none.
    """
    for what, values, example in (
        ("task", tasks, "--tasks tokprune_scenes"),
        ("method", methods, "--methods none,random,divprune"),
        ("ratio", ratios, "--ratios 0.5,0.1"),
    ):
        if not values and not (what == "ratio" and set(methods) == {BASELINE}):
            raise OptionError(f"no {what} given; write for example {example}.")
    for name in (part for method in methods if method != RESIZE for part in method.split("+")):
        method_class(name)
    kept = sorted({check_ratio(r) for r in ratios}, reverse=True)
    cells = []
    for task in dict.fromkeys(tasks):
        cells += [Cell(task, BASELINE, 1.0)] if BASELINE in methods else []
        cells += [Cell(task, m, r) for m in dict.fromkeys(methods) if m != BASELINE for r in kept]
    return tuple(cells)


def config_cells(
    cells: Sequence[Cell], config: PruneConfig, settings: SweepSettings
) -> tuple[list[Cell], SweepSettings]:
    """A cell per task for a config, and the settings that know it by the name that these cells have.

    cells: the others, whose tasks it joins and whose names it must not take. config: with a ratio or a prompt budget.
    """
    name = " with ".join(m.label for m in config.methods)
    if config.prompt_budget is not None:
        name += f", prompts of {config.prompt_budget}"
    while name in {cell.method for cell in cells}:
        name += " (config)"
    configs = {**settings.configs, name: [method_to_dict(m) for m in config.methods]}
    budgets = dict(settings.prompt_budgets)
    if config.prompt_budget is not None:
        budgets[name] = {key: value for key, value in config.to_dict().items() if key.startswith("prompt_")}
    ratio = 1.0 if config.ratio is None else config.ratio
    joined = [Cell(task, name, ratio) for task in dict.fromkeys(cell.task for cell in cells)]
    return joined, dataclasses.replace(settings, configs=configs, prompt_budgets=budgets)


def config_of(cell: Cell, settings: SweepSettings) -> PruneConfig:
    """How a cell prunes whose name stands in `settings.configs`."""
    methods, budget = build_methods(cell.method, settings), settings.prompt_budgets.get(cell.method)
    if budget is None:
        return PruneConfig(methods, cell.ratio, positions=settings.positions)
    rule = budget["prompt_rule"]
    rule = method_from_dict(rule) if isinstance(rule, dict) else rule
    return PruneConfig(methods, positions=settings.positions, prompt_budget=budget["prompt_budget"], prompt_rule=rule)


def build_methods(method: str, settings: SweepSettings) -> tuple[Method, ...]:
    """The methods that a cell names, with the sweep's options and seed; none for the baseline."""
    from tokprune.evaluation.lmms_options import pruning_config

    if method == RESIZE:
        return ()
    if method in settings.configs:
        return tuple(method_from_dict(data) for data in settings.configs[method])
    config = pruning_config(method, ratio=1.0, options=settings.options(method), seed=settings.seed)
    return () if config is None else config.methods


def key(cell: Cell, settings: SweepSettings) -> str:
    """The name of a cell's folder: readable, and different as soon as any setting is."""
    data = json.dumps({"cell": dataclasses.asdict(cell), "settings": settings.to_dict()}, sort_keys=True)
    digest = hashlib.sha256(data.encode()).hexdigest()[:10]
    words = re.sub(r"[^A-Za-z0-9_.+-]+", "_", f"{cell.task}-{cell.method}-{cell.ratio:g}")
    return f"{words[:80]}-{digest}"
