"""Does lmms-eval run end to end with the plug-in, offline? Its own exit code is 0 after a crash, so its files are
checked.

    python -m tools.eval_smoke --out out/eval_smoke

One run of the lmms-eval program: the demo VLM, pruned, on both offline tasks. The exit code is 1 when anything is
missing or
implausible: results, rows, answers, scores well above guessing, the measured number of visual tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokprune.evaluation import OFFLINE_TASKS, task_folder

METHOD, RATIO = "divprune", 0.25
LIMIT = 42  # questions per task: a multiple of both tasks' numbers of types
#: What a guesser who knows the answers' frequencies gets is below 0.25 on both tasks.
LEAST = {"tokprune_scenes": 0.6, "tokprune_clips": 0.35}
TAIL = 40  # lines of lmms-eval's output to show when it failed


def command(out: Path, limit: int, device: str) -> list[str]:
    """The line that a user would type, with this Python."""
    return [
        *(sys.executable, "-m", "lmms_eval", "--model", "tokprune", "--device", device, "--batch_size", "7"),
        *("--model_args", f"pretrained=demo,method={METHOD},ratio={RATIO}"),
        *("--include_path", str(task_folder()), "--tasks", ",".join(OFFLINE_TASKS), "--limit", str(limit)),
        *("--output_path", str(out), "--log_samples", "--verbosity", "DEBUG"),
    ]


def run(out: Path, limit: int, device: str, timeout: float) -> list[str]:
    """Run lmms-eval; returns what is wrong with it, nothing when all is well."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.rglob("*_results.json"))
    with tempfile.TemporaryDirectory() as cache:  # the data sets are read from the package, not from an old cache
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": cache}
        try:
            done = subprocess.run(
                command(out, limit, device),
                env={**os.environ, **offline},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return [f"lmms-eval had not finished after {timeout:.0f} s"]
    (out / "lmms_eval.log").write_text(done.stdout, encoding="utf-8")
    made = sorted(set(out.rglob("*_results.json")) - before)
    wrong = [] if done.returncode == 0 else [f"lmms-eval ended with exit code {done.returncode}"]
    if not made:
        wrong.append("lmms-eval wrote no results")
        if "not found in available models" in done.stdout or "Unknown model" in done.stdout:
            wrong.append("it does not know the model 'tokprune': install this package again (pip install -e .)")
    else:
        wrong += check(made[-1], limit)
    if wrong:
        print("\n".join(done.stdout.splitlines()[-TAIL:]), file=sys.stderr)
    return wrong


def check(results: Path, limit: int) -> list[str]:
    """What is wrong with a results file and the samples beside it."""
    from tokprune.budget import kept

    data = json.loads(results.read_text(encoding="utf-8"))
    wrong = []
    for task in OFFLINE_TASKS:
        accuracy = data.get("results", {}).get(task, {}).get("accuracy,none")
        if not isinstance(accuracy, float) or accuracy < LEAST[task]:
            wrong.append(f"{task}: accuracy is {accuracy}, expected at least {LEAST[task]}")
        samples = list(_samples(results, task))
        if [s["doc_id"] for s in samples] != list(range(limit)):
            wrong.append(f"{task}: {len(samples)} of {limit} rows were answered")
        if any(not "".join(s["filtered_resps"]).strip() for s in samples):  # a string, or a list of one
            wrong.append(f"{task}: there are empty answers")
    costs = data.get("throughput", {})
    # 256 visual tokens a picture and 8 x 64 a clip, in equal numbers.
    expected = (kept(256, RATIO) + kept(512, RATIO)) / 2
    if costs.get("avg_kept_tokens") != expected:
        wrong.append(f"{costs.get('avg_kept_tokens')} visual tokens were kept on average, expected {expected}")
    for name in ("avg_ttft_ms", "avg_flops"):
        if not costs.get(name):
            wrong.append(f"throughput.{name} was not measured")
    return wrong


def _samples(results: Path, task: str) -> Iterator[dict[str, Any]]:
    stamp = results.name.removesuffix("_results.json")
    for file in results.parent.glob(f"{stamp}_samples_{task}.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        yield from sorted(rows, key=lambda r: r["doc_id"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, report, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.eval_smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/eval_smoke"), help="where lmms-eval writes")
    parser.add_argument("--limit", type=int, default=LIMIT, help="questions per task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds")
    args = parser.parse_args(arguments)
    wrong = run(args.out, args.limit, args.device, args.timeout)
    for line in wrong:
        print(f"failed: {line}", file=sys.stderr)
    if not wrong:
        print(f"lmms-eval ran {' and '.join(OFFLINE_TASKS)} with {METHOD} at {RATIO:g}; results in {args.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
