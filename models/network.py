"""Which ε_θ: the U-Net or the Diffusion Transformer, by configuration.

A third network is a module of its own, `models/<kind>.py`, with a configuration that has `check_side`, and a class that
is built from (configuration, image_channels, side, classes), has `forward(x, t, label=None)` and `blocks()`. Here it
gets its name in `Kind`, its class in `EpsNetwork`, a field of :class:`NetworkConfig`, and a line in its `chosen` and in
:func:`build`; nothing else knows the kinds.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from models.choice import check_choice
from models.dit import DiT, DiTConfig
from models.unet import UNet, UNetConfig

Kind: TypeAlias = Literal["unet", "dit"]
EpsNetwork: TypeAlias = UNet | DiT
"""ε̂ with its weights: ``network(x, t, label=None)``, its number of ``classes`` and its ``blocks()``."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Which network, and the shape of each."""

    kind: Kind = "unet"
    """The convolutional U-Net, or the Diffusion Transformer."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """The shape of the U-Net, if it is the one."""
    dit: DiTConfig = field(default_factory=DiTConfig)
    """The shape of the Diffusion Transformer, if it is the one."""
    labels: bool = False
    """Learn the labels too, so that samples can be asked for by label."""

    def __post_init__(self) -> None:
        check_choice("network.kind", self.kind, Kind)

    @property
    def chosen(self) -> UNetConfig | DiTConfig:
        """The shape of the network that is built."""
        return self.dit if self.kind == "dit" else self.unet

    def check_side(self, side: int) -> None:
        """Raise ValueError unless the network can be built for pictures of this side, in pixels."""
        self.chosen.check_side(side)

    def check_classes(self, classes: int) -> None:
        """Raise ValueError if labels are to be learned and the data set has none."""
        if self.labels and classes < 1:
            raise ValueError(
                "network.labels is True, and the images have no labels; it must be False then: drop it, or take images "
                "whose folders are their labels"
            )

    def idle_settings(self, side: int) -> list[str]:
        """Return a sentence for each option that is set and has no effect, for pictures of this side, in pixels."""
        sentences = [
            f"network.{kind} has no effect: network.kind is {self.kind}"
            for kind, config, unset in (("unet", self.unet, UNetConfig()), ("dit", self.dit, DiTConfig()))
            if kind != self.kind and config != unset
        ]
        if self.kind == "unet" and (idle := self.unet.idle_attention(side)):
            sentences.append(f"network.unet.attention {idle} has no effect: no feature map has such a side")
        return sentences


def build(config: NetworkConfig, image_channels: int, side: int, classes: int = 0) -> EpsNetwork:
    """Make the network; its weights are undefined until :func:`models.init.initialize` or a checkpoint fills them.

    Args:
        config: which one, and its shape.
        image_channels: of the data set.
        side: of its pictures, in pixels.
        classes: how many labels it has; only networks that learn labels have a place for them.

    Raises:
        ValueError: if the network cannot be built for such pictures, or is to learn labels where there are none.
    """
    config.check_classes(classes)
    classes = classes if config.labels else 0
    if config.kind == "dit":
        return DiT(config.dit, image_channels, side, classes)
    return UNet(config.unet, image_channels, side, classes)
