"""Runs the model tests of transformers and timm as they are and with tokprune on, and shows what only fails with it.

    python tests/peers/run.py --transformers DIR --families llava,internvl --ratios 1,0.5
    python tests/peers/run.py --timm DIR --r 0,4

DIR is a source checkout; its tests are run where they are and never copied. Of transformers it should be the installed
version; what fails is run again without tokprune, so that a neighbour tells much, too. The source archive on the
package index holds tests/test_*.py alone; to use it, add tests/models, tests/generation and conftest.py of a checkout
to the unpacked archive. timm's tests need nothing else. Exit code 1 when a test passes plainly and fails with tokprune,
without a reason in expected.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = "llava,llava_next,llava_onevision,qwen2_vl,qwen2_5_vl,qwen3_vl,internvl,gemma3,idefics3,smolvlm"
# These need the hub, other packages, several devices or many minutes, and say nothing about a forward pass.
SKIPPED = "not Integration and not pipeline and not onnx and not executorch and not deepspeed and not torch_export"
TIMM_MODELS = "vit_tiny or vit_small or deit_tiny or eva02_tiny or beit_base or vit_relpos_small"


def outcomes(folder: Path, tests: list[str], options: list[str]) -> dict[str, str]:
    """Test id -> outcome of one pytest run inside `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "outcomes.json"
        paths = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "HF_HUB_OFFLINE": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "tokprune_peers",
            "-p",
            "no:cacheprovider",
            "-o",
            "log_cli=false",
        ]
        command += ["--timeout", "300", "--tb", "line", "--tokprune-out", str(out), *options, *tests]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if not out.exists() or not (found := json.loads(out.read_text())):
            sys.exit(f"no test ran in {folder}: {' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("tokprune ")), flush=True)
    result: dict[str, str] = found
    return result


def compare(what: str, folder: Path, tests: list[str], common: list[str], setting: list[str]) -> list[str]:
    """Tests that fail with tokprune and pass without, printed with the counts; only the failed ones run a second
    time."""
    pruned = outcomes(folder, tests, [*common, *setting])
    failed = sorted(test for test, outcome in pruned.items() if outcome == "failed")
    plain = outcomes(folder, failed, common[:2]) if failed else {}
    worse = [test for test in failed if plain.get(test) == "passed"]
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(Counter(pruned.values()).items()))
    print(f"{what}: {counts}; {len(worse)} fail only with tokprune", flush=True)
    for test in worse:
        print(f"  {test}", flush=True)
    return worse


def main() -> None:
    """Each setting of each family, and of timm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--transformers", type=Path, help="source checkout of transformers")
    parser.add_argument("--timm", type=Path, help="source checkout of timm")
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--ratios", default="1,0.5")
    parser.add_argument("--r", default="0,4", help="tokens that tome merges in a block of timm's models")
    parser.add_argument("-k", default=SKIPPED, help="which tests of transformers, in pytest's words")
    parser.add_argument("--timm-models", default=TIMM_MODELS, help="which models of timm, in pytest's words")
    parser.add_argument("-n", "--workers", default="2")
    asked = parser.parse_args()
    if asked.transformers is None and asked.timm is None:
        parser.error(
            "give a source checkout: --transformers DIR or --timm DIR (make: TRANSFORMERS_SRC=DIR, TIMM_SRC=DIR)"
        )
    worse: list[str] = []
    common = ["-n", asked.workers]
    for family in asked.families.split(",") if asked.transformers else ():
        tests = [f"tests/models/{family}/test_modeling_{family}.py"]
        for ratio in asked.ratios.split(","):
            setting = ["--tokprune-ratio", ratio]
            worse += compare(f"{family} at ratio {ratio}", asked.transformers, tests, [*common, "-k", asked.k], setting)
    for r in asked.r.split(",") if asked.timm else ():
        options, setting = [*common, "-k", asked.timm_models], ["--tokprune-r", r]
        worse += compare(f"timm at r={r}", asked.timm, ["tests/test_models.py"], options, setting)
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
