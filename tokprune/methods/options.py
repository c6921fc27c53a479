"""Options of a method: type, range and choices are declared once, at the field, and checked in one place for all.

    alpha: float = option(0.5, low=0, high=1)          # a plain `alpha: float = 0.5` takes any finite number
    mode: Literal["sample", "pool"] = "sample"          # choices
    seed: Seed = 0                                      # a type with its range

`Method.__post_init__` calls `check_options`, so that a wrong value is refused when the method is built, by its name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import MISSING, dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tokprune.errors import OptionError, nearest
from tokprune.registry import get_method

KEY = "tokprune.option"  # of a field's metadata


@dataclass(frozen=True)
class Limits:
    """What an option may be beyond its type.

    low, high: bounds that are allowed themselves; above, below: bounds that are not. They hold for every number in the
    value, such as each member of a tuple; an option that is a method takes the name of one. choices: the allowed
    strings, where a Literal cannot list them. filled: an empty tuple is refused. block: a block of the vision tower.
    example: what an error tells to write, else the default. hint: what an error adds.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    filled: bool = False
    block: bool = False
    example: object = None
    hint: str = ""

    def hold(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def range(self) -> str:
        """The bounds in words, with a space before them; empty where there are none."""
        left, right = self._bound(self.low, self.above, "["), self._bound(self.high, self.below, "]")
        if left and right:
            return f" in {left[1]}{left[0]}, {right[0]}{right[1]}"
        if left:
            return f" {'of at least' if left[1] == '[' else 'above'} {left[0]}"
        return f" {'of at most' if right[1] == ']' else 'below'} {right[0]}" if right else ""

    @staticmethod
    def _bound(closed: float | None, opened: float | None, bracket: str) -> tuple[str, str] | None:
        if closed is not None:
            return f"{closed}", bracket
        return None if opened is None else (f"{opened}", {"[": "(", "]": ")"}[bracket])


Compat = Literal["corrected", "published"]
"""The corrected behaviour, or that of the published code with its defects."""
Seed = Annotated[int, Limits(low=-(2**63), high=2**63 - 1)]
"""What starts a random generator."""
Block = Annotated[int | float, Limits(block=True)]
"""A block of the vision tower: its 0-based number, a negative one from the end, or a fraction of the depth in (0, 1).
"""


def option(default: Any = MISSING, *, factory: Any = MISSING, **limits: Any) -> Any:
    """A dataclass field with limits; the keywords are the fields of `Limits`. Without a default (or `factory` of one)
    it must be given.
    """
    metadata = {KEY: Limits(**limits)}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


class Misfit(ValueError):
    """A value that is not of its option's kind."""


@functools.cache
def kinds(cls: type) -> dict[str, tuple[object, Limits]]:
    """Annotated type and limits of each option of a method class."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise OptionError(
            f"{cls.__name__}: an annotation cannot be read ({error}); import that name where the method is defined, "
            f"not under TYPE_CHECKING, so that options can be checked."
        ) from error
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return {f.name: (hints[f.name], f.metadata.get(KEY, Limits())) for f in fields if f.init}


def check_options(method: Any) -> None:
    """Refuse any option that is not of its declared kind; lists become tuples, whole numbers floats where floats are
    due.
    """
    for name, (kind, limits) in kinds(method.__class__).items():
        value = getattr(method, name)
        try:
            object.__setattr__(method, name, fitted(kind, value, limits))
        except Misfit:
            raise refusal(method, name, value, kind, limits) from None


def fitted(kind: object, value: object, limits: Limits) -> object:
    """`value` as its annotation wants it; raises Misfit where it is nothing of the kind."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own = next((a for a in args[1:] if isinstance(a, Limits)), limits)
        return _block(value) if own.block else fitted(args[0], value, own)
    if origin in (Union, types.UnionType):
        return _first_that_fits(args, value, limits)
    if origin is Literal:
        return _chosen(args, value)
    if kind in (int, float):
        return _number(kind, value, limits)
    if kind is str:
        return _chosen(limits.choices, value) if limits.choices else _instance(str, value)
    if origin is tuple:
        return _tuple(args, value, limits)
    if isinstance(value, str) and isinstance(kind, type) and isinstance(getattr(kind, "stage", None), str):
        return _instance(kind, get_method(value))
    expected = object if kind is Any else origin or kind
    return _instance(expected, value) if isinstance(expected, type) else value


def _first_that_fits(kinds_: tuple[object, ...], value: object, limits: Limits) -> object:
    for kind in kinds_:
        try:
            return fitted(kind, value, limits)
        except Misfit:
            continue
    raise Misfit


def _chosen(choices: tuple[object, ...], value: object) -> object:
    """The choice that equals `value` and is of its type: True is not 1, and 1.0 is not, either."""
    for choice in choices:
        whole = (
            isinstance(choice, int)
            and isinstance(value, Integral)
            and isinstance(choice, bool) == isinstance(value, bool)
        )
        if (whole or (isinstance(choice, str) and isinstance(value, str))) and value == choice:
            return choice
    raise Misfit


def _number(kind: type, value: object, limits: Limits) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise Misfit
    number: int | float
    try:
        number = int(value) if kind is int else float(value)  # type: ignore[call-overload]
    except OverflowError:
        raise Misfit from None
    if (kind is int and not -(2**63) <= number < 2**63) or not limits.hold(number):  # tensors hold 64 bits
        raise Misfit
    return number


def _block(value: object) -> int | float:
    """A block's number or relative depth, also as a string such as "-2" or "0.348"."""
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        except ValueError:
            raise Misfit from None
    if isinstance(value, Integral):
        return int(_number(int, value, Limits()))
    return _number(float, value, Limits(above=0, below=1))


def _tuple(args: tuple[object, ...], value: object, limits: Limits) -> tuple[object, ...]:
    if not isinstance(value, tuple | list) or (limits.filled and not value):
        raise Misfit
    members = [args[0]] * len(value) if args[1:] == (Ellipsis,) else list(args)
    if len(members) != len(value):
        raise Misfit
    return tuple(fitted(kind, v, limits) for kind, v in zip(members, value, strict=True))


def _instance(kind: type, value: object) -> object:
    if not isinstance(value, kind) or (kind is not bool and kind is not object and isinstance(value, bool)):
        raise Misfit
    return value


WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
BLOCK = "{} of the vision tower (0-based, negative from the end, or a fraction of the depth in (0, 1))"


def described(kind: object, limits: Limits, many: bool = False) -> str:
    """An annotation with its limits in words, for errors and pages: "a number in [0, 1)", "None or a whole number".

    many: in the plural, for the members of a tuple.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own = next((a for a in args[1:] if isinstance(a, Limits)), limits)
        return BLOCK.format("blocks" if many else "a block") if own.block else described(args[0], own, many)
    if origin in (Union, types.UnionType):
        parts = sorted(args, key=lambda a: a is not type(None))  # None first
        return " or ".join(dict.fromkeys(described(a, limits, many) for a in parts))
    if origin is Literal or (kind is str and limits.choices):
        return f"one of {', '.join(map(str, args or limits.choices))}"
    if origin is tuple:
        count = "" if args[1:] == (Ellipsis,) else f"{len(args)} "
        return f"a {'non-empty ' if limits.filled else ''}tuple of {count}{described(args[0], limits, many=True)}"
    if kind in WORDS:
        word = WORDS[kind].removeprefix("a ") + "s" if many else WORDS[kind]
        return word + (limits.range() if kind in (int, float) else "")
    if isinstance(stage := getattr(kind, "stage", None), str):
        return f"a method of the {stage} stage"
    return f"a {getattr(origin or kind, '__name__', kind)}"


def refusal(method: Any, name: str, value: object, kind: object, limits: Limits) -> OptionError:
    """The error for an option of the wrong kind: what was given, what is allowed, what to type."""
    cls = type(method)
    info = vars(cls).get("info")
    owner = getattr(info, "name", cls.__name__)
    default = next(f for f in dataclasses.fields(cls) if f.name == name).default
    example = limits.example if limits.example is not None else default
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    choices = [c for c in _choices(kind, limits) if isinstance(c, str)]
    close = nearest(value, choices) if isinstance(value, str) and choices else ""
    write = "" if close or example is MISSING else f" Write {name}={example!r}."
    hint = f" {limits.hint}" if limits.hint else ""
    return OptionError(f"{owner}: {name}={shown} is not {described(kind, limits)}.{close}{write}{hint}")


def _choices(kind: object, limits: Limits) -> tuple[object, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return limits.choices or tuple(c for a in get_args(kind) for c in _choices(a, limits))
