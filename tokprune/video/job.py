"""What one reading carries along: its deadline, what it notices, and the error that ends it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tokprune.errors import TokpruneError


class VideoError(TokpruneError, RuntimeError):
    """A file that is no video, or whose frames cannot be decoded, or a backend that would return wrong ones."""


@dataclass
class Job:
    """limit: seconds, or None. damaged: frames that were decoded with visible errors. notes: warnings."""

    limit: float | None = None
    damaged: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def left(self, default: float) -> float:
        """Seconds until the deadline; `default` is the limit where none was given."""
        return (self.limit if self.limit is not None else default) - (time.monotonic() - self.started)

    def check(self) -> None:
        """Raise VideoError when the time is over."""
        if self.limit is not None and self.left(0.0) <= 0:
            raise VideoError(
                f"decoding was given up after time_limit={self.limit:g} s; allow more, or ask for fewer frames."
            )
