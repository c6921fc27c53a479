"""`python -m tokprune.evaluation.reference --write docs/reference.md` makes the page; --check says whether it is current."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokprune.evaluation.reference import models, page


def main(arguments: list[str] | None = None) -> int:
    """Write, check or print the page."""
    parser = argparse.ArgumentParser(prog="python -m tokprune.evaluation.reference", description=__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", type=Path, metavar="FILE", help="write the page to this file")
    group.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 if this file is not current")
    given = parser.parse_args(arguments)
    text = page(list(models().values()))
    if given.write is not None:
        given.write.write_text(text, encoding="utf-8")
    elif given.check is not None:
        current = given.check.is_file() and given.check.read_text(encoding="utf-8") == text
        if not current:
            print(f"{given.check} is not current; run: python -m tokprune.evaluation.reference --write {given.check}")
        return 0 if current else 1
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
