"""Learning rates that fall from a transformer's last block to its first."""

from __future__ import annotations


def layer_wise_rate(name: str, depth: int, layer_decay: float, patch_embed_factor: float) -> float:
    """The learning-rate factor of one parameter.

    Args:
        name: Parameter name, beginning with `encoder.` or the name of a head.
        depth: Number of blocks of the encoder.
        layer_decay: Factor from a block to the one below it, 0 to 1.
        patch_embed_factor: Further factor of the patch embedding.

    Returns:
        layer_decay ** (depth + 1 - layer); the tokens, position and patch embedding are layer 0,
        block i is layer i + 1, the final norm and the heads are layer depth + 1.

    Reference:
        Bao et al., BEiT, ICLR 2022; DINOv2's `get_vit_lr_decay_rate`.
    """
    layer = depth + 1
    if name.startswith("encoder.blocks."):
        layer = int(name.split(".")[2]) + 1
    elif name.startswith("encoder.") and not name.startswith("encoder.norm."):
        layer = 0
    factor = patch_embed_factor if name.startswith("encoder.patch_embed.") else 1.0
    return factor * layer_decay ** (depth + 1 - layer)
