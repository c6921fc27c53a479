"""Runs the lmms-eval program with the plug-in, alone or under torchrun, and reads what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ENTRY_POINT = "[lmms_eval.models]\ntokprune = tokprune.evaluation.lmms_plugin:manifests\n"


@dataclass
class Run:
    """A finished run. results: the parsed results file, None when there is none."""

    code: int
    output: str
    results: dict[str, Any] | None
    folder: Path | None

    def samples(self, task: str) -> list[dict[str, Any]]:
        """The rows of a task in order, each with its one answer as `said` and its counts as `tokens`."""
        assert self.folder is not None, self.output[-4000:]
        (file,) = self.folder.glob(f"*_samples_{task}.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:  # lmms-eval writes lists of one as that one
            row["said"], row["tokens"] = (
                v[0] if isinstance(v, list) else v for v in (row["filtered_resps"], row["token_counts"])
            )
        return sorted(rows, key=lambda r: int(r["doc_id"]))


def lmms_eval(
    out: Path, model_args: str, tasks: str, include: Path, processes: int = 1, timeout: float = 900.0, **env: str
) -> Run:
    """`lmms_eval --model tokprune ...` on CPU, offline, each process with one thread."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [
        *(*launcher, "lmms_eval", "--model", "tokprune", "--model_args", model_args, "--tasks", tasks),
        *("--include_path", str(include), "--output_path", str(out), "--log_samples", "--verbosity", "DEBUG"),
    ]
    home = out / "hf"
    settings = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(home),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        **env,
    }
    if not any(p.name == "tokprune" for p in entry_points(group="lmms_eval.models")):
        # Installed before the entry point was there: the folder below stands in for a fresh installation.
        info = out / "plugin" / "tokprune_plugin-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tokprune-plugin\nVersion: 0\n")
        (info / "entry_points.txt").write_text(ENTRY_POINT)
        settings["PYTHONPATH"] = os.pathsep.join([str(info.parent), os.environ.get("PYTHONPATH", "")]).rstrip(":")
    done = subprocess.run(
        command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    files = sorted(out.rglob("*_results.json"))
    results = json.loads(files[-1].read_text()) if files else None
    return Run(done.returncode, done.stdout, results, files[-1].parent if files else None)
