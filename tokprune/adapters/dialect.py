"""How the installed transformers spells what the runtime uses.

transformers renames things between releases (5.24 calls the KV cache `cache` where 5.23 said `past_key_values`). Names
are read from the signatures and output classes at hand, never from a version number; no other module spells them out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

TESTED = ("5.23", "5.24")  # minor versions of transformers that the whole suite passes on
CACHE = ("cache", "past_key_values")  # what the KV cache is called as an argument and in outputs, newest name first


def tested_versions() -> str:
    """The installed transformers and those that are known to work, for messages."""
    import transformers

    return f"transformers {' and '.join(TESTED)}; installed: {transformers.__version__}"


def is_older() -> bool:
    """Whether the installed transformers is older than those that are known to work; methods alone run beside it."""
    import transformers

    def minor(version: str) -> list[int]:
        return [int(part) for part in version.split(".")[:2]]

    return minor(transformers.__version__) < minor(TESTED[0])


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's parameters, `self` and catch-alls left out. Wrapped functions answer for what they wrap."""
    function = inspect.unwrap(function)  # the cache below must hold no model
    return _parameters(getattr(function, "__func__", function))


@functools.lru_cache(512)
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    caught = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = inspect.signature(function).parameters.values()
    return tuple(p.name for p in named if p.kind not in caught and p.name != "self")


def cache_name(function: Callable[..., Any]) -> str | None:
    """What `function` calls its KV cache argument; None when it names none."""
    named = parameters(function)
    return next((name for name in CACHE if name in named), None)


_cache_name = functools.lru_cache(512)(cache_name)
"""The same of a class's forward, which holds no model."""


@functools.lru_cache(None)
def library_cache_name() -> str:
    """What generate() of the installed transformers calls the KV cache."""
    from transformers import GenerationMixin

    return cache_name(GenerationMixin.prepare_inputs_for_generation) or CACHE[0]


def cache_in(call: Mapping[str, Any]) -> Any:
    """The KV cache among keyword arguments, by whichever name; None when there is none."""
    return next((call[name] for name in CACHE if call.get(name) is not None), None)


def swap_cache(call: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The same keyword arguments with another KV cache, under the name that they use."""
    name = next((name for name in CACHE if name in call), None) or library_cache_name()
    return {**call, name: cache}


def as_cache(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """`cache` as a keyword argument of `function`, under the name that it uses."""
    return {cache_name(function) or library_cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The KV cache in a model's output, by whichever name; None when it holds none.

    Asks the class for its fields: outputs answer to a name of the past with a deprecation warning.
    """
    fields = getattr(type(output), "__dataclass_fields__", {})
    return next((getattr(output, name) for name in CACHE if name in fields), None)


def bind(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name, the KV cache under the name that its forward uses."""
    forward = type(module).forward
    call = dict(kwargs)
    if args:
        call = dict(_signature(forward).bind_partial(module, *args, **kwargs).arguments)
        call.pop("self", None)
        call.update(call.pop("kwargs", {}))
    name = _cache_name(forward)
    if name is not None and name not in call:
        for old in CACHE:
            if old in call:
                call[name] = call.pop(old)
    return call


@functools.lru_cache(512)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def arguments_from(call: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """What `function` names of the arguments in `call`, None where there is none; the KV cache by its own name for
    it."""
    return {name: cache_in(call) if name in CACHE else call.get(name) for name in parameters(function)}


def logical_length(cache: Any) -> int:
    """Prompt columns that a KV cache stands for; a pruned one answers with those of the whole prompt."""
    return 0 if cache is None else int(cache.get_seq_length())
