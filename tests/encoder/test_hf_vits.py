"""Plain ViTs of transformers and torchvision: nothing merged changes nothing, merging equals a dense forward, heads and
feature maps read what they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokprune
from tests.encoder.all_towers import close, equal, hooks, output, pixels
from tests.encoder.hf_vits import VITS, dense, first, hf_vit
from tokprune.errors import UnsupportedModelError
from tokprune.methods.encoder.tome import ToMe
from tokprune.runtime.encoder import apply_encoder

vits = pytest.mark.parametrize("name", VITS)
NOISE = torch.arange(64.0).expand(2, -1)


def run(model: nn.Module, x: Tensor, **kwargs: Any) -> Any:
    """The output of a model; MAE's gets its noise."""
    if type(model).__name__.startswith("ViTMAE"):
        kwargs["noise"] = NOISE[: len(x)]
    return model(x, **kwargs)


def seen_inside(model: nn.Module, blocks: list[Any], x: Tensor) -> tuple[dict[str, Any], list[Any]]:
    """How the first block was called, its states as `x`, and the mask of each attention, in a run without a splice."""
    first_call: dict[str, Any] = {}
    masks: list[Any] = []
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, a, kw: first_call.update(kw, x=a[0]), with_kwargs=True),
        *(
            first(b, "attention", "self_attn", "self_attention").register_forward_pre_hook(
                lambda m, a, kw: masks.append(kw.get("attention_mask")), with_kwargs=True
            )
            for b in blocks
        ),
    ]
    run(model, x)
    for handle in handles:
        handle.remove()
    return first_call, masks


@vits
@torch.no_grad()
def test_tome_equals_a_dense_forward_and_leaves_no_trace(name: str) -> None:
    make, prefix = VITS[name]
    model, x = make(), pixels()
    options = {} if name == "torchvision" else {"output_hidden_states": True}
    run(model, x, **options)  # transformers puts hooks of its own for hidden states
    plain, before = output_of(run(model, x)), (hooks(model), set(vars(model)))
    with tokprune.apply(model, "tome", r=0):
        assert equal(output_of(run(model, x)), plain)
    with tokprune.apply(model, "tome", r=7) as pruning:
        tower = pruning.encoder.tower
        blocks = [part.block for part in tower.blocks]
        got = run(model, x, **options)
        alone = run(model, x[1:], **options)
        assert pruning.trace.counts[-1] == 64 + prefix - 28
        assert tower.prefix == prefix
        if name != "torchvision":
            model.set_attn_implementation("eager")
            for a, b in zip(output_of(run(model, x)), output_of(got), strict=True):
                close(a, b, atol=1e-5, rtol=1e-5)
            model.set_attn_implementation("sdpa")
    assert (hooks(model), set(vars(model))) == before
    assert equal(output_of(run(model, x)), plain)
    call, masks = seen_inside(model, blocks, x)
    tables = masks if "beit" in name else None
    expected = dense(blocks, call["x"], 7, prefix, call.get("position_embeddings"), tables)
    if name == "torchvision":
        close(got, model.heads(model.encoder.ln(expected[-1])[:, 0]), atol=1e-5, rtol=1e-5)
    else:
        for state, wanted in zip(got.hidden_states, [call["x"], *expected], strict=True):
            close(state, wanted, atol=1e-5, rtol=1e-5)
    for a, b, c in zip(output_of(got), output_of(alone), plain, strict=True):
        assert a.shape == c.shape  # full length outside
        close(a[1:], b, atol=1e-5, rtol=1e-5)


def output_of(out: Any) -> list[Tensor]:
    """The tensors of an output, without those that are lists of states."""
    return [out] if isinstance(out, Tensor) else [t for t in out.to_tuple() if isinstance(t, Tensor)]


class Recorder(ToMe):
    """ToMe that keeps what it is told of each block's attention."""

    maps: dict[int, Tensor] = {}

    def reduce(self, block: Any) -> Any:
        self.maps[block.index] = block.attention_map()
        return super().reduce(block)


@vits
@torch.no_grad()
def test_methods_are_told_the_attention_that_the_reduced_block_computed(name: str) -> None:
    if name == "torchvision":
        pytest.skip("torch's attention does not give its weights")
    model = VITS[name][0]()
    model.set_attn_implementation("eager")
    Recorder.maps.clear()
    with apply_encoder(model, Recorder(r=7)):
        attentions = run(model, pixels(), output_attentions=True).attentions
    assert len(attentions) == len(Recorder.maps) == 4
    for index, attention in enumerate(attentions):
        close(Recorder.maps[index], attention, atol=1e-5, rtol=1e-5)


LABELS = {"num_labels": 5}


@torch.no_grad()
def test_heads_read_what_the_dense_forward_leaves() -> None:
    """[CLS], the distillation token, and the mean over patches, where merged ones count by their size."""
    x = pixels()
    for config, name, part in (
        ("ViTConfig", "ViTForImageClassification", "vit"),
        ("DeiTConfig", "DeiTForImageClassification", "deit"),
        ("DeiTConfig", "DeiTForImageClassificationWithTeacher", "deit"),
        ("ViTMSNConfig", "ViTMSNForImageClassification", "vit"),
        ("IJepaConfig", "IJepaForImageClassification", "ijepa"),
        ("Dinov2Config", "Dinov2ForImageClassification", "dinov2"),
        ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", "dinov2_with_registers"),
    ):
        model = hf_vit(config, name, **LABELS)
        tower, plain = getattr(model, part), model(x).logits
        with tokprune.apply(model, "tome", r=7) as pruning:
            got, inside = model(x), pruning.encoder.tower
            assert torch.equal(tower(x).last_hidden_state, tower(x).last_hidden_state)
        blocks, prefix = [p.block for p in inside.blocks], inside.prefix
        call, _ = seen_inside(tower, blocks, x)
        y = tower.layernorm(dense(blocks, call["x"], 7, prefix)[-1])
        if "Dinov2" in name:
            wanted = model.classifier(torch.cat([y[:, 0], y[:, prefix if "Registers" in name else 1 :].mean(1)], 1))
        elif "IJepa" in name:
            wanted = model.classifier(y.mean(1))
        elif "Teacher" in name:
            close(got.distillation_logits, model.distillation_classifier(y[:, 1]), atol=1e-5, rtol=1e-5)
            wanted = (model.cls_classifier(y[:, 0]) + model.distillation_classifier(y[:, 1])) / 2
        else:
            wanted = model.classifier(y[:, 0])
        close(got.logits, wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(got.logits, plain)
        assert torch.equal(model(x).logits, plain)


@torch.no_grad()
def test_a_tower_inside_a_model_runs_plain_when_it_is_called_directly() -> None:
    model, x = hf_vit("ViTConfig", "ViTForImageClassification"), pixels()
    plain = model.vit(x).last_hidden_state
    with tokprune.apply(model, "tome", r=7):
        assert torch.equal(model.vit(x).last_hidden_state, plain)


@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "Pixio", "Beit"])
@torch.no_grad()
def test_backbones_give_maps_of_full_size_from_reduced_blocks(name: str) -> None:
    options = {"out_features": ["stage2", "stage4"], "out_indices": [2, 4], "apply_layernorm": False}
    if name == "Beit":
        options = {"out_features": ["stage2", "stage4"], "use_relative_position_bias": True}
    model, x = hf_vit(f"{name}Config", f"{name}Backbone", **options), pixels()
    plain = model(x).feature_maps
    with tokprune.apply(model, "tome", r=0):
        assert all(torch.equal(a, b) for a, b in zip(model(x).feature_maps, plain, strict=True))
    with tokprune.apply(model, "tome", r=7) as pruning:
        maps, tower = model(x).feature_maps, pruning.encoder.tower
        groups = pruning.trace.merge_map(0)
    blocks, prefix = [p.block for p in tower.blocks], tower.prefix
    call, masks = seen_inside(model, blocks, x)
    outs = dense(blocks, call["x"], 7, prefix, call.get("position_embeddings"), masks if name == "Beit" else None)
    norm = {"DINOv3ViT": getattr(model, "norm", None)}.get(name) or nn.Identity()  # its last stage is always normed
    for features, wanted, last in zip(maps, (outs[1], outs[3]), (False, True), strict=True):
        wanted = norm(wanted) if last else wanted
        close(features, wanted[:, prefix:].transpose(1, 2).unflatten(2, (8, 8)), atol=1e-5, rtol=1e-5)
    assert groups.unique().numel() == 64 - 28
    for method in ("zerotprune", "ats"):
        with pytest.raises(UnsupportedModelError, match="back on the grid"):
            tokprune.apply(model, method)
    with tokprune.apply(model, "ipcv"):
        assert [m.shape for m in model(x).feature_maps] == [m.shape for m in plain]


@torch.no_grad()
def test_masked_image_models_keep_their_output() -> None:
    x, masked = pixels(), torch.arange(64).expand(2, -1) % 3 == 0
    for config, name in (("ViTConfig", "ViTForMaskedImageModeling"), ("DeiTConfig", "DeiTForMaskedImageModeling")):
        model = hf_vit(config, name, encoder_stride=4)
        plain = model(x, bool_masked_pos=masked)
        with tokprune.apply(model, "tome", r=5):
            reduced = model(x, bool_masked_pos=masked)
        assert reduced.reconstruction.shape == plain.reconstruction.shape
        assert not torch.allclose(reduced.reconstruction, plain.reconstruction)
        with pytest.raises(UnsupportedModelError, match="back on the grid"):
            tokprune.apply(model, "zerotprune")
    model = hf_vit("ViTMAEConfig", "ViTMAEForPreTraining", decoder_hidden_size=24, decoder_num_attention_heads=3)
    plain = run(model, x)
    with tokprune.apply(model, "tome", r=2) as pruning:
        assert run(model, x).logits.shape == plain.logits.shape
        assert pruning.trace.counts == (15, 13, 11, 9)  # 16 patches are not masked
    assert torch.equal(run(model, x).logits, plain.logits)


@torch.no_grad()
def test_a_clip_of_vivit_is_one_sequence() -> None:
    clip = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = hf_vit("VivitConfig", "VivitForVideoClassification", num_frames=4, tubelet_size=[2, 8, 8])
    plain = model(clip).logits
    with tokprune.apply(model, "tome", r=4) as pruning:
        got, blocks = model(clip).logits, [p.block for p in pruning.encoder.tower.blocks]
    call, _ = seen_inside(model, blocks, clip)
    wanted = model.classifier(model.vivit.layernorm(dense(blocks, call["x"], 4, 1)[-1])[:, 0])
    close(got, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(clip).logits, plain)


METHODS = {"tome": {"r": 6}, "tofu": {"r": 6}, "pitome": {}, "evit": {}, "ats": {}, "zerotprune": {}, "ipcv": {}}
METHODS |= {"toc3d": {}, "auroracap": {}, "apt": {"mean": (0.5,) * 3, "std": (0.5,) * 3}}
PATCH_SIZES = ("vit", "deit", "dinov2 registers", "torchvision")


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2 registers", "dinov3", "sapiens2", "beit", "torchvision"])
@torch.no_grad()
def test_every_method_runs_and_no_image_depends_on_its_neighbour(name: str) -> None:
    model, x = VITS[name][0](), pixels()
    for method, options in METHODS.items():
        if method == "apt" and name not in PATCH_SIZES:
            with pytest.raises(UnsupportedModelError, match="chooses patch sizes"):
                tokprune.apply(model, method, **options)
            continue
        amount = {} if method in ("tome", "tofu", "ipcv", "toc3d") else {"ratio": 0.5}
        with tokprune.apply(model, method, **options, **amount) as pruning:
            both, alone = output(model, x), output(model, x[1:])
            left = pruning.report().left
        if method in ("pitome", "evit", "zerotprune", "auroracap"):
            assert left == (32,)
        close(both[-1][1:], alone[-1], atol=2e-5, rtol=1e-4)  # the pooled output


@pytest.mark.parametrize("name", PATCH_SIZES)
@torch.no_grad()
def test_larger_patches_get_the_positions_of_their_place(name: str) -> None:
    model, prefix = VITS[name][0](), VITS[name][1]
    x = torch.full((2, 3, 32, 32), 0.3) + torch.tensor([0.0, 0.2]).view(2, 1, 1, 1)
    with apply_encoder(model, "apt", mean=(0.5,) * 3, std=(0.5,) * 3, proportional=False) as pruning:
        tower, seen = pruning.encoder.tower, []
        watch = tower.blocks[0].entry.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        output(model, x)
        watch.remove()
    table = {
        "vit": lambda: model.embeddings.position_embeddings[0, 1:],
        "deit": lambda: model.embeddings.position_embeddings[0, 2:],
        "dinov2 registers": lambda: model.embeddings.position_embeddings[0, 1:],
        "torchvision": lambda: model.encoder.pos_embedding[0, 1:],
    }[name]()
    small = nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    place = nn.functional.interpolate(table.T.reshape(1, -1, 8, 8), size=(4, 4), mode="bicubic", antialias=True)
    close(seen[0][:, prefix:], (tower.patch(small) + place).flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit", "torchvision"])
def test_gradients_are_those_of_the_dense_forward_with_checkpoints_and_without(name: str) -> None:
    make, prefix = VITS[name]
    model, x = make(), pixels()

    def gradients() -> list[Tensor]:
        return [p.grad.clone() for p in blocks.parameters() if p.grad is not None]

    with tokprune.apply(model, "tome", r=7) as pruning:
        tower = pruning.encoder.tower
        blocks = nn.ModuleList(part.block for part in tower.blocks)
        last: list[Tensor] = []
        watch = blocks[-1].register_forward_hook(lambda m, args, out: last.append(out))
        run(model, x)
        last[-1].square().mean().backward()
        spliced = gradients()
        if name != "torchvision":
            model.zero_grad()
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()  # checkpoints only then; nothing here is random
            if name == "dinov3":  # its positions are, in training
                model.rope_embeddings.eval()
            run(model, x)
            last[-1].square().mean().backward()
            for a, b in zip(gradients(), spliced, strict=True):
                close(a, b, atol=1e-5, rtol=1e-4)
            model.activation_checkpointing_disable()
            model.eval()
        watch.remove()
    model.zero_grad()
    call, masks = seen_inside(model, list(blocks), x)
    outs = dense(list(blocks), call["x"], 7, prefix, call.get("position_embeddings"), masks if name == "beit" else None)
    outs[-1].square().mean().backward()
    for a, b in zip(spliced, gradients(), strict=True):
        close(a, b, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_exception_inside_leaves_the_model_usable_and_clean() -> None:
    for name in ("deit", "dinov3"):
        model, x = VITS[name][0](), pixels()
        plain, before = output(model, x), hooks(model)
        pruning = tokprune.apply(model, "tome", r=7)
        expected = output(model, x)
        broken = pruning.encoder.tower.blocks[2].block.mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        broken.remove()
        assert equal(output(model, x), expected)
        pruning.remove()
        assert equal(output(model, x), plain)
        assert hooks(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "dinov2 registers", "dinov3", "beit", "torchvision"])
@torch.no_grad()
def test_compiles_without_a_graph_break(name: str) -> None:
    model, x = VITS[name][0](), pixels()
    tokprune.apply(model, "tome", r=7)
    expected = output(model, x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for a, b in zip(output(compiled, x), expected, strict=True):
        close(a, b, atol=1e-5, rtol=1e-5)
