"""The synthetic streams of `tokprune.testing`, under the name that the tests of methods use."""

import functools
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tokprune.methods.base import ConnectorMethod
from tokprune.methods.connector.explain import RelevanceNet
from tokprune.registry import get_method
from tokprune.testing.streams import (
    CLIP_WIDTH,
    ENCODER_WIDTH,
    HEAD_WIDTH,
    HEADS,
    LAYOUTS,
    WIDTH,
    changed,
    question,
    signals,
    stream,
)

__all__ = [
    "CLIP_WIDTH",
    "ENCODER_WIDTH",
    "HEADS",
    "HEAD_WIDTH",
    "LAYOUTS",
    "WIDTH",
    "changed",
    "method_with_defaults",
    "question",
    "signals",
    "stream",
    "untrained",
]


@functools.cache
def untrained() -> str:
    """A file with a network of "explain" for these streams, at the same place for all processes of a run."""
    path = Path(tempfile.gettempdir()) / f"tokprune-untrained-{HEADS}-{WIDTH}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RelevanceNet(HEADS, WIDTH)
    own = path.with_suffix(f".{os.getpid()}")
    save_file(network.state_dict(), own)
    own.replace(path)
    return str(path)


def method_with_defaults(name: str) -> ConnectorMethod:
    """A connector method with its defaults; one that is trained for a model with weights for these streams."""
    method = get_method(name, **({"weights": untrained()} if name == "explain" else {}))
    assert isinstance(method, ConnectorMethod)
    return method
