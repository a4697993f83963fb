"""ε_θ: the U-Net of the DDPM paper, with t added in every residual block.

Without the dropout that the paper trains CIFAR-10 with: a mask would have to be a function of the position too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoding import sinusoidal, with_label
from models.init import zero


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of the network. The number of image channels is the data set's."""

    channels: int = 32
    """Channels at the full resolution; also the size of the encoding of t."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels at each level as a multiple of `channels`, 1 at first; each level halves the side of the picture."""
    blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    attention: tuple[int, ...] = (4,)
    """Sides, in pixels, of the feature maps that get self-attention. The middle always has it."""
    head_channels: int = 0
    """Channels of each attention head; 0 for a single head."""
    groups: int = 8
    """Groups of the group normalisation."""

    def __post_init__(self) -> None:
        if self.multipliers[:1] != (1,) or min(self.multipliers) < 1:
            raise ValueError(
                f"network.unet.multipliers is {self.multipliers}; it must begin with 1 and be positive: try (1, 2)"
            )
        if self.blocks < 1:
            raise ValueError(f"network.unet.blocks is {self.blocks}; it must be at least 1: try 2")
        if self.channels < 4 or self.channels % 2:
            raise ValueError(f"network.unet.channels is {self.channels}; it must be even and at least 4: try 32")
        if self.groups < 1 or self.channels % self.groups:
            raise ValueError(
                f"network.unet.groups is {self.groups}; it must divide network.unet.channels, which is "
                f"{self.channels}: try 1"
            )
        self._check_heads(self.widths[-1], "in the middle")

    @property
    def widths(self) -> list[int]:
        """Channels at each level."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    def check_side(self, side: int) -> None:
        """Raise ValueError unless the network can be built for pictures of this side, in pixels."""
        halvings = len(self.multipliers) - 1
        if side < 1 or side % (1 << halvings):
            raise ValueError(
                f"images have a side of {side} pixels, and network.unet.multipliers {self.multipliers} halves it "
                f"{halvings} times; the side must be a multiple of {1 << halvings}: take fewer levels or resize the "
                "images"
            )
        for level, channels in enumerate(self.widths):
            if side >> level in self.attention:
                self._check_heads(channels, f"at side {side >> level}")

    def _check_heads(self, channels: int, where: str) -> None:
        if self.head_channels < 0 or (self.head_channels and channels % self.head_channels):
            raise ValueError(
                f"network.unet.head_channels is {self.head_channels}; it must divide the channels wherever attention "
                f"happens, and {where} they are {channels}: try 0, a single head"
            )

    def idle_attention(self, side: int) -> list[int]:
        """Return the sides that `attention` names and that no feature map has, for pictures of this side."""
        return sorted(set(self.attention) - {side >> level for level in range(len(self.multipliers))})


def silu(x: Tensor) -> Tensor:
    """SiLU of what nobody else needs: in its place, where no gradient will ask for what was there."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def normalisation(channels: int, config: UNetConfig) -> nn.GroupNorm:
    """Group normalisation with the ε of the paper's code."""
    return nn.GroupNorm(config.groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two convolutions with the encoding of t between them, beside a skip connection."""

    def __init__(self, channels_in: int, channels_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm_1 = normalisation(channels_in, config)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(4 * config.channels, channels_out)
        self.norm_2 = normalisation(channels_out, config)
        self.conv_2 = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_1(silu(self.norm_1(x)))  # [B, channels_out, H, W]
        # In place: a convolution needs its input for the gradient, not its output. It saves two walks through memory.
        h += self.time(time)[:, :, None, None]
        h = self.conv_2(silu(self.norm_2(h)))
        h += self.skip(x)
        return h  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Every place of the feature map looks at every other."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else 1
        self.norm = normalisation(channels, config)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.qkv(tokens).view(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, heads, HW, C/heads]
        return x + self.out(mixed.transpose(1, 2).reshape(B, H * W, C)).transpose(1, 2).view(B, C, H, W)  # type: ignore[no-any-return]


class Stage(nn.Module):
    """A residual block, and self-attention where the feature map has a chosen side."""

    def __init__(self, channels_in: int, channels_out: int, side: int, config: UNetConfig) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels_out, config)
        self.attention = SelfAttention(channels_out, config) if side in config.attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attention(self.residual(x, time))  # type: ignore[no-any-return]


class Middle(nn.Module):
    """What stands at the lowest level between the way down and the way up."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.residual_in = ResidualBlock(channels, channels, config)
        self.attention = SelfAttention(channels, config)
        self.residual_out = ResidualBlock(channels, channels, config)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.residual_out(self.attention(self.residual_in(x, time)), time)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halve the side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # TensorFlow's SAME, so the paper's: zeros at the right and at the bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double the side, then smooth with the kernel K, in one step.

    A pixel, doubled, lays K down four times, each time a place further: their sum, four by four, is laid down once
    instead. That is the same function for 4/9 of the multiplications, and the doubled picture is never stored.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight  # [C_out, C_in, 3, 3]
        for axis in (2, 3):
            first, second, third = kernel.unbind(axis)
            kernel = torch.stack([third, second + third, first + second, first], axis)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class UNet(nn.Module):
    """ε̂(x_t, t). x_t [B, image_channels, side, side] and t int64 [B] to [B, image_channels, side, side].

    With ``classes``, it also takes the label of each image, int64 [B] in 0..classes-1, or -1 for an image without one.
    Its weights are undefined until :func:`models.init.initialize` or a checkpoint has filled them.
    """

    def __init__(self, config: UNetConfig, image_channels: int, side: int, classes: int = 0) -> None:
        super().__init__()
        config.check_side(side)
        self.config, self.classes = config, classes
        width, time_size = config.channels, 4 * config.channels
        self.time = nn.Sequential(nn.Linear(width, time_size), nn.SiLU(), nn.Linear(time_size, time_size))
        self.label = nn.Embedding(classes + 1, time_size) if classes else None  # the last row is "no label"
        self.conv_in = nn.Conv2d(image_channels, width, 3, padding=1)

        widths, skips = config.widths, [width]
        self.down = nn.ModuleList()  # one list of stages per level; the next level begins with a halving
        self.downsample = nn.ModuleList()
        for level, channels in enumerate(widths):
            stages = nn.ModuleList()
            for _ in range(config.blocks):
                stages.append(Stage(skips[-1], channels, side >> level, config))
                skips.append(channels)
            self.down.append(stages)
            if level + 1 < len(widths):
                self.downsample.append(Downsample(channels))
                skips.append(channels)

        self.middle = Middle(widths[-1], config)

        self.up, self.upsample, channels_in = nn.ModuleList(), nn.ModuleList(), widths[-1]
        for level, channels in reversed(list(enumerate(widths))):
            stages = nn.ModuleList()
            for _ in range(config.blocks + 1):
                stages.append(Stage(channels_in + skips.pop(), channels, side >> level, config))
                channels_in = channels
            self.up.append(stages)
            if level > 0:
                self.upsample.append(Upsample(channels))
        self.norm_out = normalisation(widths[0], config)
        self.conv_out = zero(nn.Conv2d(widths[0], image_channels, 3, padding=1))

    def blocks(self) -> list[nn.Module]:
        """Return what sharding and checkpointing wrap one by one, in the order of execution."""
        return [
            *(stage for stages in self.down for stage in stages),  # type: ignore[attr-defined]
            self.middle,
            *(stage for stages in self.up for stage in stages),  # type: ignore[attr-defined]
        ]

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        time = self._encode(t, label, x.dtype)  # [B, 4 * channels]
        h = self.conv_in(x)
        skips = [h]
        for level, stages in enumerate(self.down):
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(h, time)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)
        h = self.middle(h, time)
        for level, stages in enumerate(self.up):
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(torch.cat([h, skips.pop()], dim=1), time)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        return self.conv_out(silu(self.norm_out(h)))  # type: ignore[no-any-return]

    def _encode(self, t: Tensor, label: Tensor | None, dtype: torch.dtype) -> Tensor:
        size = self.config.channels
        code = self.time(sinusoidal(t - 1, size, slowest=size // 2 - 1).to(dtype))  # the paper counts t from 0
        return F.silu(with_label(code, self.label, t, label))  # every block begins with it: once is enough
