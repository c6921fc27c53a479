"""Bytes that a choice holds at once, counted at torch's dispatcher."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at the same time; what an operation needs within is not
    seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.is_sparse
        }
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor) or x.is_sparse:
                continue
            storage = x.untyped_storage()
            if storage not in self._seen and id(storage) not in given:
                size = storage.nbytes()
                self._seen[storage] = size
                self.now += size
                weakref.finalize(storage, self._gone, size)
        self.peak = max(self.peak, self.now)
        return out
