"""Names of methods: where they are registered, looked up and listed; third parties join by an entry point."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from tokprune.errors import OptionError, nearest, unknown
from tokprune.types import Fields

if TYPE_CHECKING:
    from tokprune.methods.base import Method

STAGES = ("pixels", "frames", "encoder", "connector", "decoder", "cache")
ENTRY_POINTS = "tokprune.methods"


@dataclass(frozen=True)
class Checked:
    """What a method was compared with; docs/methods.md prints a row of it.

    repository: the official one as "owner/name", "" when there is no public code. agrees: what came out identical, and
    on which inputs. differs: what does not, and why (a defect mended, ties, noise, a stage that is not ours).
    """

    repository: str = ""
    agrees: str = ""
    differs: str = ""


@dataclass(frozen=True)
class MethodInfo:
    """What a user wants to know of a method before choosing it; the generated tables are made of this.

    complexity is the order of time for N tokens of width D with K kept. memory: the order of what one decision holds
    beside its input, for one picture of more than `tokprune.ops.blocks.WHOLE` tokens; an encoder method's in a block, a
    decoder or cache method's in a layer. "" where it was not counted.
    adaptive: the image, not the user, chooses the count unless an exact budget is asked for. wrapper: it runs another
    method. video: it is made for frames; a single picture is one frame to it.
    checked: the published code it was run against; None for baselines and parts of our own. presets: settings of the
    official code for a model family, by name, where they are not the defaults: get_method(name, preset="qwen2_5_vl").
    """

    name: str
    paper: str
    year: int | None = None
    url: str = ""
    complexity: str = ""
    memory: str = ""
    query_aware: bool = False
    merges: bool = False
    deterministic: bool = True
    adaptive: bool = False
    wrapper: bool = False
    video: bool = False
    checked: Checked | None = None
    presets: Mapping[str, Fields] = field(default_factory=dict)


_methods: dict[str, type[Method]] = {}
_loaded: list[bool] = []
M = TypeVar("M", bound="type[Method]")


def register_method(name: str, *, paper: str, **facts: Any) -> Callable[[M], M]:
    """Class decorator that makes a method known as `name`. facts: the other fields of MethodInfo."""

    def register(cls: M) -> M:
        if not dataclasses.is_dataclass(cls):
            raise OptionError(
                f"{cls.__name__} must be a (frozen) dataclass: put @dataclass(frozen=True) under @register_method."
            )
        if cls.stage not in STAGES:
            raise unknown("stage", cls.stage, STAGES)
        known = _methods.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise OptionError(f"the name {name!r} is taken by {known.__module__}.{known.__qualname__}; choose another.")
        cls.info = MethodInfo(name=name, paper=paper, **facts)
        _methods[name] = cls
        return cls

    return register


def _load() -> None:
    if _loaded:
        return
    package = importlib.import_module("tokprune.methods")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()  # importing the module runs its @register_method
        except Exception as error:  # somebody else's package must not take ours down
            warnings.warn(f"the method plug-in {point.name!r} ({point.value}) cannot be loaded: {error}", stacklevel=2)
    _loaded.append(True)  # last: a module of ours that fails to import fails again at the next look-up, not silently


def method_class(name: str) -> type[Method]:
    """The class registered as `name`; an unknown name answers with the nearest one."""
    _load()
    if not isinstance(name, str):
        raise OptionError(f"a method is named by a string, not {type(name).__name__}: {name!r}.")
    known = _methods.get(name.lower().replace("-", "_"))
    known = known or next((cls for other, cls in _methods.items() if _key(other) == _key(name)), None)
    if known is not None:
        return known
    if papers := by_paper(name):
        raise OptionError(
            f"{name!r} is the name of a paper; what it does is called {' or '.join(map(repr, papers))} here."
        )
    raise unknown("method", name, _methods)


def _key(text: str) -> str:
    """A name without what people write differently: "LLaVA-PruMerge+" is "llavaprumergeplus"."""
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("+", "plus"))


def by_paper(name: str) -> list[str]:
    """Names of the methods whose paper or official code goes by `name`: "videollamb" -> ["scenetilling"]."""
    _load()
    return sorted(other for other, cls in _methods.items() if _key(name) in _paper_keys(cls.info))


def _paper_keys(info: MethodInfo) -> set[str]:
    """What a paper is called: the title, its part before a colon, the repository with and without its owner."""
    short = [part.rpartition("after ")[2] for part in info.paper.split(": ")[:-1]]
    repository = info.checked.repository if info.checked is not None else ""
    return {key for text in (info.paper, *short, repository, repository.rpartition("/")[2]) if (key := _key(text))}


def get_method(name: str, **options: object) -> Method:
    """Build the method `name` with its published defaults, or with `options` in place of some of them.

    preset="<family>" takes the official settings for that family first; other options still win.
    """
    cls = method_class(name)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if "preset" in options and "preset" not in fields:
        options = {**_preset(cls.info, options.pop("preset")), **options}
    allowed = ", ".join(sorted(fields)) or "none"
    for option in options:
        if option not in fields:
            raise OptionError(
                f"method {cls.info.name!r} has no option {option!r}.{nearest(option, fields)} Its options: {allowed}."
            )
    for option, f in fields.items():
        if option not in options and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise OptionError(f"method {cls.info.name!r} needs the option {option!r}. Its options: {allowed}.")
    return cls(**options)


def _preset(info: MethodInfo, preset: object) -> Fields:
    """The options that a preset stands for."""
    if not info.presets:
        raise OptionError(f"method {info.name!r} has no presets: its defaults hold for every family.")
    if not isinstance(preset, str) or preset not in info.presets:
        raise unknown(f"preset of method {info.name!r}", preset, info.presets)
    return info.presets[preset]


def list_methods(stage: str | None = None, *, query_aware: bool | None = None, merges: bool | None = None) -> list[str]:
    """Names of all methods, or of those that match the filters; sorted."""
    _load()
    if stage is not None and stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    return sorted(
        name
        for name, cls in _methods.items()
        if (stage is None or cls.stage == stage)
        and (query_aware is None or cls.info.query_aware == query_aware)
        and (merges is None or cls.info.merges == merges)
    )
