"""The commands; each is a function in a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from tokprune.cli.demo import demo
from tokprune.cli.doctor import doctor
from tokprune.cli.eval import evaluate
from tokprune.cli.heatmap import heatmap
from tokprune.cli.methods import methods
from tokprune.cli.own_methods import check_method, new_method
from tokprune.cli.plan import plan
from tokprune.cli.plots import plots
from tokprune.cli.profile import profile
from tokprune.cli.recommend import recommend
from tokprune.cli.reproduce import reproduce
from tokprune.cli.run import run
from tokprune.cli.search import search
from tokprune.cli.show import show

app = typer.Typer(
    name="tokprune",
    help="Run vision-language models on a tenth of their visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
COMMANDS: tuple[Callable[..., None], ...] = (
    *(demo, methods, run, show, heatmap, profile, recommend, search, plan, plots),
    *(reproduce, new_method, check_method, doctor),
)
for command in COMMANDS:
    app.command()(command)
app.command("eval")(evaluate)


def version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        import tokprune

        typer.echo(f"tokprune {tokprune.__version__}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run vision-language models on a tenth of their visual tokens."""
