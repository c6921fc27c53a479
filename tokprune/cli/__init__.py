"""The command line: `tokprune …`. Thin; every command is a function of the package underneath."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script: errors of tokprune end with a sentence, not a traceback."""
    from tokprune.cli.app import app
    from tokprune.errors import TokpruneError

    try:
        app()
    except TokpruneError as error:
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
