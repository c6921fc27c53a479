"""A forward that was given pictures and that nothing is dropped from, although that was asked for, says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tokprune.adapters.base import Adapter, flatten
from tokprune.adapters.types import EncoderOutput
from tokprune.errors import UnsupportedModelError
from tokprune.runtime.records import StreamRecord


def check_columns(
    adapter: Adapter,
    encoded: Mapping[str, EncoderOutput],
    placeholders: Mapping[str, Tensor],
    may_drop: Callable[[int], bool],
) -> None:
    """Raise where a modality has features but no column of the prompt, so that nothing of it would be dropped.

    placeholders: (B, L) bool by modality. may_drop: whether some of n tokens would have to go.
    """
    for modality, output in encoded.items():
        if output is None or (modality in placeholders and bool(placeholders[modality].any())):
            continue
        rows = sum(item.shape[0] for item in flatten(output.pooler_output))
        if rows and may_drop(rows):
            config = adapter.config
            raise UnsupportedModelError(
                f"{type(adapter.model).__name__} ({config.model_type}) was given {rows} {modality} features, but no "
                f"column of the prompt is known to be their placeholder, so nothing of them would be dropped. Inputs "
                f"must come from the model's own processor; mm_token_type_ids among them, where it makes them."
            )


def nothing_dropped(streams: Sequence[StreamRecord], ratio: float | None) -> str:
    """What to say of a prompt whose pictures all stay whole though `ratio` is below 1; "" where some tokens went."""
    if ratio is None or ratio >= 1 or any(s.kept < s.total for s in streams):
        return ""
    sizes = sorted({s.total for s in streams})
    tokens = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return (
        f"nothing was dropped at ratio {ratio:g}: {len(streams)} picture(s) of {tokens} token(s) each are kept whole "
        "by rounding or by the method"
    )
