"""Which versions of vLLM the pruned models are written for."""

from __future__ import annotations

import re

from tokprune.errors import UnsupportedModelError, install_line

TESTED = (0, 32), (0, 33)
"""Minor versions of vLLM: `make serve-test` runs the first; the second has the same files, as far as we use them."""


def check_version(installed: str | None = None) -> None:
    """Refuse a vLLM whose models and processors may have other methods than those that we override."""
    if installed is None:
        import vllm

        installed = str(vllm.__version__)
    found = re.match(r"(\d+)\.(\d+)", installed)
    minor = tuple(int(part) for part in found.groups()) if found else None
    if minor is None or not TESTED[0] <= minor <= TESTED[-1]:
        span = " to ".join(".".join(map(str, version)) for version in (TESTED[0], TESTED[-1]))
        raise UnsupportedModelError(
            f"vLLM {installed} is installed; tokprune's models for vLLM are written for {span}, and each minor version "
            f"so far has moved something. Run: {install_line('vllm')}"
        )
