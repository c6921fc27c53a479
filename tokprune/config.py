"""A pruning set-up as versioned JSON, so that a run can be repeated from a file."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokprune.budget import check_budget, check_ratio, keep_count, share_between
from tokprune.errors import BudgetError, OptionError, unknown
from tokprune.files import checked, read_json, write_json
from tokprune.methods.base import ConnectorMethod, Method, shares_budgets
from tokprune.methods.prompt_rule import PROPORTIONAL
from tokprune.registry import get_method, method_class
from tokprune.types import JsonObject

TYPE, VERSION = "tokprune.PruneConfig", 1
POSITIONS = ("auto", "keep", "compact")
PACKINGS = ("padded", "grouped", "auto")
ARGUMENTS = ("ratio", "budget", "positions", "query", "processor", "scorer", "prompt_budget", "prompt_rule", "packing")
"""What `apply` takes beside a method and the method's own options."""


def method_to_dict(method: Method) -> JsonObject:
    """A method as {"name": ..., "options": {...}}; options that are methods themselves, or hold some, are nested."""
    return {
        "name": method.info.name,
        "options": {f.name: _plain(getattr(method, f.name)) for f in dataclasses.fields(method) if f.init},
    }


def method_from_dict(data: object) -> Method:
    """The method that `method_to_dict` wrote."""
    if not isinstance(data, dict) or "name" not in data or not isinstance(data.get("options", {}), dict):
        raise OptionError(f'a method is written as {{"name": ..., "options": {{...}}}}, not {data!r}.')
    for key in data:
        if key not in ("name", "options"):
            raise unknown("field of a method", key, ("name", "options"))
    return get_method(data["name"], **{key: _built(value) for key, value in data.get("options", {}).items()})


def _refuse_typos(options: Iterable[str], methods: Sequence[object]) -> None:
    """Say that an argument of `apply` is misspelled, where a name is nearer to one than to any option of the method."""
    known = [f.name for m in methods if isinstance(m, str) for f in dataclasses.fields(method_class(m)) if f.init]
    for option in options:
        close = difflib.get_close_matches(option.lower(), [*known, *ARGUMENTS, "preset"], n=1, cutoff=0.6)
        if option not in known and close and close[0] in ARGUMENTS:
            raise OptionError(
                f"unknown argument {option!r}. Did you mean {close[0]!r}? Allowed: {', '.join(ARGUMENTS)}, and the "
                f"options of the method."
            )


def _plain(value: object) -> object:
    """An option as plain data."""
    if isinstance(value, Method):
        return method_to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _built(value: object) -> object:
    """An option from plain data: lists are tuples in frozen dataclasses."""
    if isinstance(value, dict) and "name" in value:
        return method_from_dict(value)
    return tuple(_built(v) for v in value) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class PruneConfig:
    """What to prune by: the methods (one per stage), how much to keep, and which positions the kept tokens get.

    Exactly one of ratio (share of visual tokens kept), budget (tokens per image or video) and prompt_budget (tokens of
    a prompt, its text included) is set.
    """

    methods: tuple[Method, ...]
    ratio: float | None = None
    budget: int | None = None
    positions: str = "auto"
    query: str | tuple[str, ...] | None = None
    prompt_budget: int | None = None
    prompt_rule: str | Method | None = None
    """Who shares a prompt budget out over the pictures: a method with a rule for that, or "proportional"; None is the
    method's own rule, where it has one."""
    packing: str = "padded"
    """How rows of a batch that keep different numbers run: "padded" to the longest, "grouped" by like length without
    filler between, or "auto": grouped where that pays."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise OptionError("no method given; name one, such as method='divprune'.")
        object.__setattr__(self, "methods", tuple(self.methods))
        for m in self.methods:
            if not isinstance(m, Method):
                raise OptionError(f"method is a name or a method object, not {type(m).__name__}: {m!r}.")
        amounts = {name: getattr(self, name) for name in ("ratio", "budget", "prompt_budget")}
        given = [f"{name}={value!r}" for name, value in amounts.items() if value is not None]
        if len(given) > 1:
            raise BudgetError(f"{'both ' if len(given) == 2 else ''}{' and '.join(given)} given; choose one.")
        # Such as ToMe's r tokens a block, FastV's layer and share, or DyCoke's share of the keys.
        own_schedule = all(m.stage in ("pixels", "encoder", "decoder", "cache") for m in self.methods)
        if not given and not own_schedule:
            raise BudgetError(
                "neither ratio nor budget given; write ratio=0.1 to keep 10 % of the visual tokens, budget=64 for 64 "
                "of each picture, or prompt_budget=2048 for prompts of at most 2048 tokens, text included."
            )
        if self.ratio is not None:
            object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if self.budget is not None:
            object.__setattr__(self, "budget", check_budget(self.budget))
        self._check_prompt_budget()
        if self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        if self.packing not in PACKINGS:
            raise unknown("packing", self.packing, PACKINGS)
        questions = self.query if isinstance(self.query, tuple) else (self.query,)
        if self.query is not None and not all(isinstance(q, str) for q in questions):
            raise OptionError(f"query={self.query!r} is neither a question nor a list of questions, one per prompt.")
        stages = [m.stage for m in self.methods]
        for stage in stages:
            if stages.count(stage) > 1:
                raise OptionError(
                    f"two methods for the stage {stage!r}: {', '.join(m.info.name for m in self.methods)}; give one "
                    f"per stage."
                )

    def _check_prompt_budget(self) -> None:
        """Refuse a prompt budget, or a rule for one, that nothing could follow."""
        if self.prompt_budget is None:
            if self.prompt_rule is not None:
                raise BudgetError(f"prompt_rule={self.prompt_rule!r} says how a prompt_budget is shared; give one.")
            return
        object.__setattr__(self, "prompt_budget", check_budget(self.prompt_budget, "prompt_budget"))
        deciding = [m for m in self.methods if m.stage in ("frames", "connector")]
        free = [m.info.name for m in deciding if not getattr(m, "exact", True)]
        if not deciding or free:
            why = (
                f"{free[0]!r} keeps as many as it likes" if free else f"{self.methods[0].info.name!r} has no say there"
            )
            raise BudgetError(
                f"prompt_budget={self.prompt_budget} needs a method of the connector or frames stage that keeps "
                f"exactly what it is asked to: {why}. Add one, such as method=[..., 'divprune'], or give a ratio."
            )
        rule = self.prompt_rule
        if isinstance(rule, str) and rule != PROPORTIONAL:
            rule = get_method(rule)
            object.__setattr__(self, "prompt_rule", rule)
        if rule in (None, PROPORTIONAL) or (isinstance(rule, ConnectorMethod) and shares_budgets(rule)):
            return
        raise OptionError(
            f"prompt_rule={rule!r} is no rule for sharing tokens out over pictures; write prompt_rule='proportional', "
            "'adaptive_budget' or 'catp', or give a connector method that overrides `budgets`."
        )

    @staticmethod
    def build(  # what `apply` takes
        method: str | Method | Sequence[str | Method],
        ratio: float | None = None,
        budget: int | None = None,
        positions: str = "auto",
        query: str | Sequence[str] | None = None,
        prompt_budget: int | None = None,
        prompt_rule: str | Method | None = None,
        packing: str = "padded",
        **options: object,
    ) -> PruneConfig:
        """The config that `apply` makes from its arguments; options go to the one method that is named."""
        listed = list(method) if isinstance(method, list | tuple) else [method]
        _refuse_typos(options, listed)
        if options and (len(listed) != 1 or not isinstance(listed[0], str)):
            raise OptionError(
                f"options {sorted(options)} need one method given by name; build the others yourself: "
                "method=[tokprune.get_method('divprune'), ...]."
            )
        methods = tuple(get_method(m, **options) if isinstance(m, str) else m for m in listed)
        question = tuple(query) if isinstance(query, list) else query
        return PruneConfig(methods, ratio, budget, positions, question, prompt_budget, prompt_rule, packing)  # type: ignore[arg-type]

    def count(self, n: int) -> int:
        """How many of `n` visual tokens of an image or video stay; all where neither ratio nor budget is given."""
        if self.prompt_budget is not None:
            raise BudgetError(f"what prompt_budget={self.prompt_budget} leaves a picture depends on its whole prompt.")
        return keep_count(n, self.ratio, self.budget)

    @staticmethod
    def shares(room: int, sizes: Sequence[int], least: Sequence[int], most: Sequence[int]) -> list[int]:
        """How many tokens of each picture or video of one prompt stay, where its prompt budget leaves `room` for them:
        in proportion to `sizes`, none below its `least` or above its `most`.
        """
        return share_between(min(room, sum(most)), sizes, least, most)

    def to_dict(self) -> JsonObject:
        """Plain data with type and version; what older versions do not know stands there only where it was given."""
        data = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if self.prompt_budget is None:
            del data["prompt_budget"], data["prompt_rule"]
        if self.packing == "padded":
            del data["packing"]
        return {"type": TYPE, "version": VERSION, **data}

    @staticmethod
    def from_dict(data: object) -> PruneConfig:
        """The config that `to_dict` wrote; refuses other types, newer versions and unknown fields."""
        data = checked(data, TYPE, VERSION, "a pruning config")
        names = {f.name for f in dataclasses.fields(PruneConfig)}
        for key in data:
            if key not in names | {"type", "version"}:
                raise unknown("config field", key, names | {"type", "version"})
        fields: JsonObject = {key: _built(value) for key, value in data.items() if key in names - {"methods"}}
        fields["methods"] = tuple(method_from_dict(m) for m in data.get("methods", []))
        if isinstance(rule := data.get("prompt_rule"), dict):
            fields["prompt_rule"] = method_from_dict(rule)
        return PruneConfig(**fields)

    def save(self, path: str | Path) -> None:
        """Write the config as JSON."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: str | Path) -> PruneConfig:
        """Read a config that `save` wrote."""
        return PruneConfig.from_dict(read_json(path, "pruning config"))
