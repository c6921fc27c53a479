"""M-RoPE: kept tokens bring their positions along as extra columns of the embeddings.

vLLM fixes the positions of a prompt before the encoder runs. Here every placeholder of a pruned picture first gets the
position at which the picture begins, and the text behind it the one that it has unpruned. `embed_input_ids` takes the
columns (time, row and column from there) off the embeddings into a buffer as long as a batch, and `forward` adds the
buffer to the positions. Nothing of vLLM's runner is touched, and a buffer at a fixed address is what CUDA graphs ask
for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokprune.errors import OptionError
from tokprune.serving.choose import Kept
from tokprune.serving.model import Pruned
from tokprune.serving.weave import staying, woven

EXTRA = 6  # three positions in two digits of base 256 each: bfloat16 holds whole numbers exactly up to 256 only


class Positions(Pruned):
    """Mixin before a Qwen-VL model of vLLM."""

    weaves: ClassVar[frozenset[str]] = frozenset()
    """Modalities of which the processor makes one embedding, words included."""
    register_buffer: Any
    tokprune_offsets: Tensor

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1 or getattr(parallel, "enable_dbo", False):
            raise OptionError(
                "tokprune serves models with M-RoPE on one pipeline stage and in whole batches: later stages, and the "
                "second half of a batch cut in two, do not see the embeddings that bring positions. Leave "
                "--pipeline-parallel-size and --enable-dbo out."
            )
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("tokprune_offsets", torch.zeros(3, rows, dtype=torch.int64), persistent=False)
        self.tokprune_used = False

    @property
    def columns(self) -> int:
        """Width of an embedding without the extra columns."""
        return int(self.config.get_text_config().hidden_size)

    def placeholder(self, modality: str) -> int:
        """The token id that a visual token replaces."""
        raise NotImplementedError

    def words(self, modality: str, data: Mapping[str, Any]) -> list[int]:
        """Token ids that stand for a picture or clip before pruning. data: its fields, as the processor gave them."""
        raise NotImplementedError

    def get_encoder_cudagraph_config(self) -> Any:
        """Captured encoders would go past `embed_multimodal`, so none is captured."""
        return replace(super().get_encoder_cudagraph_config(), modalities=[])  # type: ignore[misc]

    def placed(
        self, modality: str, inputs: Mapping[str, Any], features: Sequence[Tensor], kept: Sequence[Kept | None]
    ) -> Any:
        """Kept rows with their positions behind them."""
        out = []
        for i, (rows, k) in enumerate(zip(features, kept, strict=True)):
            if k is None:  # all stay, and so do the positions that vLLM computed
                out.append(rows)
                continue
            data = _item(inputs, i)
            ids = self.words(modality, data)
            alone = SimpleNamespace(
                modality=modality,
                data={name: SimpleNamespace(data=value) for name, value in data.items()},
                mm_position=SimpleNamespace(offset=0, length=len(ids)),
            )
            positions, _ = super().get_mrope_input_positions(ids, [alone])  # type: ignore[misc]
            token = self.placeholder(modality)
            place = positions.T[staying(ids, token, k)].to(rows.device)  # (K, 3)
            chosen = k.features
            if modality in self.weaves:
                chosen = woven(ids, token, k, self.get_language_model().embed_input_ids)  # type: ignore[attr-defined]
            digits = torch.cat([torch.div(place, 256, rounding_mode="floor"), place % 256], 1)
            out.append(torch.cat([chosen, digits.to(chosen)], 1))
        return tuple(out)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """vLLM's positions of the unpruned prompt; all placeholders of a pruned picture stand where it begins."""
        whole: list[int] = []
        features, regions, start = [], [], 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            at, length = feature.mm_position.offset, feature.mm_position.length
            data = {name: element.data for name, element in feature.data.items()}
            ids = self.words(feature.modality, data)
            whole += input_tokens[start:at]
            regions.append((len(whole), len(ids), length))
            features.append(
                replace(feature, mm_position=replace(feature.mm_position, offset=len(whole), length=len(ids)))
            )
            whole += ids
            start = at + length
        whole += input_tokens[start:]
        positions, _ = super().get_mrope_input_positions(whole, features)  # type: ignore[misc]
        pieces, start = [], 0
        for at, full, length in regions:
            pieces.append(positions[:, start:at])
            begins = positions[:, at : at + 1]
            pieces.append(positions[:, at : at + full] if length == full else begins.expand(3, length))
            start = at + full
        short = torch.cat([*pieces, positions[:, start:]], 1)
        return short, int(positions.max()) + 1 - len(input_tokens)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """vLLM's embeddings; the extra columns go to the buffer."""
        offsets = self.tokprune_offsets
        if self.tokprune_used:  # here and not in forward, which a CUDA graph may replay without Python
            offsets.zero_()
            self.tokprune_used = False
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            width, places, rows = self.columns, [], []
            for embedding in multimodal_embeddings:
                digits = embedding[:, width:].round().long()
                if not digits.shape[1]:
                    digits = digits.new_zeros(len(digits), EXTRA)
                places.append(digits[:, :3] * 256 + digits[:, 3:])
                rows.append(embedding[:, :width])
            where = is_multimodal.nonzero().flatten().to(offsets.device)  # type: ignore[union-attr]
            offsets[:, where] = torch.cat(places).T.to(offsets.device)
            self.tokprune_used = True
            multimodal_embeddings = tuple(rows)
        embedded: Tensor = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)  # type: ignore[misc]
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """vLLM's forward at the kept tokens' positions."""
        offsets = self.tokprune_offsets
        moved = positions + offsets[:, : positions.shape[-1]]
        return super().forward(input_ids, moved, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]


def _item(inputs: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The fields of one picture or clip in an encoder call that tell where it stands in the prompt."""
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "timestamps")
    return {name: inputs[name][i] for name in names if inputs.get(name) is not None}
