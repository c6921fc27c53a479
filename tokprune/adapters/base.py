"""The adapter: what the runtime must know of a multimodal model of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokprune.adapters.dialect import arguments_from, cache_in, logical_length, parameters
from tokprune.adapters.families import Family, family_named
from tokprune.adapters.hooks import Ref
from tokprune.adapters.known import refusal
from tokprune.adapters.tower_parts import TEXT_MODELS
from tokprune.errors import PromptError, UnsupportedModelError

# Raw inputs of each modality, as transformers names them.
RAW = {"image": ("pixel_values", "pixel_values_images", "image_patches"), "video": ("pixel_values_videos",)}
TYPE_IDS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside torch.compile, DDP or PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model") and not hasattr(type(model), "get_image_features"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return model


def flatten(features: Any) -> list[Tensor]:
    """Encoder items as a list of (n_i, D): a tensor (items, n, D) or a list of (..., D)."""
    return [t.reshape(-1, t.shape[-1]) for t in features]


def like(template: Any, rows: Tensor, sizes: Sequence[int]) -> Any:
    """`rows` (k, D) in the container of `template`, one item for each there; sizes: rows of each item.

    A tensor cannot hold items of unequal length: it gets one item with all rows then, as does a list of other items.
    """
    if not isinstance(template, Tensor):
        sizes = sizes if len(sizes) == len(template) else [rows.shape[0]]
        items = zip(template, rows.split(list(sizes)), strict=False)
        return type(template)(r.reshape((1,) * (t.ndim - 2) + r.shape) for t, r in items)
    if template.ndim < 3:
        return rows
    count = len(sizes) if len(sizes) == template.shape[0] and len(set(sizes)) == 1 else 1
    return rows.reshape(count, *(1,) * (template.ndim - 3), rows.shape[0] // count, rows.shape[-1])


ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "attention")
"""Kinds of layers, as configs of transformers name them, that read keys and nothing else of the past."""


def _attends_only(layer: nn.Module) -> bool:
    """Whether a decoder layer mixes tokens by attention alone."""
    names = {type(module).__name__ for module in layer.modules()}
    mixes = any(name.endswith("Attention") and "Linear" not in name for name in names)
    return mixes and not any(isinstance(module, nn.Conv1d) for module in layer.modules())


class Adapter:
    """How one placeholder-style model lets its visual tokens be rewritten.

    Rests on an invariant of transformers: row i of a modality's flattened encoder output fills the i-th placeholder of
    that modality, in (batch, position) order. What a family does differently stands in its file in `families/`.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._base = Ref(model), Ref(model.base_model)  # a model owns its pruning, not the other way round
        self.config: Any = model.config
        self.family: Family = family_named(str(model.config.model_type))

    @property
    def model(self) -> Any:
        """The model as it was given; None when it is gone."""
        return self._model()

    @property
    def base(self) -> Any:
        """Its multimodal base model."""
        return self._base()

    @property
    def hybrid(self) -> bool:
        """Whether the LLM has layers that are not attention (recurrent, convolutional), where masked filler is not
        neutral.

        Told by the names of the layers' kinds where the config lists them, else by the layers' modules; what is not
        known to be attention alone counts as hybrid.
        """
        config = self.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
        if kinds:
            return any(kind not in ATTENTION for kind in kinds)
        layers = getattr(self.text_model, "layers", None) or ()
        return any(not _attends_only(layer) for layer in layers)

    @property
    def rotary_axes(self) -> int:
        """Axes of a multimodal rotary embedding: time, height and width, where the config does not say otherwise."""
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        return len(rope.get("mrope_section") or "thw")

    def caches(self, call: Mapping[str, Any]) -> bool:
        """Whether a forward builds a KV cache."""
        use_cache = call.get("use_cache")
        return bool(getattr(self.config.get_text_config(), "use_cache", True) if use_cache is None else use_cache)

    @property
    def kernel(self) -> str:
        """The attention kernel of the LLM: "sdpa", "eager", "flash_attention_2", ..."""
        return str(self.config.get_text_config()._attn_implementation)

    @property
    def text_model(self) -> Any:
        """The language model inside the multimodal base model."""
        return next(getattr(self.base, name) for name in TEXT_MODELS if hasattr(self.base, name))

    @property
    def layers(self) -> Any:
        """The decoder layers of the language model, where a stage works inside them."""
        layers = getattr(self.text_model, "layers", None)
        if layers is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no decoder layers at {type(self.text_model).__name__}.layers, so no "
                "stage can work inside its LLM; prune between encoder and LLM (a method of the connector stage)."
            )
        return layers

    @property
    def pad_id(self) -> int:
        """A token id for filler columns that is not a placeholder."""
        visual = {getattr(self.config, "image_token_id", None), getattr(self.config, "video_token_id", None)}
        pad = getattr(self.config.get_text_config(), "pad_token_id", None)
        if pad is not None and pad not in visual and pad >= 0:
            return int(pad)
        return next(i for i in range(3) if i not in visual)

    def has_visual(self, call: Mapping[str, Any]) -> bool:
        """Whether a forward brings images or videos along, raw or encoded."""
        if any(v is not None for v in (call.get("mm_encoder_outputs") or {}).values()):
            return True
        return any(call.get(key) is not None for keys in RAW.values() for key in keys)

    @torch.compiler.disable
    def encode(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Encoder outputs per modality: those that came with the call, and the raw inputs encoded now."""
        encoded = dict(call.get("mm_encoder_outputs") or {})
        for modality, keys in RAW.items():
            key = next((k for k in keys if call.get(k) is not None), None)
            if key is None:
                continue
            if encoded.get(modality) is not None:  # transformers refuses both, too: they may be of different pictures
                raise PromptError(
                    f"{key} and mm_encoder_outputs[{modality!r}] were given for the same pictures; pass one."
                )
            encoder = self.family.encoder(self.base, modality)
            if encoder is None:
                raise UnsupportedModelError(
                    f"{type(self.base).__name__} was given {key} but has no encoder for {modality}."
                )
            function, renamed = getattr(self.base, encoder[0]), encoder[1]
            kwargs = {n: v for n, v in arguments_from(call, function).items() if v is not None}
            if renamed:
                kwargs = {renamed: call[key]}
            encoded[modality] = function(**kwargs, return_dict=True)
        return encoded

    def placeholders(self, call: Mapping[str, Any], encoded: Mapping[str, Any]) -> dict[str, Tensor]:
        """(B, L) bool per modality: the columns that its features fill."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        image = getattr(self.config, "image_token_id", None)
        video = image if self.family.shares_placeholder else getattr(self.config, "video_token_id", None)

        def columns(token: int) -> Tensor:
            if ids is not None:
                return ids == token
            if embeds is None:
                raise UnsupportedModelError("a forward needs input_ids or inputs_embeds.")
            table = self.base.get_input_embeddings()  # called, not read: its weight may be offloaded
            return (embeds == table(torch.full((), token, device=embeds.device))).all(-1)

        out = {}
        only_video = encoded.get("image") is None and encoded.get("video") is not None
        if image is not None and not (video == image and only_video):
            out["image"] = columns(image)
        if video is not None and (video != image or "image" not in out):
            out["video"] = columns(video)
        return self.family.placeholders(self.config, call, out)

    def positions(self, call: Mapping[str, Any], x: Tensor) -> Tensor:
        """Logical positions of the columns of this forward: (B, L), or (3 or 4, B, L) for M-RoPE."""
        if call.get("position_ids") is not None:
            positions = call["position_ids"].to(x.device)
            batch = x.shape[0]
            if positions.shape[-2] != batch:
                positions = positions.expand(*positions.shape[:-2], batch, -1)
            return positions
        past = logical_length(cache_in(call))
        compute = getattr(self.base, "compute_3d_position_ids", None)
        if compute is not None:
            embeds = x if x.ndim == 3 else x.new_empty((*x.shape, 0), dtype=torch.float)
            kwargs = arguments_from(call, compute)
            tokens = {"input_ids": x if x.ndim == 2 else None, "inputs_embeds": embeds}
            kwargs |= {name: value for name, value in tokens.items() if name in kwargs}
            heard = call.get("feature_attention_mask")
            if heard is not None and "audio_feature_lengths" in kwargs:  # the Omni models count sound by it
                kwargs["audio_feature_lengths"] = heard.sum(-1)
            if isinstance(kwargs.get("attention_mask"), Mapping):
                kwargs["attention_mask"] = None
            positions = compute(**kwargs)
            if positions is not None:
                return positions[..., -x.shape[1] :]
        return self.family.first_position + torch.arange(past, past + x.shape[1], device=x.device).expand(
            x.shape[0], -1
        )


def check_known(model: Any) -> None:
    """Refuse a model of a type that is known to be beyond reach."""
    why = refusal(getattr(model, "config", None))
    if why is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be pruned between encoder and LLM: {why}."
        )


def get_adapter(model: object) -> Adapter:
    """The adapter of a model, or an error that says why the model cannot be pruned."""
    if isinstance(model, type):
        raise UnsupportedModelError(
            f"apply takes a model, not the class {model.__name__}; load it first with from_pretrained."
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"apply takes a Hugging Face VLM (a torch.nn.Module), not {type(model).__name__}: {str(model)[:80]!r}."
            + (" Load it first: AutoModelForImageTextToText.from_pretrained(...)." if isinstance(model, str) else "")
        )
    inner: Any = unwrap(model)
    name, config = type(inner).__name__, getattr(inner, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None or not hasattr(inner, "base_model"):
        raise UnsupportedModelError(
            f"{name} is not a Hugging Face VLM (no transformers config); tokprune prunes models of transformers such "
            "as LLaVA, Qwen-VL and InternVL."
        )
    check_known(inner)
    base = inner.base_model
    if not hasattr(base, "get_image_features"):
        if hasattr(config, "vision_config"):
            raise UnsupportedModelError(
                f"{name} ({kind}) does not put its image features at placeholder tokens; it cannot be pruned."
            )
        if getattr(config, "patch_size", None) is not None:
            raise UnsupportedModelError(
                f"{name} ({kind}) is a vision tower without an LLM behind it; it takes a method of the encoder stage, "
                'such as method="tome".'
            )
        raise UnsupportedModelError(f"{name} ({kind}) is a text-only model: it has no visual tokens to prune.")
    if "mm_encoder_outputs" not in parameters(type(base).forward):
        raise UnsupportedModelError(
            f"{name} ({kind}) does not take encoder outputs in its forward (mm_encoder_outputs); tokprune needs a "
            "model of transformers >= 5.23 that does."
        )
    if not any(hasattr(base, t) for t in TEXT_MODELS):
        raise UnsupportedModelError(f"{name} ({kind}) has no language model under {' or '.join(TEXT_MODELS)}.")
    return Adapter(inner)
