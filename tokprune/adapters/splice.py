"""The former place of the encoder stage; its names live in `tokprune.runtime.encoder` now."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    value = getattr(importlib.import_module("tokprune.runtime.encoder"), name)
    warnings.warn(
        f"tokprune.adapters.splice.{name} is tokprune.runtime.encoder.{name} now.", DeprecationWarning, stacklevel=2
    )
    return value
