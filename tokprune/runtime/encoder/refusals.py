"""What a spliced tower cannot do, in words."""

from __future__ import annotations

REENTRANT = (
    "gradient checkpointing in the reentrant way cannot be recomputed with an encoder-stage method: the tower would "
    'get no gradients. Use gradient_checkpointing_kwargs={"use_reentrant": False} (set_grad_checkpointing of timm '
    "and open_clip does so by itself)."
)
NO_SCRIPT = (
    "torch.jit.script cannot compile {} with an encoder-stage method on it (TorchScript knows no hooks of this "
    "kind); script the model before apply, or after remove. torch.compile works."
)
UNKNOWN_CALL = (
    "the blocks of {} were called with {} where hidden states were expected: tracing with stand-ins for tensors "
    "(torch.fx) cannot follow an encoder-stage method, whose steps depend on the number of tokens. Trace the model "
    "before apply, or after remove."
)
NO_CHECKPOINTS = (
    "{} leaves the sequence and restores it, which gradient checkpointing cannot recompute block by block; switch "
    "checkpointing off, or take a method that merges (tome, pitome, tofu)."
)
NO_PATCH_SIZES = (
    "{!r} chooses patch sizes, which {} here does not allow: it needs absolute positions, one token per patch at the "
    "connector and images of one size (ViTs of timm and open_clip, CLIP, SigLIP, LLaVA)."
)
OUT_OF_ORDER = (
    "block {} of the {} tower was called out of order; an encoder-stage method needs the blocks to run from the "
    "first on, one after the other (non-reentrant gradient checkpointing is fine, reentrant is not)."
)
