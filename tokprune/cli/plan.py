"""`tokprune plan`: which ratio reaches a latency or memory target on a GPU, by roofline arithmetic."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tokprune.errors import OptionError


def run_plan(
    preset_name: str,
    device_name: str,
    target: str | None,
    limit: float | None,
    ratios: Sequence[float],
    text: int,
    batch: int,
    new_tokens: int,
    compare: bool,
    out: Path | None,
    quiet: bool,
) -> None:
    """Print the estimates and the advice. limit: seconds for ttft and total, GiB for memory."""
    from tokprune.profiling.devices import device
    from tokprune.profiling.plan import Workload, plan
    from tokprune.profiling.presets import preset

    known, place = preset(preset_name), device(device_name)
    if target == "memory" and limit is not None:
        limit *= 2**30
    work = Workload(known.default_size, text=text, new_tokens=new_tokens, batch=batch)
    made = plan(known, place, work, target, limit, ratios=(1.0, *[r for r in ratios if r < 1]), compare=compare)  # type: ignore[arg-type]
    console = Console(quiet=quiet)
    table = Table(
        title=f"{known.name} on {place.name}, estimated from data sheets", title_justify="left", header_style="bold"
    )
    for column in ("keep ratio", "visual tokens", "vision", "prefill", "TTFT", "decode", "total", "memory", "bound by"):
        table.add_column(column, justify="right")
    for ratio, e in made.rows:
        ms = [f"{1e3 * seconds:.1f} ms" for seconds in (e.vision, e.prefill, e.ttft, e.decode, e.total)]
        table.add_row(f"{ratio:g}", str(e.visual), *ms, f"{e.memory / 2**30:.2f} GiB", e.bound)
    console.print(table)
    for line in made.advice:
        console.print(f"- {line}")
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(made.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot write {out}: {error}") from error
        console.print(f"saved {out}", soft_wrap=True)
