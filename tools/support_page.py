"""docs/support.md: what runs on each model type, from the census' record."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tokprune.serving.plugin import ARCHITECTURES

COLUMNS = {
    "image": "image",
    "video": "video",
    "encoder": "encoder",
    "connector": "connector",
    "decoder": "decoder",
    "cache": "cache",
    "serving": "serving",
    "cls_attention": "`cls_attention`",
    "received_attention:-1": "`received_attention`",
    "keys:-1": "`keys`",
    "encoder_features": "`encoder_features`",
}
"""What the census records, and how the page calls it."""


def of_state(data: dict[str, Any], state: str) -> list[str]:
    """Model types in a state."""
    return [name for name, row in data["types"].items() if row["state"] == state]


def cell(name: str, row: dict[str, Any], column: str) -> str:
    """yes, no, or a dash where a type has no such thing."""
    if column in ("image", "video"):
        return "yes" if column in row["kinds"] else "–"
    if column == "connector":
        return "yes"
    if column == "serving":
        return "yes" if MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(name) in ARCHITECTURES else "–"
    return "yes" if row["reach"][column] == "" else "no"


def numbers(data: dict[str, Any]) -> str:
    """One sentence for the top of the README."""
    works, refused, no_vlm = (len(of_state(data, s)) for s in ("works", "refused", "not a VLM"))
    open_ones = len(of_state(data, "untested"))
    return (
        f"Of the {len(data['types'])} multimodal model types of transformers {data['transformers']}, **{works} work** "
        f"(proven by brute force on tiny models), {refused} are refused by `apply()` with the reason and what to do "
        f"instead, {no_vlm} see no pictures, {open_ones} are untested: [docs/support.md](docs/support.md)."
    )


def support_page(data: dict[str, Any]) -> str:
    """The page."""
    works = of_state(data, "works")
    rows = data["types"]
    known = {"image", "video", "connector", "serving", *(c for name in works for c in rows[name]["reach"])}
    columns = [c for c in COLUMNS if c in known]
    lines = [
        "# What runs on which model",
        "",
        f"Made by `make docs` from benchmarks/results/census.json (`{data['command']}`, "
        f"{data['environment']['machine']}, commit {data['commit']}); do not edit.",
        "",
        numbers(data).replace(": [docs/support.md](docs/support.md)", ""),
        "",
        "**Works** means, on a tiny random-weight model made from the type's config: ratio 1 and `remove()` are "
        "bit-identical; the logits of the pruned model equal a brute-force reference at every kept prompt token and in "
        "each decode step, for both position policies, in a batch of two, with several pictures, with clips where the "
        "type has them, and beside a prompt of words. No real checkpoint was run. A stage or signal is **yes** where "
        "it was applied and ran (`tome`, `fastv`, `dycoke_cache`), **no** where it is refused; the reasons stand "
        "below. What the encoder, decoder and cache stages compute is proven on the families of the README alone. "
        "`received_attention` and `keys` are of the last block. **serving**: the [plug-in for vLLM](serving.md) serves "
        "the type's checkpoints pruned.",
        "",
        "| type | " + " | ".join(COLUMNS[c] for c in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    lines += [f"| `{name}` | " + " | ".join(cell(name, rows[name], c) for c in columns) + " |" for name in works]
    lines += ["", "## Refused", "", "| type | why | instead |", "|---|---|---|"]
    lines += [f"| `{n}` | {rows[n]['why']} | {rows[n]['instead']} |" for n in of_state(data, "refused")]
    lines += ["", "## Not a VLM", "", ", ".join(f"`{n}`" for n in of_state(data, "not a VLM")) + "."]
    if of_state(data, "untested"):
        lines += ["", "## Untested", "", ", ".join(f"`{n}`" for n in of_state(data, "untested")) + "."]
    lines += ["", "## Why a stage or signal is missing", ""]
    for name in works:
        why = why_not(rows[name])
        lines += [f"- `{name}`: {why}"] if why else []
    return "\n".join(lines) + "\n"


def why_not(row: dict[str, Any]) -> str:
    """The reasons of one type, equal ones once."""
    reasons: dict[str, list[str]] = {}
    for kind, found in row["kinds"].items():
        for positions, reason in found.get("refused", {}).items():
            reasons.setdefault(reason, []).append(f'positions="{positions}" ({kind})')
    for column, reason in row["reach"].items():
        if reason:
            name = COLUMNS[column].strip("`")
            general = reason.replace(f"'{column}'", "it")  # the same sentence for each signal
            reasons.setdefault(general, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
