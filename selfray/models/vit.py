"""The encoder: a plain vision transformer with DINOv2's parameter names and initialisation.

`load_state_dict` takes DINOv2's released weights as they are (`published.py` renames Hugging
Face's). Everything runs as well under bfloat16 autocast: the residual stream stays float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from selfray.errors import InputError, nearest

PositionInterpolation = Literal["bicubic", "bicubic-antialias", "bicubic-offset"]
"""How position embeddings are brought to another grid; features differ by more than 1e-3 between.

- `bicubic`: transformers' `Dinov2Model`.
- `bicubic-antialias`: DINOv2 with registers, transformers' `Dinov2WithRegistersModel`, and timm.
- `bicubic-offset`: DINOv2's own code without registers, which adds 0.1 patch to the scale.
"""

PositionInit = Literal["random", "sincos"]
"""How position embeddings begin: as DINOv2's, small noise that training shapes; or as sines and
cosines of row and column, by which a short training knows where a patch is from the first step."""

_NORM_EPS = 1e-6
_MLP_RATIO = 4
_INIT_STD = 0.02  # of linear layers and position embeddings, DINOv2's


@dataclass(frozen=True)
class Shape:
    """What sets the size of a transformer.

    Attributes:
        width: Length of a token, a multiple of `heads`.
        depth: Number of blocks.
        heads: Attention heads a block.
        ffn: `mlp` (GELU) or `swiglu`.
    """

    width: int
    depth: int
    heads: int
    ffn: Literal["mlp", "swiglu"] = "mlp"

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward part, the same rule as DINOv2's."""
        hidden = self.width * _MLP_RATIO
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.ffn == "swiglu" else hidden


ARCHITECTURES: dict[str, Shape] = {
    "vit_pico": Shape(128, 6, 2),
    "vit_nano": Shape(192, 6, 3),
    "vit_tiny": Shape(192, 12, 3),
    "vit_small": Shape(384, 12, 6),
    "vit_base": Shape(768, 12, 12),
    "vit_large": Shape(1024, 24, 16),
    "vit_giant": Shape(1536, 40, 24, "swiglu"),
}


class EncoderOutput(NamedTuple):
    """Tokens after the final LayerNorm: [B, D], [B, R, D] and [B, h*w, D], row by row."""

    cls: Tensor
    registers: Tensor
    patches: Tensor


class PatchEmbed(nn.Module):
    """Cut an image into square patches, each to one token."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, h*w, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of all tokens to all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] to query, key and value, views of [B, heads, N, D / heads] each."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        attended = attend(*self.split_heads(x))
        return self.proj(attended.transpose(1, 2).flatten(2))

    def of_cls(self, x: Tensor) -> Tensor:
        """[B, N, D] to the weights [B, heads, N] by which CLS attends to each token."""
        query, key, _ = self.split_heads(x)
        logits = query[:, :, :1] @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        return logits.softmax(-1).squeeze(2)


# Above this many tokens the fused kernel wins also in bfloat16 on a CPU.
_SHORT_SEQUENCE = 320


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention, [B, heads, N, d] each; [B, heads, N, d].

    PyTorch's fused CPU kernel is several times slower in bfloat16 than plain products on the
    short sequences of small crops (5.6 times at 65 tokens, forward and backward).
    """
    short = query.device.type == "cpu" and query.shape[2] <= _SHORT_SEQUENCE
    if not (short and query.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(query, key, value)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return logits.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """A linear layer gated by another, as in ViT-g."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """One learned factor a channel for a residual branch; `Block` multiplies by it."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))


class Block(nn.Module):
    """Attention, then feed-forward, each a residual branch that stochastic depth may skip."""

    def __init__(self, shape: Shape, layerscale_init: float, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(shape.width, eps=_NORM_EPS)
        self.attn = Attention(shape.width, shape.heads)
        self.ls1 = LayerScale(shape.width, layerscale_init)
        self.norm2 = nn.LayerNorm(shape.width, eps=_NORM_EPS)
        ffn = SwiGlu if shape.ffn == "swiglu" else Mlp
        self.mlp = ffn(shape.width, shape.hidden)
        self.ls2 = LayerScale(shape.width, layerscale_init)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        x = self._add_branch(x, self.norm1, self.attn, self.ls1)
        return self._add_branch(x, self.norm2, self.mlp, self.ls2)

    def _add_branch(
        self, x: Tensor, norm: nn.Module, branch: nn.Module, scale: LayerScale
    ) -> Tensor:
        # Only the images that keep the branch go through it: a drop rate of 0.3 saves 30 % of it.
        images = x.shape[0]  # len(x) would make the batch size a constant of an exported graph
        kept = max(1, int(images * (1 - self.drop_path))) if self.training else images
        if kept == images:
            return x + branch(norm(x)) * scale.gamma
        chosen = torch.randperm(images, device=x.device)[:kept]
        residual = branch(norm(x[chosen])) * scale.gamma
        return x.index_add(0, chosen, residual.to(x.dtype), alpha=images / kept)


class VisionTransformer(nn.Module):
    """The encoder.

    Args:
        shape: Width, depth, heads, kind of feed-forward.
        patch_size: Side of a patch, pixels.
        image_size: Side of the square image that the position embeddings are for, pixels; a
            multiple of `patch_size`. Other sizes are interpolated.
        registers: Number of register tokens.
        layerscale_init: Initial factor of the residual branches.
        drop_path: Share of the batch, 0 <= drop_path < 1, that skips a residual branch in
            training; the same in all blocks. With one image in the batch nothing is skipped.
        position_init: How position embeddings begin, `random` or `sincos`.

    Attributes:
        activation_checkpointing: Recompute the blocks in the backward pass, to save memory.
        position_interpolation: How other image sizes are met; by default as transformers does
            for the published model of this kind.

    Raises:
        InputError: `image_size` is no multiple of `patch_size`, or `drop_path` out of range.

    Reference:
        Oquab et al., DINOv2, TMLR 2024; Darcet et al., Vision transformers need registers,
        ICLR 2024; Huang et al., Deep networks with stochastic depth, ECCV 2016.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        patch_size: int,
        image_size: int,
        registers: int = 0,
        layerscale_init: float = 1e-5,
        drop_path: float = 0.0,
        position_init: PositionInit = "random",
    ) -> None:
        super().__init__()
        _check_size("image_size", image_size, patch_size)
        if not 0 <= drop_path < 1:
            raise InputError(f"drop_path is {drop_path}; allowed: 0 up to, but without, 1")
        self.shape = shape
        self.width, self.depth = shape.width, shape.depth
        self.patch_size, self.image_size, self.registers = patch_size, image_size, registers
        self.activation_checkpointing = False
        self.position_interpolation: PositionInterpolation = (
            "bicubic-antialias" if registers else "bicubic"
        )
        positions = 1 + (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.empty(1, positions, shape.width))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, registers, shape.width)) if registers else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, shape.width))
        self.patch_embed = PatchEmbed(patch_size, shape.width)
        self.blocks = nn.ModuleList(
            Block(shape, layerscale_init, drop_path) for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(shape.width, eps=_NORM_EPS)
        self._initialise(position_init)

    def _initialise(self, position_init: PositionInit) -> None:
        # DINOv2's; the patch embedding keeps PyTorch's own initialisation, as there.
        nn.init.trunc_normal_(self.pos_embed, std=_INIT_STD)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
                nn.init.zeros_(module.bias)
        if position_init == "sincos":
            grid = self.image_size // self.patch_size
            with torch.no_grad():
                self.pos_embed[0, 1:] = sincos_positions(grid, grid, self.width)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> EncoderOutput:
        """Encode images.

        Args:
            images: [B, 3, H, W] normalised, or [B, 1, H, W], which stands for three equal
                channels; H and W any multiples of `patch_size`.
            masks: Bool [B, h*w], true where the mask token takes the patch's place.

        Returns:
            CLS [B, D], registers [B, R, D] and patch tokens [B, h*w, D], after the last LayerNorm.

        Raises:
            InputError: H or W is no multiple of `patch_size`.
        """
        x = self.embed(images, masks)
        for block in self.blocks:
            x = self._run_block(block, x)
        x = self.norm(x)
        first_patch = 1 + self.registers
        return EncoderOutput(x[:, 0], x[:, 1:first_patch], x[:, first_patch:])

    def _run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # It keeps the random state, so that the same images skip a branch the second time.
            return checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return block(x)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """What enters the first block: [B, 1 + R + h*w, D]; arguments as in `forward`."""
        for name, side in zip(("height", "width"), images.shape[-2:], strict=True):
            _check_size(f"image {name}", side, self.patch_size)
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        patches = self.patch_embed(images.expand(-1, 3, -1, -1))
        if masks is not None:
            mask_token = self.mask_token.to(patches.dtype)
            patches = torch.where(masks.unsqueeze(-1), mask_token, patches)
        positions = self.positions(rows, columns)
        tokens = [(self.cls_token + positions[:, :1]).expand(images.shape[0], -1, -1)]
        if self.register_tokens is not None:  # they have no position
            tokens.append(self.register_tokens.expand(images.shape[0], -1, -1))
        tokens.append(patches + positions[:, 1:])
        return torch.cat(tokens, dim=1)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings [1, 1 + rows * columns, D] of CLS and a grid of patches."""
        grid = self.image_size // self.patch_size
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        if self.position_interpolation == "bicubic-offset":
            scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
            patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
        else:
            antialias = self.position_interpolation == "bicubic-antialias"
            patches = F.interpolate(patches, (rows, columns), mode="bicubic", antialias=antialias)
        patches = patches.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat((self.pos_embed[:, :1], patches), dim=1)

    def cls_attention(self, images: Tensor) -> Tensor:
        """How much CLS looks at each patch in the last block.

        Args:
            images: As in `forward`.

        Returns:
            [B, heads, h*w], >= 0; sums to 1 together with the share of CLS and the registers.
        """
        x = self.embed(images)
        *before, last = self.blocks
        for block in before:
            x = block(x)
        assert isinstance(last, Block)
        return last.attn.of_cls(last.norm1(x))[..., 1 + self.registers :]


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of a patch's column, then of its row, at falling frequencies.

    Args:
        rows: Of the grid of patches.
        columns: Of the grid of patches.
        width: Length of an embedding, a multiple of 4.

    Returns:
        float32 [rows * columns, width], row by row, values -1 to 1.

    Reference:
        Vaswani et al., Attention is all you need, NeurIPS 2017, section 3.5, on two axes as in
        He et al., Masked autoencoders, CVPR 2022.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (x, y)]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def build_vit(
    arch: str,
    *,
    patch_size: int,
    image_size: int,
    registers: int = 0,
    layerscale_init: float = 1e-5,
    drop_path: float = 0.0,
    position_init: PositionInit = "random",
) -> VisionTransformer:
    """Make a freshly initialised encoder; its weights depend on torch's random state only.

    Args:
        arch: A key of `ARCHITECTURES`.
        patch_size: Side of a patch, pixels.
        image_size: Side of the square image that the position embeddings are for, pixels.
        registers: Number of register tokens.
        layerscale_init: Initial factor of the residual branches.
        drop_path: Share of the batch that skips a residual branch in training, 0 <= it < 1.
        position_init: How position embeddings begin, `random` or `sincos`.

    Raises:
        InputError: Unknown `arch`, or a size that does not fit the patch.
    """
    if arch not in ARCHITECTURES:
        raise InputError(f"architecture {arch!r} is unknown. {nearest(arch, ARCHITECTURES)}")
    return VisionTransformer(
        ARCHITECTURES[arch],
        patch_size=patch_size,
        image_size=image_size,
        registers=registers,
        layerscale_init=layerscale_init,
        drop_path=drop_path,
        position_init=position_init,
    )


def _check_size(what: str, pixels: int, patch_size: int) -> None:
    if pixels < patch_size or pixels % patch_size:
        below = pixels // patch_size * patch_size
        allowed = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise InputError(
            f"{what} is {pixels}, not a multiple of patch_size {patch_size}. Use {allowed}."
        )
