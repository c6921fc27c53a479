"""Keeps what libraries print during a cell out of the terminal and in the cell's folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class CellLog(io.TextIOBase):
    """Stands in for stdout and stderr. What is written goes to the file of the cell in work; between cells it is
    dropped.

    One object for the whole sweep, since loggers keep the stream they first saw. Lines of progress bars, which begin
    with a carriage return, are left out.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Append to the log of the cell in work."""
        if self._file is not None and not text.startswith("\r"):
            with contextlib.suppress(OSError, ValueError):  # a full disk is reported by the store
                self._file.write(text)
                self._file.flush()
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing printed reaches the terminal inside the with block."""
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            yield

    @contextlib.contextmanager
    def to(self, path: Path) -> Iterator[None]:
        """As `quiet`, with what is printed in the file `path`, if that can be opened."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = stack.enter_context(path.open("w", encoding="utf-8"))
            try:
                with self.quiet():
                    yield
            finally:
                self._file = None
