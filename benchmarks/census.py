"""What each model type of transformers can do with tokprune: proven on tiny models, for docs/support.md.

    python -m benchmarks.census --out benchmarks/results/census.json

Takes minutes; types already in the output file are not run again, and a proof that fails ends the run. --only NAME
proves one type and prints its row, without writing anything.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.adapters.reference import samples
from tests.census.census import prove
from tests.census.reach import reach
from tests.census.states import STATES
from tokprune.adapters.known import REFUSED
from tokprune.environment import commit, machine
from tokprune.testing import FAMILIES, build


def row_of(model_type: str) -> dict[str, Any]:
    """The census' row of one type."""
    row: dict[str, Any] = {"state": STATES[model_type]}
    if row["state"] == "refused":
        return row | REFUSED[model_type]._asdict()
    if row["state"] != "works":
        return row
    if model_type not in FAMILIES:
        return row | prove(model_type)
    tiny = build(model_type)
    kinds = {"image": {}, **({"video": {}} if tiny.spec.has_video else {})}
    return row | {"kinds": kinds, "reach": reach(tiny.model, tiny.inputs(samples("image"))), "family": True}


def main() -> None:
    """Prove every type and write the file, or print the row of one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/census.json"))
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if args.only:
        print(json.dumps(row_of(args.only), indent=1))
        return
    data: dict[str, Any] = {
        "type": "tokprune.census",
        "version": 1,
        "command": "python -m benchmarks.census",
        "commit": commit(),
        "transformers": transformers.__version__,
        "environment": machine(),
        "types": {},
    }
    if args.out.exists():
        old = json.loads(args.out.read_text(encoding="utf-8"))
        if old["transformers"] == data["transformers"]:
            data = old
    for name in STATES:
        if name in data["types"]:
            continue
        start = time.perf_counter()
        data["types"][name] = {**row_of(name), "seconds": round(time.perf_counter() - start, 1)}
        print(name, data["types"][name]["state"], data["types"][name]["seconds"], flush=True)
        args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
