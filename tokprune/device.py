"""Where a loop runs: as a Triton kernel on a CUDA device, as plain torch operations everywhere else."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])


@functools.cache
def installed() -> bool:
    """Whether Triton is there. Its compiler for ROCm counts as none: nothing here was tried with it."""
    return torch.version.hip is None and find_spec("triton") is not None


def runs_kernels(x: Tensor) -> bool:
    """Whether a kernel can take this tensor: a real one on a CUDA device, outside `torch.compile`, which fuses by
    itself.
    """
    return x.is_cuda and type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling() and installed()


def with_kernel(module: str) -> Callable[[F], F]:
    """Decorator: on a CUDA device, the function of this name in `tokprune.ops.kernels.<module>` runs instead.

    Both answer alike, so that a missing Triton needs no word. A kernel returns None for sizes that it does not take. If
    it fails (a compiler that does not know the card, say), the plain form answers, with one warning that shows the
    error; that kernel is not tried again in this process.
    """

    def decorate(plain: F) -> F:
        failed: list[Exception] = []  # of this process: a compiler that fails once fails every time, after seconds

        @functools.wraps(plain)
        def choose(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if failed or not runs_kernels(x):
                return plain(x, *args, **kwargs)
            try:
                kernel = getattr(importlib.import_module(f"tokprune.ops.kernels.{module}"), plain.__name__)
                with torch.no_grad(), torch.cuda.device(x.device):
                    found = kernel(x, *args, **kwargs)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                failed.append(error)
                warnings.warn(
                    f"the Triton kernel of {plain.__name__} does not run here ({type(error).__name__}: {error}); plain "
                    "torch operations choose the same tokens, more slowly. Please report this with your card and the "
                    "versions of torch and Triton.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                found = None
            return plain(x, *args, **kwargs) if found is None else found

        return cast(F, choose)

    return decorate
