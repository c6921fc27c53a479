"""What the makers of tokprune run and users do not need: not in the wheel, run from the root of a checkout."""
