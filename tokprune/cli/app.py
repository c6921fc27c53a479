"""The commands; each is a function in a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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


class Commands(TyperGroup):
    """The list of commands in --help, each with its whole first sentence; click would cut it at the end of a line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list. ctx, formatter: of click, or of the copy of it that newer versions of typer have."""
        told = [(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(told)


app = typer.Typer(
    name="tokprune",
    cls=Commands,
    help="Run vision-language models on a tenth of their visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich's boxes around the help take as long to import as all the rest
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
