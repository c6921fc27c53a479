"""What the commands print: one console, one progress bar, one way to say what was saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tokprune.files import STDOUT, write_json

INTERRUPTED = 130  # exit code


def console_for(quiet: bool = False, json: Path | None = None, width: int = 0) -> Console:
    """Where a command speaks: standard output, or standard error when the JSON goes to standard output.

    width: of tables that go into a file or a pipe, at least.
    """
    console = Console(quiet=quiet, stderr=json == STDOUT)
    if width and not console.is_terminal:
        return Console(quiet=quiet, stderr=json == STDOUT, width=max(console.width, width))
    return console


def say_saved(console: Console, paths: Iterable[Path]) -> None:
    """A line per file."""
    for path in paths:
        if path != STDOUT:
            console.print(f"saved {escape(str(path))}", soft_wrap=True)


def save_json(console: Console, path: Path | None, data: object) -> None:
    """Write plain data where `--json` says, if it does."""
    if path is not None:
        say_saved(console, [write_json(path, data)])


def progress_bar(console: Console, enabled: bool) -> Progress:
    """A bar with the count and both times, which leaves nothing behind."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns, console=console, transient=True, disable=not enabled, redirect_stdout=False, redirect_stderr=False
    )


@contextmanager
def resumable(console: Console) -> Iterator[None]:
    """Let an interruption end the command with a sentence: what was finished inside is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        raise typer.Exit(INTERRUPTED) from None


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", left: int = 1) -> Table:
    """A table for the terminal. left: how many columns are words; the others are numbers."""
    table = Table(title=escape(title) or None, title_justify="left", header_style="bold")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
