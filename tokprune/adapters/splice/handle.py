"""What a user holds of the encoder stage."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from tokprune.adapters.base import unwrap
from tokprune.adapters.splice.batched import BatchedSplice
from tokprune.adapters.splice.find import find_tower
from tokprune.adapters.splice.packed import PackedSplice
from tokprune.adapters.splice.report import EncoderReport
from tokprune.adapters.splice.run import EncoderTrace
from tokprune.budget import check_budget, check_ratio
from tokprune.errors import BudgetError, OptionError, UnsupportedModelError
from tokprune.methods.base import Method
from tokprune.methods.encoder_base import EncoderMethod
from tokprune.registry import get_method

HANDLE = "_tokprune_encoder"  # attribute of the model that holds its EncoderPruning


def _normal(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation by which a processor normalises pixels, if it says so."""
    image: Any = getattr(processor, "image_processor", processor)
    mean, std = getattr(image, "image_mean", None), getattr(image, "image_std", None)
    return None if mean is None or std is None else (tuple(mean), tuple(std))


class EncoderPruning:
    """A vision tower that runs on fewer tokens: the handle that `apply_encoder` returns, also a context manager.

    expand: whether the tower gives its output at full length, each merged token repeated at the places of its members.
    """

    def __init__(
        self,
        model: Any,
        method: EncoderMethod,
        ratio: float | None = None,
        budget: int | None = None,
        expand: bool | None = None,
        processor: Any = None,
    ) -> None:
        self.tower = find_tower(model)
        self.model, self.method = self.tower.owner, method
        pools = self.tower.pools
        if expand is None:
            expand = self.tower.vlm or method.info.merges or method.restores
        if method.restores and not expand:
            raise OptionError(
                f"{method.info.name!r} restores the full sequence at the tower's end; expand=False has no meaning."
            )
        if (
            method.info.adaptive
            and pools
            and not self.tower.vlm
            and not (method.restores or (expand and method.info.merges))
        ):
            raise UnsupportedModelError(
                f"{method.info.name!r} keeps another count in each image, and {self.tower.family} pools over all patches, padding "
                "included; it needs a tower that reads its output from [CLS]."
            )
        self.expand = expand
        self.ratio = None if ratio is None else check_ratio(ratio)
        self.budget = None if budget is None else check_budget(budget)
        if ratio is not None and budget is not None:
            raise BudgetError(f"both ratio={ratio!r} and budget={budget!r} given; choose one.")
        splice = PackedSplice if self.tower.packed else BatchedSplice
        self._splice = splice(self.tower, method, self.ratio, self.budget, expand)
        self._splice.normalisation = _normal(processor) or self.tower.normal

    @property
    def trace(self) -> EncoderTrace | None:
        """The last run: which patch is in which group, where each group sits; None before the first."""
        return self._splice.trace

    @property
    def active(self) -> bool:
        """Whether the model is reduced through this handle now."""
        return self.model.__dict__.get(HANDLE) is self

    def install(self) -> None:
        """Put the hooks on the tower."""
        self._splice.install()
        self.model.__dict__[HANDLE] = self

    def remove(self) -> None:
        """Give the model back untouched. Calling it twice is harmless."""
        self._splice.remove()
        if self.active:
            del self.model.__dict__[HANDLE]

    def widen(self, block: int, x: Tensor) -> Tensor:
        """Rows that entered block `block` in this thread's last run, at full length. x: (B, K, C), packed towers (K,
        C).

        For whoever looks at a reduced block from outside (its queries and keys, say) and wants one row per original
        token: members of a group get the group's row, dropped tokens zeros.
        """
        return self._splice.entering(block, x)

    def output(self, block: int, x: Tensor) -> Tensor:
        """What block `block` gave in this thread's last run, at full length, rebuilt where the method does that."""
        return self._splice.full_length(block, x)

    def places(self, block: int) -> Tensor | None:
        """Packed towers: (K,) original token at which each row that entered `block` sits; None when it was not
        reduced.
        """
        return self._splice.places(block)

    @property
    def channels(self) -> int:
        """Channels that ride on the queries and keys of reduced blocks and carry sizes (packed towers)."""
        return self._splice.channels

    def report(self) -> EncoderReport:
        """What the last run left, block by block; prints as text."""
        asked = f"ratio {self.ratio:g}" if self.ratio is not None else "its own schedule"
        asked = f"budget {self.budget}" if self.budget is not None else asked
        name = type(self.tower.owner).__name__
        return EncoderReport.build(name, self.tower, self.method, asked, self.expand, self.trace)

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        return f"<EncoderPruning {type(self.tower.owner).__name__} by {self.method.info.name}{state}>"

    def __enter__(self) -> EncoderPruning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply_encoder(
    model: Any,
    method: str | Method = "tome",
    *,
    ratio: float | None = None,
    budget: int | None = None,
    expand: bool | None = None,
    processor: Any = None,
    **options: Any,
) -> EncoderPruning:
    """Let the vision tower of `model` run on fewer tokens, in place.

    model: a timm or open_clip ViT, a CLIP-like tower of transformers, or a VLM with one. method: a name (see
    list_methods("encoder")) with its fields as `options`, or a method object. ratio, budget: patches left at the
    tower's end, per image or frame, for methods that have no schedule of their own. expand: whether the tower's output
    keeps its full length, each merged token repeated at the places of its members (then pooling over patches is the
    weighted mean, and everything behind the tower still fits); by default for VLMs always, and for bare towers with
    methods that merge. Dropped tokens are zeros. processor: tells methods that look at the picture (apt) how its pixels
    were normalised.

    Applying again replaces. Raises UnsupportedModelError for towers that cannot be spliced, OptionError and BudgetError
    for arguments that cannot be used; the model is then as it was.
    """
    if isinstance(method, str):
        method = get_method(method, **options)
    elif options:
        raise OptionError(f"options {sorted(options)} need the method by name.")
    if not isinstance(method, EncoderMethod):
        raise OptionError(
            f"method {method.info.name!r} belongs to the stage {method.stage!r}, not to the encoder stage."
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"apply_encoder takes a model (a torch.nn.Module), not {type(model).__name__}.")
    pruning = EncoderPruning(model, method, ratio, budget, expand, processor)
    method.check(pruning.tower.depth, ratio is not None or budget is not None)
    remove_encoder(model)
    pruning.install()
    return pruning


def remove_encoder(model: Any) -> None:
    """Take the encoder stage off `model`; a model without one stays as it is."""
    inner = unwrap(model) if hasattr(model, "modules") else model
    pruning = getattr(inner, "__dict__", {}).get(HANDLE)
    if pruning is not None:
        pruning.remove()
