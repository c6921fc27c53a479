"""What tokprune costs, section by section, each against its target; docs/performance.md is made of the results."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # scripts of benchmarks/ import one another by their bare names
