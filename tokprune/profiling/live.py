"""Peak of live tensor bytes on devices whose allocator keeps no count (CPU): what `torch.cuda.max_memory_allocated` is
to a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokprune.types import JsonObject

R = TypeVar("R")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive while the context is open. peak: the most at any moment.

    Each storage counts once, however many views it has. Scratch memory inside one operator is not seen; nor is anything
    that is not a tensor (Python, libraries).
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """existing: tensors that live already, such as weights and inputs; they count from the start."""
        super().__init__()
        self.now = self.peak = 0
        self._held: set[int] = set()
        for tensor in existing:
            self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: JsonObject | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse: its indices and values were counted when they were made
            return
        key = storage._cdata
        if key in self._held:
            return
        self._held.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


def live_peak(call: Callable[[], R], existing: Iterable[Tensor] = ()) -> tuple[R, int]:
    """Run `call()` and return its result with the peak of live tensor bytes, `existing` tensors included."""
    with LiveBytes(existing) as mode:
        result = call()
    return result, mode.peak
