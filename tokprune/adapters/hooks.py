"""Hooks and stand-in methods on a model's modules, which keep no model alive and leave nothing behind.

A model owns its pruning, the pruning looks at the model through weak references, and a hook on a module looks at the
pruning through one: no cycles, so that `del model` frees the weights at once. Copies and pickles of a model follow the
references.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokprune.adapters.types import Positional


class Ref:
    """A weak reference that deepcopy and pickle follow; called, it gives the object, or None when that is gone."""

    def __init__(self, target: object = None) -> None:
        self._target = (lambda: None) if target is None else weakref.ref(target)

    def __call__(self) -> Any:
        return self._target()

    def __deepcopy__(self, memo: dict[int, object]) -> Ref:
        target = self()
        return Ref(None if target is None else copy.deepcopy(target, memo))

    def __getstate__(self) -> dict[str, object]:
        return {"target": self()}

    def __setstate__(self, state: dict[str, object]) -> None:
        Ref.__init__(self, state["target"])


class PerThread(threading.local):
    """`now`: the state of this thread's call in flight, by `kind()`. Copies of a model start afresh, as threads do.

    There is deliberately no default of the class: torch.compile would read it instead of the thread's own value.
    """

    def __init__(self, kind: Callable[[], Any]) -> None:  # Python calls it in each thread
        self.kind, self.now = kind, kind()

    def __deepcopy__(self, memo: dict[int, object]) -> PerThread:
        return PerThread(self.kind)

    def __reduce__(self) -> tuple[object, ...]:
        return PerThread, (self.kind,)


class Lock:
    """A lock that copies and pickles of a model have for themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[object, ...]:
        return Lock, ()


class Hook:
    """One method of a pruning, as a hook of some module; does nothing once the pruning is gone.

    A copy of the whole model is hooked to the copied pruning, a copy of a mere part of the model to nothing.
    """

    def __init__(self, owner: object, method: str, first: Positional) -> None:
        """owner: has `method`, and `anchor()`, the model it belongs to. first: arguments before torch's own."""
        self.owner, self.method, self.first = Ref(owner), method, first

    def __call__(self, *args: object, **kwargs: object) -> Any:
        owner = self.owner()
        return None if owner is None else getattr(owner, self.method)(*self.first, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> Hook:
        return Hook(_copied(self.owner(), memo), self.method, self.first)


def _copied(owner: Any, memo: dict[int, object]) -> Any:
    """The copy of a pruning whose model is being copied, else None."""
    anchor = None if owner is None else owner.anchor()
    return None if anchor is None or id(anchor) not in memo else copy.deepcopy(owner, memo)


class StandIn:
    """Takes the place of a method of one object: `method(*first, original, ...)` of a pruning answers instead.

    Whatever stood in the object's own __dict__ before comes back in the end. The signature is the original's:
    generate() inspects it.
    """

    def __init__(self, owner: object, method: str, first: Positional, target: object, name: str) -> None:
        self.owner, self.method, self.first = Ref(owner), method, first
        self.target, self.name = Ref(target), name
        self.before = vars(target).get(name)
        self.function: Any = getattr(type(target), name, None)
        self.active = True
        self.__name__ = name

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Any:
        """The method that this one stands in for, bound."""
        if self.before is not None:
            return self.before
        target, function = self.target(), self.function
        # A hook that torch asks for, where there is no method, returns the object.
        return (lambda: target) if function is None else function.__get__(target)

    @property
    def __func__(self) -> object:
        """The original's plain function: what caches of signatures may keep."""
        given = self.function if self.before is None else self.before
        return getattr(given, "__func__", given)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        owner = self.owner() if self.active else None
        if owner is None:
            return self.original(*args, **kwargs)
        return getattr(owner, self.method)(*self.first, self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> StandIn:
        new = copy.copy(self)
        memo[id(self)] = new
        new.owner, new.target = Ref(_copied(self.owner(), memo)), copy.deepcopy(self.target, memo)
        new.before = copy.deepcopy(self.before, memo)
        return new

    def undo(self) -> None:
        """Give the object its own method back; where somebody has wrapped this one since, it passes calls through."""
        self.active = False
        target = self.target()
        if target is None or vars(target).get(self.name) is not self:
            return
        if self.before is None:
            del target.__dict__[self.name]
        else:
            target.__dict__[self.name] = self.before


class PassingStandIn(StandIn):
    """One that most calls pass by: `idle(kwargs)` of the pruning says so, in as little time as Python can do it in."""

    def __call__(self, *args: object, **kwargs: object) -> Any:
        owner: Any = self.owner._target()
        before, target = self.before, self.target._target()
        if owner is None or not self.active or owner.idle(kwargs):
            return self.function(target, *args, **kwargs) if before is None else before(*args, **kwargs)
        # Not as a bound method: torch.compile would write that down by its name, under which this object stands.
        original = functools.partial(self.function, target) if before is None else before
        return getattr(owner, self.method)(*self.first, original, *args, **kwargs)


class _Reached(Exception):
    """A module was reached."""


def input_of(module: nn.Module, run: Callable[[], object]) -> tuple[Positional, dict[str, Any]]:
    """The arguments that `module` is called with when `run` runs, which ends there."""
    seen: list[tuple[Positional, dict[str, Any]]] = []
    thread = threading.get_ident()

    def stop(module: nn.Module, args: Positional, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            seen.append((args, kwargs))
            raise _Reached

    handle = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


class Attachments:
    """Everything that one pruning has put on modules; `remove` takes all of it away."""

    def __init__(self, owner: object) -> None:
        self._owner = Ref(owner)
        self._handles: list[RemovableHandle] = []
        self._stand_ins: list[StandIn] = []

    def __len__(self) -> int:
        return len(self._handles) + len(self._stand_ins)

    def before(self, module: nn.Module, method: str, *first: object, **how: bool) -> RemovableHandle:
        """Call the owner's `method` before `module` runs. how: options of register_forward_pre_hook."""
        hook = Hook(self._owner(), method, first)
        self._handles.append(module.register_forward_pre_hook(hook, **how))
        return self._handles[-1]

    def after(self, module: nn.Module, method: str, *first: object, **how: bool) -> RemovableHandle:
        """Call the owner's `method` after `module` has run. how: options of register_forward_hook."""
        hook = Hook(self._owner(), method, first)
        self._handles.append(module.register_forward_hook(hook, **how))
        return self._handles[-1]

    def instead(self, target: object, name: str, method: str, *first: object, kind: type[StandIn] = StandIn) -> None:
        """Let the owner's `method` answer calls of `target.name`; it gets the original before the call's arguments."""
        stand_in = kind(self._owner(), method, first, target, name)
        target.__dict__[name] = stand_in
        self._stand_ins.append(stand_in)

    def drop(self, handle: RemovableHandle) -> None:
        """Take one hook away."""
        handle.remove()
        self._handles.remove(handle)

    def remove(self) -> None:
        """Take everything away, the last first."""
        for stand_in in reversed(self._stand_ins):
            stand_in.undo()
        for handle in self._handles:
            handle.remove()
        self._handles, self._stand_ins = [], []


class Attached:
    """Base of what hooks onto a model: all of its hooks are put on, or none. Subclasses make `on`, and implement
    `put_on` and `anchor`.
    """

    on: Attachments

    def put_on(self) -> None:
        """Put every hook and stand-in on by `on`."""
        raise NotImplementedError(f"{type(self).__name__} does not implement put_on().")

    def anchor(self) -> Any:
        """The model that this belongs to."""
        raise NotImplementedError(f"{type(self).__name__} does not implement anchor().")

    def install(self) -> None:
        """Put the hooks on; undone completely when one of them fails."""
        try:
            self.put_on()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take every hook and instance attribute away. Calling it twice is harmless."""
        self.on.remove()
