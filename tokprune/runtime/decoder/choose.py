"""One drop: the method is shown each prompt in front of a layer, what it answers is checked and carried out."""

from __future__ import annotations

import torch
from torch import Tensor

from tokprune.adapters.types import Model
from tokprune.errors import TokpruneError
from tokprune.methods.base import Checks, deferred_checks
from tokprune.methods.decoder_base import DecoderMethod, LayerTokens
from tokprune.ops.numeric import full_precision
from tokprune.ops.topk import rows_at
from tokprune.runtime.choose import check_form
from tokprune.runtime.decoder.attention import LayerInputs, RowAttention
from tokprune.runtime.decoder.candidates import Candidates
from tokprune.runtime.decoder.frame import Drop, Frame, Live, VisualCall
from tokprune.runtime.host import to_host
from tokprune.runtime.positions import compact_1d, compact_mrope
from tokprune.tokens import Selection

NORMS = ("norm", "final_layernorm")


class Dropper:
    """What happens in front of one layer of one forward."""

    def __init__(self, method: DecoderMethod, frame: Frame, prompt: VisualCall, layer: int, own: LayerInputs) -> None:
        self.method, self.frame, self.prompt, self.layer, self.own = method, frame, prompt, layer, own
        self.live = frame.live or prompt.live
        self.hidden = own.hidden

    def drop(self, text_model: Model) -> Tensor:
        """Let the method choose for every row; the frame knows what is left then. Returns the hidden states of that."""
        keeps = self.prompt.steps[self.layer]
        with torch.no_grad(), deferred_checks() as checks:
            chosen = [self._choose(row, keep, text_model) for row, keep in enumerate(keeps)]
        self._merge(chosen)
        if any(s is not None for s in chosen):
            self._carry_out(chosen, checks)
        self.prompt.history.append((self.layer, list(self.prompt.candidates)))
        kept = tuple(len(c) + c.fixed for c in self.prompt.candidates)
        columns = self.live.index.clamp(min=0).to(self.prompt.columns.device)
        columns = self.prompt.columns.gather(1, columns).masked_fill(self.live.index < 0, -1)
        self.prompt.drops.append(Drop(self.layer, kept, columns, tuple(chosen)))
        return self.hidden

    # -- the decision

    def _choose(self, row: int, keep: int | None, text_model: Model) -> Selection | None:
        """What stays of one row; None where everything does, without asking."""
        candidates = self.prompt.candidates[row]
        left = len(candidates)
        if keep is None or not left or (keep >= left and (self.prompt.bound or self.method.exact)):
            return None
        keep = min(keep, left)
        selection: object = self.method.select(self._tokens(row, candidates, text_model), keep)
        name = self.method.info.name
        chosen = check_form(name, selection, left, self.hidden.shape[-1])
        if len(chosen) != keep and (self.method.exact or len(chosen) > left):
            raise TokpruneError(
                f"method {name!r} kept {len(chosen)} tokens of {left} in front of layer {self.layer} where {keep} were "
                "asked for."
            )
        return chosen

    def _tokens(self, row: int, candidates: Candidates, text_model: Model) -> LayerTokens:
        """What the method sees of a row."""
        start, n = self.live.fill(row), self.live.counts[row] - self.prompt.answer
        here, saved = slice(start, start + n), self.frame.saved
        slots = self.live.index[row, here]
        reads, hidden = self.method.reads, self.hidden[row, here]
        embeddings = entering = middle = normed = None
        if "embeddings" in reads:
            embeddings = saved["embeddings"][row].to(hidden.device)[slots.to(hidden.device)]
        if "entering" in reads:
            entering = saved["below"].hidden[row, here].to(hidden.device)
        if "middle" in reads:
            middle = saved["middle"][row, here].to(hidden.device)
        if "normed" in reads:
            normed = next(getattr(text_model, name) for name in NORMS if hasattr(text_model, name))(hidden)
            normed = normed.to(hidden.device)
        device = hidden.device
        return LayerTokens(
            layer=self.layer,
            hidden=hidden,
            columns=self.prompt.columns[row][slots].to(device),
            visual=self.live.find(row, candidates.slots).to(device),
            picture=candidates.picture.to(device),
            row=candidates.row.to(device),
            col=candidates.col.to(device),
            total=candidates.total,
            below=RowAttention(saved["below"], row, start, n, device),
            own=RowAttention(self.own, row, start, n, device),
            signals={name: value.to(device) for name, value in candidates.signals.items()},
            embeddings=embeddings,
            entering=entering,
            middle=middle,
            normed=normed,
            bound=self.prompt.bound,
            notes=self.prompt.notes[row],
        )

    # -- carrying it out

    def _places(self, row: int, slots: Tensor) -> Tensor:
        """Places of slots of the call among the live ones of a row, filler counted."""
        return self.live.fill(row) + self.live.find(row, slots)

    def _merge(self, chosen: list[Selection | None]) -> None:
        """Write what the method merged into the slots that stay; differentiable."""
        for row, selection in enumerate(chosen):
            if selection is None or (selection.features is None and selection.weights is None):
                continue
            places = self._places(row, self.prompt.candidates[row].slots).to(self.hidden.device)
            with full_precision(self.hidden.device):
                merged = selection.apply(self.hidden[row, places]).to(self.hidden.dtype)
            at = places[selection.indices.to(places.device)]
            self.hidden = self.hidden.index_put((torch.full_like(at, row), at), merged)

    def _carry_out(self, chosen: list[Selection | None], checks: Checks) -> None:
        """Take what was not chosen out of the live tokens. One look at the device for all rows."""
        live, before = self.live, list(self.prompt.candidates)
        keep = live.index >= 0  # (B, P)
        visual = torch.zeros_like(keep)  # (B, P)
        facts = [self._take_out(row, selection, keep, visual) for row, selection in enumerate(chosen)]
        host, *flags = to_host(torch.stack(facts), *checks.flags())
        checks.raise_unless(flags)
        told = host.tolist()
        if any(bad for bad, _ in told):
            raise TokpruneError(
                f"method {self.method.info.name!r} returned indices in front of layer {self.layer} that are not "
                "ascending, distinct and among the candidates. Return Selection(indices.unique()) or sort them."
            )
        left = self.prompt.candidates
        lost = [len(b) - len(a) + separators for b, a, (_, separators) in zip(before, left, told, strict=True)]
        if not any(lost):
            return
        counts = [n - gone for n, gone in zip(live.counts, lost, strict=True)]
        width = max(*counts, 1)
        order = torch.argsort(keep.int(), dim=1, stable=True)[:, live.width - width :]  # (B, P')
        filler = torch.tensor([width - n for n in counts], device=keep.device)[:, None]
        used = torch.arange(width, device=keep.device) >= filler
        index = torch.where(used, live.index.gather(1, order), -1)
        if self.frame.tables:
            self._renumber(keep, visual, order)
        self.hidden = rows_at(self.hidden, order.to(self.hidden.device))
        self.live = self.frame.live = Live(index, counts)
        self.frame.lives.append((self.layer, self.live))

    def _take_out(self, row: int, selection: Selection | None, keep: Tensor, visual: Tensor) -> Tensor:
        """Clear what one row loses in `keep` (B, P), mark its candidates in `visual`. Returns (2,): whether its indices
        are wrong, and how many separators go.
        """
        before, index = self.prompt.candidates[row], self.live.index[row]
        places = self._places(row, before.slots)
        visual[row, places] = True
        if selection is None:
            return index.new_zeros(2)
        indices = selection.indices.to(index.device, torch.long)
        ends = indices.new_tensor([-1, len(before)])
        bad = (torch.cat([ends[:1], indices, ends[1:]]).diff() <= 0).any()
        safe = indices.clamp(0, max(len(before) - 1, 0))
        after = before.chosen(safe)
        gone = torch.where(after.separators < 0, before.separators, -1)
        stays = torch.zeros(len(before), dtype=torch.bool, device=index.device).index_fill(0, safe, True)
        keep[row, places] = stays
        keep[row] &= ~torch.isin(index, gone)  # filler is no token either way
        self.prompt.candidates[row] = after
        return torch.stack([bad.long(), (gone >= 0).sum()])

    def _renumber(self, keep: Tensor, visual: Tensor, order: Tensor) -> None:
        """Close the gaps in the positions, so that they end where they ended."""
        frame, none = self.frame, torch.zeros_like(order[:, :1])
        lost = (self.live.index >= 0) & ~keep
        for name, (_, _, positions) in frame.tables.items():
            now = frame.positions.get(name)
            now = self.live.take(positions, positions.ndim - 1) if now is None else now
            if now.ndim == 2:
                now, moves = compact_1d(now, lost, none)
            else:
                now, moves = compact_mrope(now, keep, visual, none)
            now = now + moves[:, -1:]  # (..., B, P)
            frame.positions[name] = now.gather(-1, order.expand(*now.shape[:-2], -1, -1))
