"""Code blocks of the pages, and a folder in which they can be followed to the letter without a network or a GPU.

Named checkpoints lie in that folder as `owner/name`, where `from_pretrained` finds the demo VLM. `cuda` becomes `cpu`.
A block under `<!-- not run: reason -->` is left out; `tests/docs/test_blocks.py` counts those.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import tokprune.demo

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>.+?) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SET_UP = ("pip", "git", "cd", "make")


@dataclass(frozen=True)
class Block:
    """A fenced block. kind: what stands behind the fence. why: the reason for not running it, "" if it is run."""

    kind: str
    code: str
    why: str


def blocks(page: str) -> list[Block]:
    """All blocks of a page, named from the root of the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(m["kind"], m["code"], m["why"] or "") for m in FENCE.finditer(text)]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block, comments dropped and continued lines joined."""
    out: list[list[str]] = []
    pending = ""
    for line in block.code.replace("\\\n", " ").splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation that goes on in the next line
            continue
        pending = ""
        while "&&" in words:
            at = words.index("&&")
            out.append(words[:at])
            words = words[at + 1 :]
        out.append(words)
    assert not pending, f"a quotation is not closed: {pending}"
    return [words for words in out if words]


def on_cpu(text: str) -> str:
    """A command or a piece of Python as this machine can run it."""
    return re.sub(r"\bcuda\b", "cpu", text)


def prepare(folder: Path) -> None:
    """Fill `folder` with what pages name: a picture, a clip, the repository's own files, and checkpoints."""
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    shutil.copy(ROOT / "docs/images/scene.png", folder / "photo.jpg")  # Pillow reads what it is, not what it is called
    example = tokprune.demo.held_out_clips(1, folder=folder / "clips")[0]
    shutil.copy(example.path, folder / "clip.mp4")
    (folder / "llava-hf").mkdir()
    (folder / "llava-hf" / "llava-1.5-7b-hf").symlink_to(ROOT / "tokprune/demo/weights")
