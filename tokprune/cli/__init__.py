"""The command line: `tokprune …`. Thin; every command is a function of the package underneath."""

from __future__ import annotations

import errno
import os
import sys

# What the system says when standard output takes no more: a full disk, a quota, a closed pipe.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO)


def main() -> None:
    """Entry point of the console script: errors of tokprune end with a sentence, not a traceback."""
    from tokprune.cli.app import app
    from tokprune.errors import TokpruneError

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk can still be told of
    except TokpruneError as error:
        _say(str(error))
        sys.exit(2)
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        if error.errno != errno.EPIPE:
            _say(f"cannot write the output: {error.strerror}.")
        sys.exit(2)


def _say(text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
