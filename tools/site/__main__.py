"""Builds the documentation site, or shows it: `python -m tools.site [build|serve] [MkDocs' options]`."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> None:
    """Hand over to MkDocs, strictly."""
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")  # Material's notice about its successor
    try:
        from mkdocs.__main__ import cli
    except ImportError:
        raise SystemExit("the site needs MkDocs: pip install '.[docs]'") from None
    cli([*(arguments or ["build"]), "--strict"])


if __name__ == "__main__":
    main(sys.argv[1:])
