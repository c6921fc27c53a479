"""A pruning set-up as versioned JSON, so that a run can be repeated from a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.budget import check_budget, check_ratio
from tokprune.errors import BudgetError, OptionError, unknown
from tokprune.methods.base import Method
from tokprune.registry import get_method

TYPE, VERSION = "tokprune.PruneConfig", 1
POSITIONS = ("auto", "keep", "compact")


def method_to_dict(method: Method) -> dict[str, Any]:
    """A method as {"name": ..., "options": {...}}; options that are methods themselves are nested."""
    options = {}
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        options[f.name] = method_to_dict(value) if isinstance(value, Method) else value
    return {"name": method.info.name, "options": options}


def method_from_dict(data: Any) -> Method:
    """The method that `method_to_dict` wrote."""
    if not isinstance(data, dict) or "name" not in data:
        raise OptionError(f'a method is written as {{"name": ..., "options": {{...}}}}, not {data!r}.')
    options = {}
    for key, value in data.get("options", {}).items():
        if isinstance(value, dict) and "name" in value:
            value = method_from_dict(value)
        elif isinstance(value, list):
            value = tuple(value)
        options[key] = value
    return get_method(data["name"], **options)


@dataclass(frozen=True)
class PruneConfig:
    """What to prune by: the methods (one per stage), how much to keep, and which positions the kept tokens get.

    Exactly one of ratio (share of visual tokens kept) and budget (tokens per image or video) is set.
    """

    methods: tuple[Method, ...]
    ratio: float | None = None
    budget: int | None = None
    positions: str = "auto"
    query: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.methods:
            raise OptionError("no method given; name one, such as method='divprune'.")
        if self.ratio is not None and self.budget is not None:
            raise BudgetError(f"both ratio={self.ratio!r} and budget={self.budget!r} given; choose one.")
        if self.ratio is None and self.budget is None:
            raise BudgetError(
                "neither ratio nor budget given; write ratio=0.1 to keep 10 % of the visual tokens, or budget=64."
            )
        if self.ratio is not None:
            object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if self.budget is not None:
            object.__setattr__(self, "budget", check_budget(self.budget))
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        stages = [m.stage for m in self.methods]
        for stage in stages:
            if stages.count(stage) > 1:
                raise OptionError(
                    f"two methods for the stage {stage!r}: {', '.join(m.info.name for m in self.methods)}; give one per stage."
                )

    @staticmethod
    def build(
        method: str | Method | Sequence[str | Method],
        ratio: float | None = None,
        budget: int | None = None,
        positions: str = "auto",
        query: str | Sequence[str] | None = None,
        **options: Any,
    ) -> PruneConfig:
        """The config that `apply` makes from its arguments; options go to the one method that is named."""
        given = [method] if isinstance(method, str | Method) else list(method)
        if options and (len(given) != 1 or not isinstance(given[0], str)):
            raise OptionError(
                f"options {sorted(options)} need one method given by name; build the others yourself: "
                "method=[tokprune.get_method('divprune'), ...]."
            )
        methods = []
        for m in given:
            if isinstance(m, Method):
                methods.append(m)
            elif isinstance(m, str):
                methods.append(get_method(m, **options))
            else:
                raise OptionError(f"method is a name or a method object, not {type(m).__name__}: {m!r}.")
        question = query if query is None or isinstance(query, str) else tuple(query)
        return PruneConfig(tuple(methods), ratio, budget, positions, question)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with type and version."""
        return {
            "type": TYPE,
            "version": VERSION,
            "methods": [method_to_dict(m) for m in self.methods],
            "ratio": self.ratio,
            "budget": self.budget,
            "positions": self.positions,
            "query": list(self.query) if isinstance(self.query, tuple) else self.query,
        }

    @staticmethod
    def from_dict(data: Any) -> PruneConfig:
        """The config that `to_dict` wrote; refuses other types, newer versions and unknown fields."""
        if not isinstance(data, dict) or data.get("type") != TYPE:
            raise OptionError(f'not a pruning config: expected an object with "type": "{TYPE}".')
        if data.get("version") != VERSION:
            raise OptionError(
                f"config version {data.get('version')!r} is not readable; this tokprune reads version {VERSION}."
            )
        known = {"type", "version", "methods", "ratio", "budget", "positions", "query"}
        for key in data:
            if key not in known:
                raise unknown("config field", key, known)
        query = data.get("query")
        return PruneConfig(
            tuple(method_from_dict(m) for m in data.get("methods", [])),
            data.get("ratio"),
            data.get("budget"),
            data.get("positions", "auto"),
            tuple(query) if isinstance(query, list) else query,
        )

    def save(self, path: str | Path) -> None:
        """Write the config as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> PruneConfig:
        """Read a config that `save` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise OptionError(f"cannot read the pruning config {path}: {error}") from error
        return PruneConfig.from_dict(data)
