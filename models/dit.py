"""ε_θ: the Diffusion Transformer (Peebles and Xie, 2023), with t and the label in every block by adaLN-Zero."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoding import sinusoidal, with_label
from models.init import zero

FREQUENCIES = 256
"""Size of the sines and cosines of t, before the two layers that encode them."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The shape of the network, at first the paper's DiT-S/2. The number of image channels is the data set's."""

    depth: int = 12
    """Transformer blocks."""
    width: int = 384
    """Size of a token; a multiple of 4: sines and cosines of its row and of its column."""
    heads: int = 6
    """Heads of the self-attention; they divide the width."""
    patch: int = 2
    """Side, in pixels, of the patch that makes one token; half of it makes four times the tokens."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"network.dit.depth is {self.depth}; it must be at least 1: try 12")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"network.dit.width is {self.width}; it must be a positive multiple of 4: try 384")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(
                f"network.dit.heads is {self.heads}; it must divide network.dit.width, which is {self.width}: try 1"
            )
        if self.patch < 1:
            raise ValueError(f"network.dit.patch is {self.patch}; it must be at least 1: try 2")

    def check_side(self, side: int) -> None:
        """Raise ValueError unless pictures of this side, in pixels, can be cut into whole patches."""
        if side < 1 or side % self.patch:
            raise ValueError(
                f"images have a side of {side} pixels, and network.dit.patch is {self.patch}; the side must be a "
                f"multiple of {self.patch}: take patches of 1 pixel or resize the images"
            )


SIZES: dict[str, DiTConfig] = {
    "S": DiTConfig(depth=12, width=384, heads=6),
    "B": DiTConfig(depth=12, width=768, heads=12),
    "L": DiTConfig(depth=24, width=1024, heads=16),
    "XL": DiTConfig(depth=28, width=1152, heads=16),
}
"""The paper's four, with patches of 2 pixels."""


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut pictures [B, C, H, W] into patches, row after row: [B, HW/patch², patch² C], the channel fastest."""
    B, C, H, W = x.shape
    cut = x.view(B, C, H // patch, patch, W // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)


def unpatchify(tokens: Tensor, patch: int, rows: int) -> Tensor:
    """Put patches together again, the inverse of :func:`patchify`: [B, C, rows * patch, W]."""
    B, N, size = tokens.shape
    cut = tokens.view(B, rows, N // rows, patch, patch, size // patch**2)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * patch, N // rows * patch)


def waves(number: Tensor, size: int) -> Tensor:
    """Return the transformer's sines and cosines of numbers: int64 [N] to float32 [N, size]."""
    return sinusoidal(number, size, slowest=size // 2)


def places(rows: int, columns: int, size: int, device: torch.device) -> Tensor:
    """Encode where each token stands, half for its column and half for its row: float32 [rows * columns, size].

    It is computed each time: a buffer would be lost where models are made without memory.
    """
    row = waves(torch.arange(rows, device=device), size // 2)[:, None].expand(rows, columns, -1)
    column = waves(torch.arange(columns, device=device), size // 2).expand(rows, columns, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise each token, then scale it by 1 + ``scale`` and shift it."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Attention(nn.Module):
    """Every token looks at every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, D/heads]
        return self.out(mixed.transpose(1, 2).reshape(B, N, D))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + gate · Attention(modulated x), then the same of a perceptron; shifts, scales and gates say t and label.

    They all start at zero, and with the gates closed the block is the identity.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = zero(linear(width, 6 * width))
        self.attention = Attention(width, heads)
        self.perceptron = nn.Sequential(linear(width, 4 * width), nn.GELU("tanh"), linear(4 * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        # Of the attention, then of the perceptron, each [B, 1, width].
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(6, dim=2)
        x = x + gate_1 * self.attention(modulated(x, shift_1, scale_1))
        return x + gate_2 * self.perceptron(modulated(x, shift_2, scale_2))  # type: ignore[no-any-return]


class DiT(nn.Module):
    """ε̂(x_t, t). x_t [B, image_channels, side, side] and t int64 [B] to [B, image_channels, side, side].

    With ``classes``, it also takes the label of each image, int64 [B] in 0..classes-1, or -1 for an image without one.
    Its weights are undefined until :func:`models.init.initialize` or a checkpoint has filled them.
    """

    def __init__(self, config: DiTConfig, image_channels: int, side: int, classes: int = 0) -> None:
        super().__init__()
        config.check_side(side)
        self.config, self.classes = config, classes
        width, pixels = config.width, image_channels * config.patch**2
        self.time = nn.Sequential(linear(FREQUENCIES, width, "normal"), nn.SiLU(), linear(width, width, "normal"))
        self.label = nn.Embedding(classes + 1, width) if classes else None  # the last row is "no label"
        self.patches = linear(pixels, width)
        self.stack = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.modulation = zero(linear(width, 2 * width))
        self.out = zero(linear(width, pixels))

    def blocks(self) -> list[nn.Module]:
        """Return the parts that run one after the other, in that order: where the model can be cut."""
        return list(self.stack)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        patch, rows, columns = self.config.patch, x.shape[2] // self.config.patch, x.shape[3] // self.config.patch
        condition = self._encode(t, label, x.dtype)  # [B, width]
        h = self.patches(patchify(x, patch))  # [B, rows * columns, width]
        h = h + places(rows, columns, self.config.width, x.device).to(x.dtype)
        for block in self.stack:
            h = block(h, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=2)
        return unpatchify(self.out(modulated(h, shift, scale)), patch, rows)

    def _encode(self, t: Tensor, label: Tensor | None, dtype: torch.dtype) -> Tensor:
        code = self.time(waves(t - 1, FREQUENCIES).to(dtype))  # the paper counts t from 0
        return F.silu(with_label(code, self.label, t, label))  # every block begins with it: once is enough


def linear(size_in: int, size_out: int, first_weights: str = "xavier") -> nn.Linear:
    """Make a linear layer that :func:`models.init.initialize` fills as the paper does."""
    layer = nn.Linear(size_in, size_out)
    layer.first_weights = first_weights  # type: ignore[assignment]
    return layer
