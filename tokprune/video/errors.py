"""What goes wrong with a video itself, as against with how the reader was called."""

from __future__ import annotations

from tokprune.errors import TokpruneError


class VideoError(TokpruneError, RuntimeError):
    """A file that is no video, or whose frames cannot be decoded, or a backend that would return wrong ones."""
