"""ε_θ: the U-Net of the DDPM paper, with t added in every residual block."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of the network. The number of image channels is the data set's."""

    channels: int = 32
    """Channels at the full resolution; also the size of the encoding of t."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channels at each level as a multiple of `channels`; each level halves the side of the picture."""
    blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    attention: tuple[int, ...] = (4,)
    """Sides, in pixels, of the feature maps that get self-attention. The middle always has it."""
    heads: int = 1
    """Heads of the self-attention."""
    groups: int = 8
    """Groups of the group normalisation."""

    def __post_init__(self) -> None:
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"network.multipliers is {self.multipliers}; it needs at least one positive number: try (1, 2)"
            )
        if self.blocks < 1:
            raise ValueError(f"network.blocks is {self.blocks}; it must be at least 1: try 2")
        if self.channels < 2 or self.channels % 2:
            raise ValueError(f"network.channels is {self.channels}; it must be even and positive: try 32")
        for name, parts in (("groups", self.groups), ("heads", self.heads)):
            if parts < 1 or self.channels % parts:
                raise ValueError(
                    f"network.{name} is {parts}; it must divide network.channels, which is {self.channels}: try 1"
                )

    def check_side(self, side: int) -> None:
        """Raise ValueError unless pictures of this side, in pixels, can be halved once per level."""
        halvings = len(self.multipliers) - 1
        if side < 1 or side % (1 << halvings):
            raise ValueError(
                f"images have a side of {side} pixels, and network.multipliers {self.multipliers} halves it {halvings} "
                f"times; the side must be a multiple of {1 << halvings}: take fewer levels or resize the images"
            )

    def idle_attention(self, side: int) -> list[int]:
        """Return the sides that `attention` names and that no feature map has, for pictures of this side."""
        return sorted(set(self.attention) - {side >> level for level in range(len(self.multipliers))})


def sinusoidal(t: Tensor, size: int) -> Tensor:
    """Encode t (int64 [B]) as sines and cosines of wavelengths from 2π to about 2π·10⁴: float32 [B, size]."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class ResidualBlock(nn.Module):
    """Two convolutions with the encoding of t between them, beside a skip connection."""

    def __init__(self, channels_in: int, channels_out: int, time_size: int, groups: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, channels_in)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(time_size, channels_out)
        self.norm_2 = nn.GroupNorm(groups, channels_out)
        self.conv_2 = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))  # [B, channels_out, H, W]
        h = h + self.time(time)[:, :, None, None]
        h = self.conv_2(F.silu(self.norm_2(h)))
        return self.skip(x) + h  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Every place of the feature map looks at every other."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
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

    def __init__(self, channels_in: int, channels_out: int, side: int, time_size: int, config: UNetConfig) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels_out, time_size, config.groups)
        attends = side in config.attention
        self.attention = SelfAttention(channels_out, config.heads, config.groups) if attends else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attention(self.residual(x, time))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double the side, then smooth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """ε̂(x_t, t). x_t [B, image_channels, side, side] and t int64 [B] to [B, image_channels, side, side].

    Its weights are undefined until :func:`models.init.initialize` or a checkpoint has filled them.
    """

    def __init__(self, config: UNetConfig, image_channels: int, side: int) -> None:
        super().__init__()
        config.check_side(side)
        self.config = config
        width, time_size = config.channels, 4 * config.channels
        self.time = nn.Sequential(nn.Linear(width, time_size), nn.SiLU(), nn.Linear(time_size, time_size), nn.SiLU())
        self.conv_in = nn.Conv2d(image_channels, width, 3, padding=1)

        widths, skips = [width * m for m in config.multipliers], [width]
        self.down = nn.ModuleList()  # one list of stages per level; the next level begins with a halving
        self.downsample = nn.ModuleList()
        for level, channels in enumerate(widths):
            stages = nn.ModuleList()
            for _ in range(config.blocks):
                stages.append(Stage(skips[-1], channels, side >> level, time_size, config))
                skips.append(channels)
            self.down.append(stages)
            if level + 1 < len(widths):
                self.downsample.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)

        self.middle_in = ResidualBlock(widths[-1], widths[-1], time_size, config.groups)
        self.middle_attention = SelfAttention(widths[-1], config.heads, config.groups)
        self.middle_out = ResidualBlock(widths[-1], widths[-1], time_size, config.groups)

        self.up, self.upsample, channels_in = nn.ModuleList(), nn.ModuleList(), widths[-1]
        for level, channels in reversed(list(enumerate(widths))):
            stages = nn.ModuleList()
            for _ in range(config.blocks + 1):
                stages.append(Stage(channels_in + skips.pop(), channels, side >> level, time_size, config))
                channels_in = channels
            self.up.append(stages)
            if level > 0:
                self.upsample.append(Upsample(channels))
        self.norm_out = nn.GroupNorm(config.groups, width * config.multipliers[0])
        self.conv_out = zero(nn.Conv2d(width * config.multipliers[0], image_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(sinusoidal(t, self.config.channels).to(x.dtype))  # [B, 4 * channels]
        h = self.conv_in(x)
        skips = [h]
        for level, stages in enumerate(self.down):
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(h, time)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)
        h = self.middle_out(self.middle_attention(self.middle_in(h, time)), time)
        for level, stages in enumerate(self.up):
            for stage in stages:  # type: ignore[attr-defined]
                h = stage(torch.cat([h, skips.pop()], dim=1), time)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        return self.conv_out(F.silu(self.norm_out(h)))  # type: ignore[no-any-return]


def zero(layer: nn.Module) -> nn.Module:
    """Mark a layer to start at zero, so that its block starts as the identity."""
    layer.starts_at_zero = True  # type: ignore[assignment]
    return layer
