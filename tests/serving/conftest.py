"""The environment with vLLM, checkpoints and answers, each made once a session."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.serving.checkpoints import ARCHITECTURES, build

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("TOKPRUNE_SERVE_PYTHON", ROOT / ".serve/bin/python"))
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


def started(*command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A process of the environment with vLLM, its output in `log`."""
    told = {**os.environ, **ENVIRONMENT, **environment}
    with log.open("wb") as out:
        return subprocess.Popen([str(PYTHON), *command], cwd=ROOT, env=told, stdout=out, stderr=out)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The python that has vLLM; without it the test is skipped."""
    if not PYTHON.exists():
        pytest.skip(f"no vLLM: {PYTHON} does not exist; `make serve-test` sets it up")
    return PYTHON


@pytest.fixture(scope="session")
def checkpoints(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny checkpoint of every family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for family in ARCHITECTURES:
        build(family, folder / family)
    yield folder
    torch.set_num_threads(threads)
