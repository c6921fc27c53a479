"""Small tasks that the tests of the plug-in write: pictures of drawn scenes, rows, and the YAML that lmms-eval
reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokprune.demo

UTILS = """
from pathlib import Path
from tokprune.evaluation.scoring import score

HERE = Path(__file__).resolve().parent
COLORS = ["red", "blue", "green", "yellow", "purple", "orange", "pink", "cyan"]


def doc_to_messages(doc):
    parts = [{"type": "image", "url": str(HERE / doc["image"])}] if doc["image"] else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


def doc_to_visual(doc):
    from PIL import Image

    return [Image.open(HERE / doc["image"]).convert("RGB")]


def choices(doc):
    return COLORS


def process_results(doc, results):
    return score(results[0], doc["answer"], doc["type"])
"""

GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_messages: !function utils.doc_to_messages
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0}}
process_results: !function utils.process_results
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
"""

CHOOSE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_choice: !function utils.choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def color_examples(count: int) -> list[Any]:
    """Held-out questions about colours, one picture each."""
    return [e for e in tokprune.demo.held_out(7 * count, seed=4) if e.type == "color"][:count]


def write_task(folder: Path, name: str, examples: Sequence[Any], template: str = GENERATE, missing: int = -1) -> None:
    """A task folder; the picture file of row `missing` is not written."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, e in enumerate(examples):
        if i != missing:
            e.image.save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "question": e.question, "answer": e.answer, "type": e.type}
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / f"{name}.yaml").write_text(template.format(name=name))
    (folder / "utils.py").write_text(UTILS)
