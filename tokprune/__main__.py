"""`python -m tokprune` is the command `tokprune`."""

from tokprune.cli import main

main()
