"""The tables of docs/serving.md, from benchmarks/results/serving_load.json and serving_clips.json."""

from __future__ import annotations

from typing import Any


def load_table(data: dict[str, Any]) -> str:
    """Requests a second and time to first token, over concurrency and keep ratio."""
    at = {(run["ratio"], run["concurrency"]): run for run in data["runs"]}
    ratios, clients = (list(dict.fromkeys(key[i] for key in at)) for i in (0, 1))
    names = ["unpruned" if ratio == 1 else f"{ratio:.0%} kept" for ratio in ratios]
    heads = [f"{what}, {name}" for what in ("requests/s", "ms to first token") for name in names]
    lines = [f"| at once | {' | '.join(heads)} |", "|---:|" + "---:|" * len(heads)]
    for n in clients:
        rates = [f"{at[ratio, n]['request_throughput']:.2f}" for ratio in ratios]
        waits = ["{median_ttft_ms:.0f} ({p99_ttft_ms:.0f})".format(**at[ratio, n]) for ratio in ratios]
        lines.append(f"| {n} | {' | '.join(rates)} | {' | '.join(waits)} |")
    told = data["settings"]
    tokens = [round(run["total_input_tokens"] / run["completed"]) for run in (at[r, clients[0]] for r in ratios)]
    note = (
        f"To first token: median (99th percentile). `{told['method']}`; prompts of {', '.join(map(str, tokens))} "
        f"tokens, answers of {told['output_len']}. Model `{told['model']}`: {told['note']} Command and machine: "
        "`benchmarks/results/serving_load.json`."
    )
    return "\n".join([*lines, "", note])


def clips_table(data: dict[str, Any]) -> str:
    """Calls of the vision tower over the number of clips that arrive together."""
    at = {(run["way"], run["clips"]): run["tower calls"] for run in data["runs"]}
    ways, counts = (list(dict.fromkeys(key[i] for key in at)) for i in (0, 1))
    lines = [
        f"| calls of the tower for | {' | '.join(f'{n} clips' for n in counts)} |",
        "|---|" + "---:|" * len(counts),
    ]
    lines += [f"| {way} | {' | '.join(str(at[way, n]) for n in counts)} |" for way in ways]
    return "\n".join([*lines, "", "`benchmarks/results/serving_clips.json`."])
