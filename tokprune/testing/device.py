"""A device without hardware: tensors that behave as if on an accelerator, and a count of what would cost time there.

with StandInDevice() as device:
    model, inputs = device.move(tiny.model), device.put(tiny.inputs(...))
    with device.count() as cost:
        model(**inputs)
print(cost.launches, cost.syncs, cost.uploads)

put(..., 1) and move(..., 1) make a second device. Values are computed on the CPU. What an accelerator refuses is
refused (tensors of two devices in one operation), and what makes the host wait there is counted with the line that did
it.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import tokprune
from tokprune.errors import TokpruneError

M = TypeVar("M", bound=nn.Module)

NAME = "privateuseone"
"""The type of the stand-in: the one that torch keeps free for devices of others."""
DATA_DEPENDENT = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "is_nonzero", "_to_sparse", "_coalesce",
}  # fmt: skip
"""Operations whose result the host needs, or whose shape depends on values: the host waits for an accelerator."""
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether the installed torch can be taught a device from Python."""
PACKAGE = str(Path(tokprune.__file__).parent)


@dataclass
class Cost:
    """What one piece of code would cost on an accelerator, as counts."""

    launches: int = 0
    """Operations that compute on the device; views are none."""
    uploads: int = 0
    """Copies from the host to the device; the host does not wait."""
    by_line: Counter[str] = field(default_factory=Counter)
    """Launches by the innermost line of tokprune, "" for those of others."""
    waits: Counter[str] = field(default_factory=Counter)
    """Times the host waits for the device, by operation and line."""

    @property
    def syncs(self) -> int:
        """Times the host waits for the device."""
        return sum(self.waits.values())


class DeviceTensor(Tensor):
    """A tensor that says it is on a stand-in device; its numbers are those of `host`."""

    host: Tensor
    number: int
    """Of the device."""

    @staticmethod
    def __new__(cls, inner: Tensor, number: int = 0) -> DeviceTensor:
        dense = inner.layout == torch.strided
        place: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()} if dense else {}
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), **place, dtype=inner.dtype, layout=inner.layout, device=torch.device(NAME, number)
        )
        made.host, made.number = inner, number
        return made

    def tolist(self) -> Any:
        """As nested lists: the host waits."""
        return self.cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(func, args, kwargs or {}, None)


def _number(place: object) -> int | None:
    """Which stand-in device a place is, None for the host."""
    found = torch.device(place)  # type: ignore[call-overload]
    return found.index or 0 if found.type == NAME else None


def run(func: Any, args: Any, kwargs: Mapping[str, Any], cost: Cost | None) -> Any:
    """One operation of torch's dispatcher on tensors of host and stand-in device, counted in `cost`."""
    name = func._schema.name.split("::")[1]
    tensors = [x for x in tree_flatten((args, dict(kwargs)))[0] if isinstance(x, Tensor)]
    inside = [x for x in tensors if isinstance(x, DeviceTensor)]
    to, moves = kwargs.get("device"), name in ("_to_copy", "copy_", "to")
    source = inside[0].number if inside else None
    here = source if to is None else _number(to)
    if name == "copy_":
        here, source = (getattr(x, "number", None) for x in args[:2])
    if inside and not moves:
        _refuse_two_devices(name, args, tensors)
    if cost is not None:
        _count(func, name, args, kwargs, (source, here, moves), cost)
    inner_args, inner_kwargs = tree_map(_unwrapped, (tuple(args), dict(kwargs)))
    if to is not None and here is not None:
        inner_kwargs["device"] = torch.device("cpu")
    with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        result = func(*inner_args, **inner_kwargs)
    known = {id(x.host): x for x in inside}  # an operation in place returns what it was given
    return tree_map(lambda x: _wrapped(x, known, here), result)


def _unwrapped(x: Any) -> Any:
    return x.host if isinstance(x, DeviceTensor) else x


def _wrapped(x: Any, known: Mapping[int, DeviceTensor], here: int | None) -> Any:
    if not isinstance(x, Tensor):
        return x
    if id(x) in known:
        return known[id(x)]
    return x if here is None else DeviceTensor(x, here)


def _refuse_two_devices(name: str, args: Any, tensors: list[Tensor]) -> None:
    """As an accelerator does; numbers (0-d) and indices may come from the host, but not from another device."""
    if len(places := {x.number for x in tensors if isinstance(x, DeviceTensor)}) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got those of devices {places}.")
    indices: list[int] = []
    if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple):
        indices = [id(x) for x in args[1] if isinstance(x, Tensor)]
    for x in tensors:
        if not isinstance(x, DeviceTensor) and x.dim() > 0 and id(x) not in indices:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} got one of the host.")


def _count(
    func: Any, name: str, args: Any, kwargs: Any, where: tuple[int | None, int | None, bool], cost: Cost
) -> None:
    """where: the device of what is given, that of the result (None: the host), and whether the operation moves."""
    source, here, moves = where
    if source is None and here is None:
        return
    if moves and (source is None) != (here is None):
        if here is not None:
            cost.uploads += 1
        else:
            cost.waits[f"{name} @ {_line()}"] += 1
        return
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    if alias is not None and not alias.is_write:
        return  # a view
    masked = name in ("index", "index_put", "index_put_") and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )
    unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in DATA_DEPENDENT or masked or unsized:
        cost.waits[f"{name} @ {_line()}"] += 1
    cost.launches += 1
    cost.by_line[_line()] += 1


def _line() -> str:
    """The innermost line of tokprune that is running, "" where none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) and "/testing/" not in name:
            return f"{name[len(PACKAGE) + 1 :]}:{frame.f_lineno} {linecache.getline(name, frame.f_lineno).strip()}"
        frame = frame.f_back
    return ""


_COUNTING: ContextVar[Cost | None] = ContextVar("tokprune_cost", default=None)


@functools.cache
def _register() -> torch.library.Library:
    """Tell torch, once in a process, that a device of this type exists."""
    if not AVAILABLE:
        raise TokpruneError(
            f"torch {torch.__version__} cannot be taught a device from Python; the stand-in device needs a newer one, "
            "such as torch 2.14."
        )
    backend_registration._setup_privateuseone_for_python_backend()
    library = torch.library.Library("aten", "IMPL")  # for what does not pass by a mode: torch.tensor of a list of these

    def number(x: DeviceTensor) -> Any:
        return run(torch.ops.aten._local_scalar_dense.default, (x,), {}, _COUNTING.get())

    library.impl("_local_scalar_dense", number, "PrivateUse1")
    return library


class StandInDevice(TorchDispatchMode):
    """A context in which the stand-in device is there; `device` names it for tensors made inside."""

    device = torch.device(NAME, 0)

    def __init__(self) -> None:
        super().__init__()
        _register()

    def __enter__(self) -> StandInDevice:
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes by here, too
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, _COUNTING.get())

    @contextlib.contextmanager
    def count(self) -> Iterator[Cost]:
        """Count what runs inside."""
        cost = Cost()
        token = _COUNTING.set(cost)
        try:
            yield cost
        finally:
            _COUNTING.reset(token)

    def put(self, value: Any, number: int = 0) -> Any:
        """Tensors in nested containers, copied to a device."""
        return tree_map(lambda x: DeviceTensor(x, number) if type(x) in (Tensor, nn.Parameter) else x, value)

    def move(self, model: M, number: int = 0) -> M:
        """The model with all its tensors that are not on a device yet on this one, in place; for inference."""
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for key, value in held.items():
                    if value is not None and not isinstance(value, DeviceTensor):
                        new = moved.setdefault(id(value), DeviceTensor(value.detach(), number))
                        new._is_param = held is module._parameters  # type: ignore[attr-defined]
                        held[key] = new  # type: ignore[assignment]
        return model
